"""How much memory a piece of work takes at its peak."""

from __future__ import annotations

import ctypes
import gc
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from torch import Tensor

STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
CLEAR_PEAK = "5"  # makes Linux forget the peak of resident memory


class PeakMemory:
    """The peak, in bytes, of memory in use over steps of work, above what was in use when this object was made.

    On CUDA what torch has allocated; elsewhere the process's resident memory. Linux forgets an earlier peak on request, and takes back
    what earlier work has freed; where that is refused, and on other systems, only growth beyond that is seen, a lower bound.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.peak: int | None = None
        if device.type != "cuda":
            _give_back()
        self._forget()
        self._start = self._now()

    def watch(self, items: Iterable[Tensor]) -> Iterator[Tensor]:
        """The items as they come; what happens between them is not counted."""
        items = iter(items)
        while True:
            self._forget()
            item = next(items, None)
            now = self._now()
            if now is not None and self._start is not None:
                self.peak = max(self.peak or 0, now - self._start)
            if item is None:
                return
            yield item

    def _forget(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
            return
        try:
            CLEAR.write_text(CLEAR_PEAK)
        except OSError:
            return

    def _now(self) -> int | None:
        """The peak since it was last forgotten; None where the system tells none."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        try:
            line = next(line for line in STATUS.read_text().splitlines() if line.startswith("VmHWM:"))
            return int(line.split()[1]) * 1024
        except (OSError, StopIteration):
            return _most_resident()


def _give_back() -> None:
    """Hand memory that is free, and that the allocator keeps for later, to the system: new work that takes it would seem to take none."""
    gc.collect()
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "malloc_trim"):  # glibc's
        libc.malloc_trim(0)


def _most_resident() -> int | None:
    try:
        import resource
    except ImportError:  # Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024

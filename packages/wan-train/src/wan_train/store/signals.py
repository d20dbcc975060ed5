"""A run that is asked to end ends between two steps, on all processes at the same one, with its work saved."""

from __future__ import annotations

import os
import signal
import sys
import time
from types import FrameType, TracebackType
from typing import Any, Self

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from wan_dit.parallel import agree

ASKED = (signal.SIGINT, signal.SIGTERM)
TOGETHER = 1.0  # seconds within which a second signal is the first one again: launchers and schedulers both send it


class Signals:
    """Within it SIGINT and SIGTERM are noted, and a second one, more than a second later, ends the process at once.

    Only in the main thread; elsewhere nothing is noted. The handlers before are put back at the end.

    Example:
        >>> with Signals() as signals:
        ...     for step in range(steps):
        ...         train(step)
        ...         if code := signals.exit_code(group):
        ...             store.save(step + 1, state, wait=True)
        ...             raise SystemExit(code)
    """

    def __init__(self) -> None:
        self._received = 0
        self._since = 0.0
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Self:
        try:
            self._before = {number: signal.signal(number, self._note) for number in ASKED}
        except ValueError:  # not in the main thread
            self._before = {}
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def exit_code(self, group: dist.ProcessGroup | DeviceMesh | None = None) -> int:
        """0 to go on; 143 or 130 where this process, or with a group any of its processes, was asked to end. Call it between steps."""
        received = self._received if group is None else int(agree(self._received, group))
        return 128 + received if received else 0

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self._received and time.monotonic() - self._since > TOGETHER:
            os._exit(128 + number)
        if not self._received:
            self._received, self._since = number, time.monotonic()
            name = signal.Signals(number).name
            os.write(sys.stderr.fileno(), f"{name}: the run saves after this step and ends; once more ends it at once\n".encode())

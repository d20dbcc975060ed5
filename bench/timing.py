"""Interleaved timing: ours and the reference alternate, so that whatever else the machine does falls on both.

Times are CPU time of one thread: on an idle machine that is the wall time, on a busy one it still holds.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Comparison:
    """Seconds of each run, pair by pair, and how far the results were apart."""

    name: str
    ours: list[float]
    theirs: list[float]
    difference: float | None = None

    @property
    def ratios(self) -> list[float]:
        """Reference over ours, a pair at a time: above 1 ours is faster."""
        return [theirs / ours for ours, theirs in zip(self.ours, self.theirs, strict=True)]

    def row(self) -> list[str]:
        """Cells of a table: name, ours, reference, ratio with its spread, pairs, difference."""
        ratios = self.ratios
        return [
            self.name,
            duration(statistics.median(self.ours)),
            duration(statistics.median(self.theirs)),
            f"**{statistics.median(ratios):.2f}** ({min(ratios):.2f} .. {max(ratios):.2f})",
            str(len(ratios)),
            "-" if self.difference is None else f"{self.difference:.1e}",
        ]


def compare(
    name: str,
    ours: Callable[[], Any],
    theirs: Callable[[], Any],
    pairs: int,
    *,
    difference: float | None = None,
    clock: Callable[[], float] = time.process_time,
    warm: bool = True,
) -> Comparison:
    """Run both once to warm up (unless not `warm`), then `pairs` times in alternating order."""
    if warm:
        ours(), theirs()
    seconds: dict[int, list[float]] = {0: [], 1: []}
    for index in range(pairs):
        for side in (0, 1) if index % 2 == 0 else (1, 0):
            start = clock()
            (ours, theirs)[side]()
            seconds[side].append(clock() - start)
    return Comparison(name, seconds[0], seconds[1], difference)


def duration(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 1 else f"{1000 * seconds:.1f} ms"

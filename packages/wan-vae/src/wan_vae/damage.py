"""What to do where frames of a film are missing or damaged: refuse, stop there, or repeat the last good frame."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import NamedTuple

from .pixels import PathLike, TimedFrame

ON_ERROR = ("error", "stop", "fill")


class Missing(NamedTuple):
    """Stands in a film's sequence for a frame that cannot be shown at `pts`, for `reason`."""

    pts: int
    reason: str


@dataclass(frozen=True)
class Gap:
    """Frames that a film lacks.

    start: index of the first one among the frames read
    frames: how many, 0 where the film does not tell
    kind: "filled" with copies of the frame before (at the very start: after), or "cut", where reading stopped
    """

    start: int
    frames: int
    kind: str


def repair(
    pictures: Iterable[TimedFrame | Missing],
    path: PathLike,
    on_error: str,
    gaps: list[Gap],
    *,
    declared: int | None = None,
    limit: int | None = None,
) -> Iterator[TimedFrame]:
    """The frames of `pictures` with `on_error` applied to the missing ones; what was lost is appended to `gaps`, and warned of.

    declared: the count of frames that the film should have, for the length of a cut
    limit: stop after so many frames, without a look at what follows
    Raises ValueError at the first missing frame for "error", and where not a single frame is readable.
    """
    count = 0
    reasons: list[str] = []
    for frame in islice(_shown(pictures, path, on_error, gaps, declared or 0, reasons), limit):
        yield frame
        count += 1
    if not count:
        raise ValueError(f"'{path}' has no readable frame" + (f": {reasons[0]}" if reasons else ""))
    if gaps:
        warnings.warn(f"'{path}' is damaged ({reasons[0]}): {_summary(gaps, count)}", RuntimeWarning, stacklevel=2)


def _shown(
    pictures: Iterable[TimedFrame | Missing], path: PathLike, on_error: str, gaps: list[Gap], declared: int, reasons: list[str]
) -> Iterator[TimedFrame]:
    count, last = 0, None
    leading: list[int] = []  # times before the first good frame
    for picture in pictures:
        times = [picture.pts]
        if isinstance(picture, Missing):
            reasons[:] = reasons or [picture.reason]
            if on_error == "error":
                raise ValueError(
                    f"'{path}' is damaged after {count} frames: {picture.reason}; --on-error stop or fill goes on without them"
                )
            if on_error == "stop":
                gaps.append(Gap(count, max(0, declared - count), "cut"))
                return
            if last is None:
                leading.append(picture.pts)
                continue
        else:
            last, times, leading = picture.pixels, [*leading, picture.pts], []
        for index, pts in enumerate(times):
            if isinstance(picture, Missing) or index < len(times) - 1:
                _extend(gaps, count)
            yield TimedFrame(last, pts)
            count += 1


def _extend(gaps: list[Gap], index: int) -> None:
    last = gaps.pop() if gaps and gaps[-1].start + gaps[-1].frames == index else Gap(index, 0, "filled")
    gaps.append(Gap(last.start, last.frames + 1, "filled"))


def _summary(gaps: list[Gap], count: int) -> str:
    filled = sum(gap.frames for gap in gaps if gap.kind == "filled")
    parts = [f"{filled} of {count} frames repeat a neighbour"] if filled else []
    if gaps[-1].kind == "cut":
        parts.append(f"read up to frame {count}" + (f", {gaps[-1].frames} are left out" if gaps[-1].frames else ""))
    return ", ".join(parts)

"""Which pictures of a film are missing or damaged, found while its packets are decoded.

A frame is missing where its packet was read and no picture came of it, or where the file ends before what it declares. A
picture is damaged where the decoder says so, where its packet is cut, and from there to the next key frame, since those in
between are predicted from it. (Data can be wrong in ways that no decoder notices; video files carry no checksum.)
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from fractions import Fraction
from typing import Any

import av

from .damage import Missing

HIDDEN_FRAMES = {"vp8", "mpeg4", "msmpeg4v1", "msmpeg4v2", "msmpeg4v3", "flv1"}  # whose packets need not show anything
STEP = Fraction(1, 25)  # of a film that tells no rate


class Track:
    """Packets in, pictures out, and which of them are missing: the state of reading one stream once."""

    def __init__(self, stream: Any) -> None:
        self.stream = stream
        self.stream.codec_context.thread_count = 1  # frame threads tell of errors late, slice threads of H.264's not at all
        self.pending: dict[int, bool] = {}  # times of the packets whose picture is due, and whether it follows damage
        self.failed: set[int] = set()  # times of those that did not decode
        self.tainted, self.reason = False, ""
        self.packets = self.count = 0
        self.last: int | None = None
        self.end = 0  # of the last packet, in units of time_base
        self.timed: bool | None = None  # whether packets have times at all

    def pictures(self, container: Any) -> Iterator[tuple[Any, int] | Missing]:
        """Frames with their times, and Missing for each that should be there and is not."""
        for packet in self._demux(container):
            filled = packet.size > 0
            if filled:
                self._note(packet)
            try:
                frames = packet.decode()
            except av.FFmpegError as error:
                self._damaged(error.strerror or "invalid data")
                if filled and not self.timed:
                    yield self._missing(None)
                elif filled:
                    self.failed.add(packet.pts)
                continue
            for frame in frames:
                yield from self._place(frame)
        yield from (self._missing(pts) for pts in sorted(self.pending) if self._due(pts))
        yield from self._tail(container)

    def _demux(self, container: Any) -> Iterator[Any]:
        try:
            yield from container.demux(self.stream)
        except av.FFmpegError as error:
            self._damaged(error.strerror or "unreadable")

    def _note(self, packet: Any) -> None:
        self.packets += 1
        if self.timed is None:
            self.timed = packet.pts is not None
        if packet.is_keyframe:
            self.tainted = False
        if packet.is_corrupt:
            self._damaged("a packet is cut or fails its check")
        if self.timed and packet.pts is not None and not packet.is_discard:
            self.pending[packet.pts] = self.tainted
            self.end = max(self.end, packet.pts + (packet.duration or 0))

    def _damaged(self, reason: str) -> None:
        self.tainted = True
        self.reason = self.reason or reason

    def _place(self, frame: Any) -> Iterator[tuple[Any, int] | Missing]:
        pts = self._time(frame)
        tainted = self.pending.pop(pts, self.tainted and not frame.key_frame)
        for earlier in sorted(due for due in self.pending if due < pts):
            del self.pending[earlier]
            if self._due(earlier):
                yield self._missing(earlier)
        if frame.is_corrupt:
            self._damaged("the decoder had to guess at parts of a picture")
            self.pending = dict.fromkeys(self.pending, True)
        elif frame.key_frame and not self.timed:
            self.tainted = False
        if tainted or frame.is_corrupt:
            yield self._missing(pts)
        else:
            self.last, self.count = pts, self.count + 1
            yield frame, pts

    def _due(self, pts: int) -> bool:
        """Whether the packet at `pts`, of which no picture came, should have shown one."""
        hidden = self.stream.codec_context.name in HIDDEN_FRAMES and pts not in self.failed
        return not hidden and (self.last is None or pts > self.last)

    def _time(self, frame: Any) -> int:
        if self.timed and frame.pts is not None:
            return int(frame.pts)
        return 0 if self.last is None else self.last + self._step

    @property
    def _step(self) -> int:
        return max(1, round(1 / (rate_of(self.stream) * self.stream.time_base))) if self.timed else 1

    def _missing(self, pts: int | None) -> Missing:
        self.last = (0 if self.last is None else self.last + self._step) if pts is None else pts
        self.count += 1
        return Missing(self.last, self.reason or "no picture came of its data")

    def _tail(self, container: Any) -> Iterator[Missing]:
        """What the file declares beyond its end."""
        lost = self._lost(container)
        if lost:
            held = self.count
            self.reason = f"it declares {held + lost} frames and holds {held}"
            for index in range(lost):
                if index and lost > max(held, 1):
                    path = container.name.removeprefix("file:")
                    raise ValueError(f"'{path}' is damaged: {self.reason}, too many to fill; --on-error stop ends there")
                yield self._missing(None)

    def _lost(self, container: Any) -> int:
        """Frames that are missing at the end, by the index of the file, the count or the duration that it declares."""
        if indexed(container):  # its count may include frames that an edit list leaves out
            return max(0, len(self.stream.index_entries) - self.packets)
        if self.stream.frames:
            return max(0, int(self.stream.frames) - self.packets)
        clock = re.fullmatch(r"(\d+):(\d\d):(\d\d(?:\.\d+)?)", self.stream.metadata.get("DURATION", ""))
        if not (clock and self.timed):
            return 0
        declared = int(clock[1]) * 3600 + int(clock[2]) * 60 + Fraction(clock[3])
        frames = (declared / self.stream.time_base - self.end) / self._step
        return max(0, round(frames))


def rate_of(stream: Any) -> Fraction:
    return Fraction(stream.average_rate or stream.guessed_rate or 1 / STEP)


def indexed(container: Any) -> bool:
    """Whether the container is of the MP4 family, whose index lists every frame."""
    return str(container.format.name).startswith("mov")

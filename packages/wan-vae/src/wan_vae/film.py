"""Films as PyAV reads them: their facts, and their pictures in order, with a mark where one is missing or damaged.

A frame is missing where its packet was read and no picture came of it, or where the file ends before what it declares. A
picture is damaged where the decoder says so, where its packet is cut, and from there to the next key frame, since those in
between are predicted from it. (Data can be wrong in ways that no decoder notices; video files carry no checksum.)
"""

from __future__ import annotations

import os
import re
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
from av.video.reformatter import ColorRange, VideoReformatter

from .damage import Missing
from .pixels import UNSPECIFIED, Depth, PathLike, TimedFrame, rotation_of, to_rgb

RANGES: dict[int, str] = {ColorRange.MPEG: "limited", ColorRange.JPEG: "full"}
HIDDEN_FRAMES = {"vp8", "mpeg4", "msmpeg4v1", "msmpeg4v2", "msmpeg4v3", "flv1"}  # whose packets need not show anything
STEP = Fraction(1, 25)  # of a film that tells no rate


@dataclass(frozen=True)
class VideoInfo:
    """Facts of a film, a picture or a folder of pictures.

    width, height: pixels of the upright picture, after rotation
    fps: average frames per second
    frames: the count that the file declares, None where it declares none; the frames read are what counts
    duration: seconds, None where unknown
    pix_fmt, depth: the stored pixel format and its bits per component
    color_range: "limited", "full" or "unspecified"
    rotation: degrees counter-clockwise that turn the stored picture upright; already applied to frames read
    time_base: seconds that one unit of a frame's `pts` takes
    pixel_aspect: width over height of an upright pixel, 1 where square or unknown
    primaries, transfer: codes of ISO/IEC 23091-2 (1 BT.709, 2 unspecified, 16 PQ, 18 HLG, ...); frames read are left in them
    """

    width: int
    height: int
    fps: Fraction
    frames: int | None
    duration: float | None
    pix_fmt: str
    color_range: str
    rotation: int
    depth: int = 8
    time_base: Fraction = STEP
    pixel_aspect: Fraction = Fraction(1)
    primaries: int = UNSPECIFIED
    transfer: int = UNSPECIFIED


def probe_film(path: PathLike) -> VideoInfo:
    """Facts of the first video stream of `path`. Raises FileNotFoundError, and ValueError where it is no readable video."""
    with open_film(path) as (container, stream):
        frame, timed = _first_frame(container, stream, path)
        turned = rotation_of(frame) % 180 != 0
        width, height = (frame.height, frame.width) if turned else (frame.width, frame.height)
        length = stream.duration * stream.time_base if stream.duration else None
        if length is None and container.duration:
            length = Fraction(container.duration, av.time_base)
        aspect = Fraction(stream.sample_aspect_ratio or 1) or Fraction(1)
        return VideoInfo(
            width=width,
            height=height,
            fps=_rate(stream),
            frames=stream.frames or None,
            duration=float(length) if length else None,
            pix_fmt=frame.format.name,
            color_range=RANGES.get(int(frame.color_range), "unspecified"),
            rotation=rotation_of(frame),
            depth=max(component.bits for component in frame.format.components),
            time_base=Fraction(stream.time_base) if timed else 1 / _rate(stream),
            pixel_aspect=1 / aspect if turned else aspect,
            primaries=int(frame.color_primaries),
            transfer=int(frame.color_trc),
        )


def film_frames(path: PathLike, depth: Depth = 8) -> Iterator[TimedFrame | Missing]:
    """The pictures of a film in presentation order, upright, with marks for missing ones. Times strictly increase.

    Raises like `probe_film`, and where the picture changes its size.
    """
    with open_film(path) as (container, stream):
        track, size, last = _Track(stream), None, None
        steps: Counter[int] = Counter()
        reformatter = VideoReformatter()  # one for the film: a frame's own would start its threads anew, at many times the cost
        for index, picture in enumerate(track.pictures(container)):
            if isinstance(picture, Missing):
                pts = picture.pts
            else:
                frame, pts = picture
                pixels = to_rgb(frame, reformatter, depth)
                if size and pixels.shape != size:
                    raise ValueError(f"'{path}' changes from {size[1]}x{size[0]} to {pixels.shape[1]}x{pixels.shape[0]} at frame {index}")
                size = pixels.shape
            pts = pts if last is None else max(pts, last + 1)  # some files give two frames one time
            steps[0 if last is None else pts - last] += 1
            last = pts
            yield Missing(last, picture.reason) if isinstance(picture, Missing) else TimedFrame(pixels, last)
        if pauses := _pauses(steps):
            message = f"'{path}' has {pauses} pauses among evenly spaced frames: its timing is kept, but frames may be missing there"
            warnings.warn(message, RuntimeWarning, stacklevel=2)
        if _indexed(container) and track.count < stream.frames:
            message = f"'{path}' holds {stream.frames} frames, of which its edit list shows {track.count}; the others are left out"
            warnings.warn(message, RuntimeWarning, stacklevel=2)


def _pauses(steps: Counter[int]) -> int:
    """Long steps in a film whose others are one length, to a unit of its clock: frames may be lost there. 0 where many are long."""
    usual = max((step for step in steps if step), key=steps.__getitem__, default=0)
    long = sum(count for step, count in steps.items() if 2 * step > 3 * usual)
    even = sum(count for step, count in steps.items() if step and abs(step - usual) <= 1)
    return long if long + even == steps.total() - 1 and long * 10 <= even else 0


class _Track:
    """Packets in, pictures out, and which of them are missing: the state of reading one stream once."""

    def __init__(self, stream: Any) -> None:
        self.stream = stream
        self.stream.thread_type = "SLICE"  # frame threads report an error some packets late
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
        return max(1, round(1 / (_rate(self.stream) * self.stream.time_base))) if self.timed else 1

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
                    raise ValueError(f"{self.reason}: too many to fill, --on-error stop ends there")
                yield self._missing(None)

    def _lost(self, container: Any) -> int:
        """Frames that are missing at the end, by the index of the file, the count or the duration that it declares."""
        if _indexed(container):  # its count may include frames that an edit list leaves out
            return max(0, len(self.stream.index_entries) - self.packets)
        if self.stream.frames:
            return max(0, int(self.stream.frames) - self.packets)
        clock = re.fullmatch(r"(\d+):(\d\d):(\d\d(?:\.\d+)?)", self.stream.metadata.get("DURATION", ""))
        if not (clock and self.timed):
            return 0
        declared = int(clock[1]) * 3600 + int(clock[2]) * 60 + Fraction(clock[3])
        frames = (declared / self.stream.time_base - self.end) / self._step
        return max(0, round(frames))


@contextmanager
def open_film(path: PathLike) -> Iterator[tuple[Any, Any]]:
    """The container and its first video stream."""
    if not Path(path).exists():
        raise FileNotFoundError(f"no video file at '{path}'")
    if not Path(path).is_file():
        raise ValueError(f"'{path}' is not a file")
    try:
        container = av.open(f"file:{os.fspath(path)}")  # the protocol is named, since a name may hold a colon
    except (av.FFmpegError, UnicodeDecodeError) as error:
        raise ValueError(f"'{path}' is not a readable video: {getattr(error, 'strerror', error)}{_hint(Path(path))}") from error
    with container:
        if not container.streams.video:
            raise ValueError(f"'{path}' has no video stream")
        yield container, container.streams.video[0]


def _indexed(container: Any) -> bool:
    """Whether the container is of the MP4 family, whose index lists every frame."""
    return str(container.format.name).startswith("mov")


def _hint(path: Path) -> str:
    with path.open("rb") as file:
        unfinished = file.read(8)[4:] == b"ftyp"
    return " (an mp4 without a usable index, such as a recording that was not finished)" if unfinished else ""


def _first_frame(container: Any, stream: Any, path: PathLike) -> tuple[Any, bool]:
    """The first frame that decodes, and whether packets have times."""
    timed: bool | None = None
    reason = ""
    try:
        for packet in container.demux(stream):
            timed = packet.pts is not None if timed is None else timed
            try:
                for frame in packet.decode():
                    return frame, timed
            except av.FFmpegError as error:
                reason = f": {error.strerror}"
    except av.FFmpegError as error:
        reason = f": {error.strerror}"
    raise ValueError(f"'{path}' has a video stream without a single readable frame{reason}")


def _rate(stream: Any) -> Fraction:
    return Fraction(stream.average_rate or stream.guessed_rate or 1 / STEP)

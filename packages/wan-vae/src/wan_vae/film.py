"""Films as PyAV reads them: their facts, and their pictures in order, with a mark where one is missing or damaged."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path, PurePosixPath
from typing import Any

import av
from av.video.reformatter import ColorRange, VideoReformatter

from .damage import Missing
from .pixels import UNSPECIFIED, Depth, PathLike, TimedFrame, rotation_of, to_rgb
from .track import STEP, Track, indexed, rate_of

RANGES: dict[int, str] = {ColorRange.MPEG: "limited", ColorRange.JPEG: "full"}


@dataclass(frozen=True)
class FilePart:
    """`size` bytes of a file from byte `start` on that are a file of their own, such as a member of an uncompressed tar.

    member: its path within the file; the part is told as `path/member`
    """

    path: Path
    start: int
    size: int
    member: str

    @property
    def name(self) -> str:
        return PurePosixPath(self.member).name

    @property
    def suffix(self) -> str:
        return PurePosixPath(self.member).suffix

    def __str__(self) -> str:
        return f"{self.path}/{self.member}"


FilmSource = PathLike | FilePart


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


def probe_film(path: FilmSource) -> VideoInfo:
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
            fps=rate_of(stream),
            frames=stream.frames or None,
            duration=float(length) if length else None,
            pix_fmt=frame.format.name,
            color_range=RANGES.get(int(frame.color_range), "unspecified"),
            rotation=rotation_of(frame),
            depth=max(component.bits for component in frame.format.components),
            time_base=Fraction(stream.time_base) if timed else 1 / rate_of(stream),
            pixel_aspect=1 / aspect if turned else aspect,
            primaries=int(frame.color_primaries),
            transfer=int(frame.color_trc),
        )


def film_frames(path: FilmSource, depth: Depth = 8) -> Iterator[TimedFrame | Missing]:
    """The pictures of a film in presentation order, upright, with marks for missing ones. Times strictly increase.

    Raises like `probe_film`, and where the picture changes its size.
    """
    with open_film(path) as (container, stream):
        track, size, last = Track(stream), None, None
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
        if indexed(container) and track.count < stream.frames:
            message = f"'{path}' holds {stream.frames} frames, of which its edit list shows {track.count}; the others are left out"
            warnings.warn(message, RuntimeWarning, stacklevel=2)


def _pauses(steps: Counter[int]) -> int:
    """Long steps in a film whose others are one length, to a unit of its clock: frames may be lost there. 0 where many are long."""
    usual = max((step for step in steps if step), key=steps.__getitem__, default=0)
    long = sum(count for step, count in steps.items() if 2 * step > 3 * usual)
    even = sum(count for step, count in steps.items() if step and abs(step - usual) <= 1)
    return long if long + even == steps.total() - 1 and long * 10 <= even else 0


@contextmanager
def open_film(path: FilmSource) -> Iterator[tuple[Any, Any]]:
    """The container and its first video stream."""
    file, start = (path.path, path.start) if isinstance(path, FilePart) else (Path(path), 0)
    if not file.exists():
        raise FileNotFoundError(f"no video file at '{path}'")
    if not file.is_file():
        raise ValueError(f"'{path}' is not a file")
    part = f"subfile,,start,{start},end,{start + path.size},,:" if isinstance(path, FilePart) else ""
    try:
        container = av.open(f"{part}file:{file}")  # the protocol is named, since a name may hold a colon
    except (av.FFmpegError, UnicodeDecodeError) as error:
        raise ValueError(f"'{path}' is not a readable video: {getattr(error, 'strerror', error)}{_hint(file, start)}") from error
    with container:
        if not container.streams.video:
            raise ValueError(f"'{path}' has no video stream")
        yield container, container.streams.video[0]


def _hint(file: Path, start: int) -> str:
    with file.open("rb") as opened:
        opened.seek(start)
        unfinished = opened.read(8)[4:] == b"ftyp"
    return " (an mp4 without a usable index, such as a recording that was not finished)" if unfinished else ""


def _first_frame(container: Any, stream: Any, path: FilmSource) -> tuple[Any, bool]:
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

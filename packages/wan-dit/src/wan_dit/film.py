"""The frames of a film at a chosen rate: each the one that is shown at its time, upright, in RGB with square pixels.

Colours are as in wan-vae: by the matrix and the range that a film is tagged with, to full-range RGB; one that does not say
is BT.601 below 720 lines and BT.709 from there on.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any

import av
from av.video.reformatter import ColorRange, Colorspace, VideoReformatter

if TYPE_CHECKING:
    from PIL import Image

UNSPECIFIED = 2  # matrix code of ISO/IEC 23091-2
HD_LINES = 720
STEP = Fraction(1, 25)  # of a film that tells no rate
SLACK = Fraction(1, 2000)  # seconds that a time may be late: containers round it, Matroska to milliseconds
NOT_FILMS = ("tty", "hls", "concat", "dash")  # a text that is drawn, and lists of other files


def film_frames(path: str | os.PathLike[str], fps: Fraction | None = None) -> Iterator[Image.Image]:
    """The frames shown at 0, 1/fps, 2/fps, ... seconds from the first one, until the film ends; all of them where `fps` is None.

    Raises FileNotFoundError, and ValueError where the file is no film, is damaged or is cut.
    """
    with _open(path) as (container, stream):
        pictures = _decoded(container, stream, path)
        reformatter, last, image = VideoReformatter(), None, None
        for frame in (picture for picture, *_ in pictures) if fps is None else _at_rate(pictures, fps):
            if frame is not last or image is None:  # a picture that is shown twice is converted once
                last, image = frame, _upright(frame, reformatter, _aspect(stream))
            yield image


def probe_film(path: str | os.PathLike[str], fps: Fraction | None = None) -> tuple[tuple[int, int], int]:
    """(width, height) of the upright picture, and how many frames `film_frames` gives; only the first is decoded."""
    with _open(path) as (container, stream):
        frame, *_ = next(_decoded(container, stream, path))
        size = _upright(frame, VideoReformatter(), _aspect(stream)).size
        step = _step(stream)
    with _open(path) as (container, stream):  # from the start again
        packets = [packet for packet in container.demux(stream) if packet.size and not packet.is_discard]
    if fps is None or any(packet.pts is None for packet in packets):
        return size, len(packets) if fps is None else _count(len(packets) * step, fps)
    first, final = (pick(packets, key=lambda packet: packet.pts) for pick in (min, max))
    seconds = (final.pts - first.pts) * final.time_base + (final.duration * final.time_base if final.duration else step)
    return size, _count(Fraction(seconds), fps)


def _count(seconds: Fraction, fps: Fraction) -> int:
    return max(1, math.ceil((seconds - SLACK) * fps))


def _step(stream: Any) -> Fraction:
    """Seconds that a frame takes."""
    return 1 / Fraction(stream.average_rate or stream.guessed_rate or 1 / STEP)


def _aspect(stream: Any) -> Fraction:
    """Width over height of a stored pixel."""
    return Fraction(stream.sample_aspect_ratio or 1) or Fraction(1)


def _at_rate(pictures: Iterable[tuple[Any, Fraction, Fraction]], fps: Fraction) -> Iterator[Any]:
    count, shown, end = 0, None, Fraction(0)
    for frame, start, duration in pictures:
        while shown is not None and count / fps + SLACK < start:
            yield shown
            count += 1
        shown, end = frame, start + duration
    while not count or count / fps + SLACK < end:
        yield shown
        count += 1


def _decoded(container: Any, stream: Any, path: object) -> Iterator[tuple[Any, Fraction, Fraction]]:
    """Pictures in the order of their times, with the seconds from the first one, and for how long each is shown."""
    stream.codec_context.thread_count = 1  # several threads tell of errors late, or not at all
    step = _step(stream)
    packets = count = 0
    began: Fraction | None = None
    try:
        for packet in container.demux(stream):
            packets += packet.size > 0
            frames = packet.decode()
            if packet.is_corrupt or any(frame.is_corrupt for frame in frames):
                raise ValueError(f"'{path}' is damaged after {count} frames: a packet is cut or does not decode")
            for frame in frames:
                time = count * step if frame.pts is None else Fraction(frame.pts * frame.time_base)
                began = time if began is None else began
                yield frame, time - began, Fraction(frame.duration * frame.time_base) if frame.duration and frame.time_base else step
                count += 1
    except av.FFmpegError as error:
        raise ValueError(f"'{path}' is damaged after {count} frames: {error.strerror}") from error
    # the count of an mp4 leaves out what its edit list hides, its index does not
    declared = len(stream.index_entries) if container.format.name.startswith("mov") else stream.frames
    if packets < declared:
        raise ValueError(f"'{path}' is cut: it declares {declared} frames and holds {packets}")
    if not count:
        raise ValueError(f"'{path}' has no frame that can be read")


def _upright(frame: Any, reformatter: VideoReformatter, aspect: Fraction) -> Image.Image:
    from PIL import Image

    matrix = None
    if frame.colorspace == UNSPECIFIED:
        matrix = Colorspace.ITU709 if frame.height >= HD_LINES else Colorspace.ITU601
    pixels = reformatter.reformat(frame, format="rgb24", src_colorspace=matrix, dst_color_range=ColorRange.JPEG).to_ndarray()
    image = Image.fromarray(pixels)
    if (width := round(frame.width * aspect)) != frame.width:
        image = image.resize((width, frame.height), Image.Resampling.LANCZOS)
    turns = round(frame.rotation / 90) % 4
    return image.rotate(90 * turns, expand=True)


@contextmanager
def _open(path: str | os.PathLike[str]) -> Iterator[tuple[Any, Any]]:
    """The container and its first video stream."""
    try:
        # the protocol is named, since a name may hold a colon, and no other is allowed, since a film may name other sources
        container = av.open(f"file:{os.fspath(path)}", options={"protocol_whitelist": "file"})
    except (av.FFmpegError, UnicodeDecodeError) as error:
        raise ValueError(f"'{path}' is not a video that can be read: {getattr(error, 'strerror', error)}{_hint(Path(path))}") from error
    with container:
        if container.format.name in NOT_FILMS or not container.streams.video:
            raise ValueError(f"'{path}' is not a video: it holds no pictures")
        yield container, container.streams.video[0]


def _hint(path: Path) -> str:
    with path.open("rb") as file:
        unfinished = file.read(8)[4:] == b"ftyp"
    return " (an mp4 without its index: it is cut, or a recording that was not finished)" if unfinished else ""

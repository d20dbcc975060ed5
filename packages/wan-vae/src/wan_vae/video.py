"""Films, pictures and folders of pictures: read and written frame by frame, upright, by their times, at constant memory."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

from .damage import ON_ERROR, Gap, repair
from .film import VideoInfo, film_frames, probe_film
from .images import ImageWriter, image_frames, is_images, probe_images
from .pixels import Depth, Frame, PathLike, TimedFrame, to_frames, to_tensor
from .writer import VideoWriter

__all__ = [
    "Crop",
    "Frame",
    "Gap",
    "ImageWriter",
    "PathLike",
    "Reader",
    "TimedFrame",
    "VideoInfo",
    "VideoWriter",
    "open_writer",
    "probe",
    "read",
    "read_frames",
    "to_frames",
    "to_tensor",
]

Crop = tuple[int, int, int, int]  # pixels cut off: left, top, right, bottom


def probe(path: PathLike, *, fps: Fraction | None = None) -> VideoInfo:
    """Facts of a film, a picture or a folder of pictures; `fps` is for pictures, which have none.

    Raises FileNotFoundError, and ValueError where the file is no video.
    """
    if Path(path).exists() and is_images(path):
        return probe_images(path, fps)
    if fps is not None:
        raise ValueError(f"'{path}' is a film, which has its own frame rate; --fps is for pictures")
    return probe_film(path)


class Reader:
    """The frames of a film, a picture or a folder of pictures, in order; iterate over it, once or more.

    limit: read at most so many frames
    depth: 8 for uint8 frames, 16 for uint16 ones, which keep what a film has beyond 8 bits
    on_error: what to do at a missing or damaged frame: "error" raises ValueError, "stop" ends there, "fill" repeats the last
        good frame at the times of the missing ones (up to the next key frame, since those between are predicted from it);
        the latter two warn at the end and list what was lost in `gaps`
    fps: of pictures (24 where not given)
    crop: pixels to cut off: left, top, right, bottom
    info: facts of the source, of the frames as they are read (after the crop)
    """

    def __init__(
        self,
        path: PathLike,
        *,
        limit: int | None = None,
        depth: Depth = 8,
        on_error: str = "error",
        fps: Fraction | None = None,
        crop: Crop | None = None,
    ) -> None:
        if on_error not in ON_ERROR:
            raise ValueError(f"on_error is '{on_error}', expected one of {', '.join(ON_ERROR)}")
        self.path, self.limit, self.depth, self.on_error, self.crop = path, limit, depth, on_error, crop or (0, 0, 0, 0)
        source = probe(path, fps=fps)
        left, top, right, bottom = self.crop
        width, height = source.width - left - right, source.height - top - bottom
        if min(self.crop) < 0 or min(width, height) < 1:
            size = f"{source.width}x{source.height}"
            raise ValueError(f"'{path}' is {size}, of which a crop of {left}, {top}, {right} and {bottom} pixels leaves nothing")
        self.info = replace(source, width=width, height=height)
        self.gaps: list[Gap] = []

    def __iter__(self) -> Iterator[TimedFrame]:
        self.gaps.clear()
        frames = (image_frames if is_images(self.path) else film_frames)(self.path, self.depth)
        left, top, _, _ = self.crop
        rows, columns = slice(top, top + self.info.height), slice(left, left + self.info.width)
        for pixels, pts in repair(frames, self.path, self.on_error, self.gaps, declared=self.info.frames, limit=self.limit):
            yield TimedFrame(pixels[rows, columns], pts)


def read(path: PathLike, **options: Any) -> Reader:
    """A `Reader` of `path`, which gives frames with their times; see there for the options.

    Example: `for pixels, pts in read("film.mkv"): ...`
    """
    return Reader(path, **options)


def read_frames(path: PathLike, *, limit: int | None = None, depth: Depth = 8, on_error: str = "error") -> Iterator[Frame]:
    """The frames of `path` in presentation order, upright, as `[H, W, 3]` RGB, at most `limit` of them; options as of `Reader`.

    Raises FileNotFoundError, and ValueError where the file is no video or its data are damaged.
    """
    for pixels, _ in Reader(path, limit=limit, depth=depth, on_error=on_error):
        yield pixels


def open_writer(
    path: PathLike, *, size: tuple[int, int], bit_depth: int = 8, frames: int | None = None, **film: Any
) -> VideoWriter | ImageWriter:
    """What writes to `path`: pictures for a folder, a name without suffix or a `.png`, else a film; `film` as of `VideoWriter`.

    frames: how many will be written, where known: a single `.png` takes no more than one
    """
    if is_images(path) or not Path(path).suffix:
        if film.get("audio") is not None:
            raise ValueError(f"'{path}' is for pictures, which hold no sound")
        return ImageWriter(path, size=size, depth=8 if bit_depth == 8 else 16, frames=frames)
    return VideoWriter(path, size=size, bit_depth=bit_depth, **film)

"""Pictures as films: one file or a folder of them is read frame by frame, and frames are written as numbered PNG files."""

from __future__ import annotations

import os
import re
import secrets
import shutil
import warnings
from collections.abc import Iterator
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import av
import numpy as np
from av.video.reformatter import VideoReformatter

from .damage import Missing
from .film import VideoInfo, probe_film
from .pixels import FORMATS, Depth, Frame, PathLike, TimedFrame, to_rgb

SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff"}
RATE = Fraction(24)  # frames per second of pictures, where none is asked for
PATTERN = re.compile(r"%0?\d*d")


def is_images(path: PathLike) -> bool:
    """Whether `path` is a folder or names a picture."""
    return Path(path).is_dir() or Path(path).suffix.lower() in SUFFIXES


def image_files(path: PathLike) -> list[Path]:
    """The picture itself, or those of a folder in natural order (2 before 10); warns of other files in it.

    Raises FileNotFoundError, and ValueError for a folder without pictures.
    """
    path = Path(path)
    if not path.is_dir():
        return [path]
    entries = sorted((entry for entry in path.iterdir() if not entry.name.startswith(".")), key=_natural)
    files = [entry for entry in entries if entry.suffix.lower() in SUFFIXES and entry.is_file()]
    if not files:
        raise ValueError(f"'{path}' is a folder without pictures ({', '.join(sorted(SUFFIXES))})")
    if len(files) < len(entries):
        warnings.warn(f"'{path}' holds {len(entries) - len(files)} files that are no pictures; left out", RuntimeWarning, stacklevel=2)
    return files


def _natural(path: Path) -> list[tuple[int, str]]:
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", path.name)]


def taken(path: PathLike, frames: int) -> Path | None:
    """The first file that exists among those that `frames` frames would be written to, for a pattern such as `out/%05d.png`."""
    if not PATTERN.search(str(path)):
        return None
    names = (Path(_numbered(str(path), index)) for index in range(frames))
    return next((name for name in names if name.exists()), None)


def _numbered(name: str, index: int) -> str:
    return PATTERN.sub(lambda number: number[0] % (index + 1), name)


def probe_images(path: PathLike, fps: Fraction | None = None) -> VideoInfo:
    """Facts of a picture or a folder of pictures, by the first one, at `fps` (24 where not given)."""
    files, rate = image_files(path), Fraction(fps or RATE)
    first = probe_film(files[0])
    return replace(first, fps=rate, time_base=1 / rate, frames=len(files), duration=float(len(files) / rate))


def image_frames(path: PathLike, depth: Depth = 8) -> Iterator[TimedFrame | Missing]:
    """The pictures in natural order, frame `i` at time `i`; Missing for one that does not decode.

    Raises ValueError where a picture has another size than the first.
    """
    reformatter, size = VideoReformatter(), None
    for index, file in enumerate(image_files(path)):
        try:
            frame = _read(file)
        except ValueError as error:
            yield Missing(index, str(error))
            continue
        pixels = to_rgb(frame, reformatter, depth)
        if size and pixels.shape != size:
            raise ValueError(f"'{file}' is {pixels.shape[1]}x{pixels.shape[0]}, the pictures before it are {size[1]}x{size[0]}")
        size = pixels.shape
        yield TimedFrame(pixels, index)


def _read(file: Path) -> Any:
    try:
        with av.open(f"file:{file}", options={"pattern_type": "none"}) as container:
            frame: Any = next(container.decode(video=0), None)
    except (av.FFmpegError, IndexError, ValueError) as error:
        raise ValueError(f"'{file.name}' is not a readable picture: {getattr(error, 'strerror', error)}") from error
    if frame is None or frame.is_corrupt:
        raise ValueError(f"'{file.name}' is cut or damaged")
    if frame.format.has_palette or any(component.is_alpha for component in frame.format.components):
        warnings.warn(f"'{file.name}' may have transparency, which is left out", RuntimeWarning, stacklevel=2)
    return frame


class ImageWriter:
    """Writes frames as PNG files: a folder, a numbered pattern such as `out/%05d.png`, or one `.png` for one frame.

    A folder appears when all are written; files of a pattern, or into a folder that exists, are moved to their names then.
    depth: 8, or 16 bits per component
    frames: how many will be written, where known, for an error at once

    Example: `with ImageWriter("frames", size=(640, 360)) as writer: writer.write(frame)`
    """

    def __init__(self, path: PathLike, *, size: tuple[int, int], depth: Depth = 8, frames: int | None = None) -> None:
        self.path, self.size, self.count = Path(path), size, 0
        self.depth: Depth = depth
        self.folder, self.name = (self.path.parent, self.path.name) if self.path.suffix else (self.path, "%05d.png")
        if Path(self.name).suffix.lower() != ".png" or PATTERN.search(str(self.folder)):
            raise ValueError(f"cannot write pictures to '{path}': expected a folder, a pattern such as out/%05d.png, or one .png")
        if len(PATTERN.findall(self.name)) > 1:
            raise ValueError(f"cannot write pictures to '{path}': more than one number in its pattern")
        self._numbered = PATTERN.search(self.name) is not None
        self._take((frames or 1) - 1)

    def __enter__(self) -> Self:
        folder = self.folder.absolute()
        folder.parent.mkdir(parents=True, exist_ok=True)
        beside = folder if folder.is_dir() else folder.parent  # inside one that exists: it may be a disk of its own
        self._scratch = beside / f".{folder.name}.{secrets.token_hex(4)}"
        try:
            self._scratch.mkdir()
        except OSError as error:
            raise OSError(f"cannot write '{self.path}': {error.strerror}") from error
        self._encoder: Any = None
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        try:
            if kind is None:
                if not self.count:
                    raise ValueError(f"no frame was written to '{self.path}'")
                self._publish()
        finally:
            shutil.rmtree(self._scratch, ignore_errors=True)

    def _publish(self) -> None:
        if not self.folder.exists():
            os.replace(self._scratch, self.folder)
            return
        for file in sorted(self._scratch.iterdir()):
            os.replace(file, self.folder / file.name)

    def write(self, frame: Frame, pts: int | None = None) -> None:
        """Append one frame `[H, W, 3]` RGB, uint8 or uint16 by the depth; `pts` is for films alone."""
        width, height = self.size
        if frame.shape != (height, width, 3) or frame.dtype != (np.uint8 if self.depth == 8 else np.uint16):
            raise ValueError(f"expected a uint{self.depth} frame [{height}, {width}, 3], got {frame.dtype} {list(frame.shape)}")
        self._take(self.count)
        name = _numbered(self.name, self.count)
        try:
            (self._scratch / name).write_bytes(self._png(np.ascontiguousarray(frame)))
        except OSError as error:
            raise OSError(f"cannot write '{self.path}': {error.strerror}") from error
        self.count += 1

    def _take(self, index: int) -> None:
        if index and not self._numbered:
            raise ValueError(f"'{self.path}' is one picture, for one frame; name a folder or a pattern such as %05d.png")

    def _png(self, frame: Any) -> bytes:
        if self._encoder is None:
            self._encoder = av.CodecContext.create("png", "w")
            self._encoder.width, self._encoder.height = self.size
            self._encoder.pix_fmt = "rgb24" if self.depth == 8 else "rgb48be"
            self._encoder.time_base = 1 / RATE
        picture: Any = av.VideoFrame.from_ndarray(frame, format=FORMATS[self.depth])
        if self.depth == 16:
            picture = picture.reformat(format="rgb48be")
        picture.pts = self.count
        return b"".join(bytes(packet) for packet in self._encoder.encode(picture))

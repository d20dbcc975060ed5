"""What a person gives a task besides text: images, videos (films, folders of pictures) and masks, read from files."""

from __future__ import annotations

import hashlib
import math
from collections import deque
from collections.abc import Iterable, Iterator
from fractions import Fraction
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from .film import film_frames, probe_film
from .images import PathLike as PathLike
from .images import PictureSource as PictureSource
from .images import Size, fit, is_picture, picture_files
from .images import read_image as read_image


def probe_video(path: PathLike, fps: float | None = None, *, what: str = "video") -> tuple[Size, int]:
    """(width, height) of a video, and how many frames `read_video` finds in it at `fps`; only its first picture is decoded.

    what: how errors call it
    """
    found = _existing(path, what)
    if _is_pictures(found):
        files = _files(found)
        return read_image(files[0]).size, len(files)
    return probe_film(found, _rate(fps))


def read_video(
    path: PathLike, *, fps: float | None = None, frames: int | None = None, last: int | None = None, size: Size | None = None
) -> Tensor:
    """A video `[3, T, H, W]` float32 in [-1, 1] from a film, a folder of pictures in natural order, or one picture.

    fps: of a film take the frames that are shown at 0, 1/fps, 2/fps, ... seconds, or all; pictures are taken one a frame
    frames: take the first so many; ValueError where there are fewer
    last: take the last so many, or all where there are fewer
    size: (width, height) to scale to, its proportions kept and what stands over at two sides cut off
    Raises FileNotFoundError, and ValueError where there is no video or a damaged one.
    """
    pixels = _frames(path, "video", fps, frames, last, size, Image.Resampling.LANCZOS)
    return torch.from_numpy(pixels).permute(3, 0, 1, 2).float().div_(127.5).sub_(1.0)


def read_mask(path: PathLike, *, fps: float | None = None, frames: int | None = None, size: Size | None = None) -> Tensor:
    """A mask `[1, T, H, W]` float32 in 0..1, where white (and transparent) is to be generated and black kept.

    A still picture is repeated for all `frames`; all else is as in `read_video`, but scaled without new levels of grey.
    """
    still = Path(path).is_file() and is_picture(Path(path))
    pixels = _frames(path, "mask", fps, 1 if still else frames, None, size, Image.Resampling.NEAREST)
    grey = np.stack([np.asarray(Image.fromarray(frame).convert("L")) for frame in pixels])
    mask = torch.from_numpy(grey)[None].float().div_(255.0)
    return mask.expand(-1, frames or 1, -1, -1).clone() if still else mask


def sha256_of(path: PathLike) -> str:
    """sha256 of a file; of a folder that of the lines `<sha256>  <name>` of its pictures, in natural order."""
    path = Path(path)
    if path.is_dir():
        lines = (f"{sha256_of(file)}  {file.name}\n" for file in picture_files(path))
        return hashlib.sha256("".join(lines).encode()).hexdigest()
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _frames(
    source: PathLike, what: str, fps: float | None, frames: int | None, last: int | None, size: Size | None, resample: Image.Resampling
) -> np.ndarray:
    """The frames `[T, H, W, 3]`, uint8, of a file or folder."""
    _check(frames, last, size)
    path = _existing(source, what)
    images = _one_size(_pictures(path, _rate(fps)), path, what)
    chosen = deque(images, maxlen=last) if last is not None else islice(images, frames)
    found = [np.asarray(fit(image, size, resample) if size else image) for image in chosen]
    if frames is not None and len(found) < frames:
        rate = f" at {fps:g} a second" if fps and not _is_pictures(path) else ""
        raise ValueError(f"'{path}' has {len(found)} frames{rate}, {frames} are needed: give a longer {what}, or ask for fewer frames")
    return np.stack(found)


def _one_size(images: Iterable[Image.Image], path: Path, what: str) -> Iterator[Image.Image]:
    first: Size | None = None
    for i, image in enumerate(images, start=1):
        first = first or image.size
        if image.size != first:
            raise ValueError(
                f"frame {i} of '{path}' is {image.width}x{image.height}, those before it are {first[0]}x{first[1]}: "
                f"the frames of a {what} have one size"
            )
        yield image


def _pictures(path: Path, fps: Fraction | None) -> Iterator[Image.Image]:
    return map(read_image, _files(path)) if _is_pictures(path) else film_frames(path, fps)


def _existing(source: PathLike, what: str) -> Path:
    path = Path(source)
    if not path.exists():
        raise FileNotFoundError(f"no {what} at '{path}'")
    return path


def _is_pictures(path: Path) -> bool:
    return path.is_dir() or is_picture(path)


def _files(path: Path) -> list[Path]:
    return picture_files(path) if path.is_dir() else [path]


def _rate(fps: float | None) -> Fraction | None:
    if fps is None:
        return None
    if not (math.isfinite(fps) and 1e-3 <= fps <= 1e4):
        raise ValueError(f"fps must be a positive number of frames a second, got {fps}")
    return Fraction(fps).limit_denominator(100_000)


def _check(frames: int | None, last: int | None, size: Size | None) -> None:
    for name, count in (("frames", frames), ("last", last)):
        if count is not None and count < 1:
            raise ValueError(f"{name} must be at least 1, got {count}")
    if frames is not None and last is not None:
        raise ValueError("give frames, for the first ones, or last, not both")
    if size is not None and min(size) < 1:
        raise ValueError(f"size must be a positive width and height, got {size[0]}x{size[1]}")

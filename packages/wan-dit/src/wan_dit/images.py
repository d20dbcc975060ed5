"""Pictures as 8-bit RGB, from files of any kind, and folders of them."""

from __future__ import annotations

import os
import re
import warnings
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from .media import to_frames

PathLike = str | os.PathLike[str]
PictureSource = PathLike | Image.Image | Tensor
Size = tuple[int, int]

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")
TRANSPARENT = ("RGBA", "LA", "PA", "RGBa", "La", "P")  # a palette may have it too


def read_image(source: PictureSource) -> Image.Image:
    """A picture as 8-bit RGB: turned as its EXIF data say, transparent parts on white, 16-bit grey scaled.

    source: a file, a picture of Pillow, or a tensor `[3, H, W]` in [-1, 1], which may have axes of 1 for batch and time
    Raises FileNotFoundError, and ValueError where it is no picture, or a cut one.
    """
    if isinstance(source, Tensor):
        return _from_tensor(source)
    if isinstance(source, Image.Image):
        return _to_rgb(source, "the image")
    path = Path(source)
    if not path.exists():
        raise FileNotFoundError(f"no image at '{path}'")
    if path.is_dir():
        raise ValueError(f"'{path}' is a folder: give one image, such as a .png or .jpg")
    try:
        with Image.open(path) as image:
            return _to_rgb(image, f"'{path}'")
    except PermissionError:
        raise
    except UnidentifiedImageError as error:
        raise ValueError(f"'{path}' is not an image that can be read: give a PNG, JPEG, WebP, BMP or TIFF") from error
    except Image.DecompressionBombError as error:
        raise ValueError(f"'{path}' is too large: {error}") from error
    except (OSError, SyntaxError, EOFError) as error:  # Pillow's, by the format of the file
        raise ValueError(f"'{path}' is cut or damaged: {error}") from error


def fit(image: Image.Image, size: Size, resample: Image.Resampling = Image.Resampling.LANCZOS) -> Image.Image:
    """The picture at `size`, (width, height): its proportions kept, its middle; what stands over at two sides is cut off."""
    return image if image.size == size else ImageOps.fit(image, size, resample)


def is_picture(path: Path) -> bool:
    return path.suffix.lower() in SUFFIXES


def picture_files(folder: Path) -> list[Path]:
    """The pictures of a folder in natural order (2 before 10); warns of other files in it. ValueError where there are none."""
    entries = sorted((entry for entry in folder.iterdir() if not entry.name.startswith(".")), key=_natural)
    files = [entry for entry in entries if is_picture(entry) and entry.is_file()]
    if not files:
        raise ValueError(f"'{folder}' is a folder without frames: expected pictures such as 0001.png ({', '.join(SUFFIXES)})")
    if len(files) < len(entries):
        warnings.warn(f"'{folder}' holds {len(entries) - len(files)} files that are no pictures; left out", RuntimeWarning, stacklevel=2)
    return files


def _to_rgb(image: Image.Image, name: str) -> Image.Image:
    image = ImageOps.exif_transpose(image)
    if image.mode == "F":
        raise ValueError(f"{name} holds floating-point numbers, whose range it does not tell: save it with 8 or 16 bits")
    if image.mode == "I" or image.mode.startswith("I;16"):
        levels = np.asarray(image).astype(np.int64)
        if levels.min() < 0 or levels.max() > 65535:
            raise ValueError(f"{name} holds whole numbers beyond 16 bits: save it with 8 or 16 bits")
        return Image.fromarray(((levels + 128) // 257).astype(np.uint8)).convert("RGB")
    if image.mode in TRANSPARENT or "transparency" in image.info:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


def _from_tensor(tensor: Tensor) -> Image.Image:
    got = f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"
    tensor = tensor[0] if tensor.ndim in (4, 5) and tensor.shape[0] == 1 else tensor
    tensor = tensor[:, 0] if tensor.ndim == 4 and tensor.shape[1] == 1 else tensor
    if tensor.ndim != 3 or tensor.shape[0] != 3 or not tensor.is_floating_point():
        raise ValueError(f"an image is a floating-point tensor [3, H, W] in [-1, 1], got {got}")
    if not bool((tensor.abs() <= 1.001).all()):  # false for NaN too
        raise ValueError("an image tensor is in [-1, 1], got numbers outside it: scale 0..255 by x / 127.5 - 1, and 0..1 by 2 * x - 1")
    return Image.fromarray(to_frames(tensor[:, None])[0])


def _natural(path: Path) -> list[tuple[int, str]]:
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", path.name)]

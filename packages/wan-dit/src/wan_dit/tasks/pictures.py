"""Pictures at the size of a video: stretched, cropped or on a white canvas, as each task of the official code does it."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from ..sizes import Size, keeps_shape


def as_tensor(picture: Image.Image) -> Tensor:
    """`[3, H, W]` float32 in [-1, 1] of an RGB picture."""
    pixels = torch.from_numpy(np.array(picture, dtype=np.uint8)).permute(2, 0, 1)
    return pixels.float().div(255).sub(0.5).div(0.5)


def stretched(picture: Tensor, size: Size) -> Tensor:
    """`[3, H, W]` at `size` by bicubic interpolation without antialiasing, whatever the shape (official `image2video.py`)."""
    return F.interpolate(picture[None], size=size[::-1], mode="bicubic")[0]


def covered(picture: Image.Image, size: Size, resample: Any = Image.Resampling.LANCZOS) -> Image.Image:
    """A picture that fills `size`: resized to cover it, and its middle cropped (official `textimage2video.py`)."""
    scale = max(size[0] / picture.width, size[1] / picture.height)
    resized = picture.resize((round(picture.width * scale), round(picture.height * scale)), resample)
    left, top = (resized.width - size[0]) // 2, (resized.height - size[1]) // 2
    return resized.crop((left, top, left + size[0], top + size[1]))


def fitted(picture: Tensor, size: Size, multiple: Size) -> Tensor:
    """`stretched` where that changes the shape by no more than a token a side, else cropped to the shape first."""
    high, wide = picture.shape[1:]
    if not keeps_shape((wide, high), size, multiple):
        scale = min(wide / size[0], high / size[1])
        wide, high = max(1, round(size[0] * scale)), max(1, round(size[1] * scale))
        top, left = (picture.shape[1] - high) // 2, (picture.shape[2] - wide) // 2
        picture = picture[:, top : top + high, left : left + wide]
    return stretched(picture, size)


def on_white(picture: Image.Image, size: Size) -> Tensor:
    """`[3, H, W]` at `size`: the whole picture, bilinear, in the middle of a white canvas (official `vace.py`)."""
    tensor = as_tensor(picture)
    high, wide = tensor.shape[1:]
    if (wide, high) == size:
        return tensor
    scale = min(size[1] / high, size[0] / wide)
    inner = F.interpolate(tensor[None], size=(max(1, int(high * scale)), max(1, int(wide * scale))), mode="bilinear")[0]
    top, left = (size[1] - inner.shape[1]) // 2, (size[0] - inner.shape[2]) // 2
    canvas = torch.ones(3, size[1], size[0])
    canvas[:, top : top + inner.shape[1], left : left + inner.shape[2]] = inner
    return canvas


def like_official_last(last: Tensor, first: Size) -> Tensor:
    """What the official FLF2V makes of a last picture of another size than the first: not resized, but cropped and padded.

    It was meant to be resized to cover the first and cropped; what is called is the crop alone, to the size after resizing, with
    width and height exchanged.
    """
    high, wide = last.shape[1:]
    scale = max(first[0] / wide, first[1] / high)
    crop_high, crop_wide = round(wide * scale), round(high * scale)
    more_wide, more_high = max(0, crop_wide - wide), max(0, crop_high - high)
    padded = F.pad(last, (more_wide // 2, more_wide - more_wide // 2, more_high // 2, more_high - more_high // 2))
    top, left = round((padded.shape[1] - crop_high) / 2), round((padded.shape[2] - crop_wide) / 2)
    return padded[:, top : top + crop_high, left : left + crop_wide]

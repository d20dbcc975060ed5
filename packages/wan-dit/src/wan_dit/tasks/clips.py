"""Videos and masks that a task is given, from files or as tensors, at the rate, length and size of what is made."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from ..inputs import PathLike, probe_video, read_mask, read_video
from ..sizes import Size

ClipSource = PathLike | Tensor


@dataclass(frozen=True)
class Extent:
    """Size (width, height) of a clip, and its number of frames at the rate that was asked for."""

    size: Size
    frames: int


def extent(source: ClipSource, fps: float, what: str = "video") -> Extent:
    """Size and length of a video or a mask; the frames of a tensor are taken one by one, whatever the rate."""
    if isinstance(source, Tensor):
        clip = _checked(source, what)
        return Extent((clip.shape[3], clip.shape[2]), clip.shape[1])
    return Extent(*probe_video(source, fps, what=what))


def read_clip(source: ClipSource, fps: float, size: Size | None = None, *, frames: int | None = None, last: int | None = None) -> Tensor:
    """`[3, T, H, W]` in [-1, 1]: the first `frames` frames or the `last` ones, filling `size` where one is given."""
    if not isinstance(source, Tensor):
        return read_video(source, fps=fps, frames=frames, last=last, size=size)
    video = _cut(_checked(source, "video"), "video", frames, last)
    return video if size is None else _cover(video, size, mode="bicubic", antialias=True).clamp(-1, 1)


def read_mask_clip(source: ClipSource, fps: float, size: Size, frames: int) -> Tensor:
    """`[1, T, H, W]` in 0..1 at `size`; a mask of one frame is repeated."""
    if not isinstance(source, Tensor):
        return read_mask(source, fps=fps, frames=frames, size=size)
    mask = _checked(source, "mask")
    return _cover(_cut(mask.expand(-1, frames if mask.shape[1] == 1 else -1, -1, -1), "mask", frames, None), size, mode="nearest-exact")


def _checked(tensor: Tensor, what: str) -> Tensor:
    channels, low, span = (3, -1.001, "[-1, 1]") if what == "video" else (1, -0.001, "0..1")
    if tensor.ndim != 4 or tensor.shape[0] != channels or 0 in tensor.shape or not tensor.is_floating_point():
        got = f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"
        raise ValueError(f"a {what} is a file, a folder of frames or a floating-point tensor [{channels}, T, H, W] in {span}, got {got}")
    if not bool(((tensor >= low) & (tensor <= 1.001)).all()):
        raise ValueError(f"a {what} tensor is in {span}, got numbers outside it")
    return tensor.detach().float().cpu()


def _cut(clip: Tensor, what: str, frames: int | None, last: int | None) -> Tensor:
    if clip.shape[1] < (needed := frames or last or 1):
        raise ValueError(f"the {what} has {clip.shape[1]} frames, {needed} are needed: give a longer {what}, or ask for fewer frames")
    return clip[:, :frames] if last is None else clip[:, -last:]


def _cover(clip: Tensor, size: Size, **how: Any) -> Tensor:
    """Resized to cover `size`, and the middle of it."""
    high, wide = clip.shape[2:]
    if (wide, high) == size:
        return clip
    scale = max(size[0] / wide, size[1] / high)
    resized = F.interpolate(clip.transpose(0, 1), size=(round(high * scale), round(wide * scale)), **how).transpose(0, 1)
    top, left = (resized.shape[2] - size[1]) // 2, (resized.shape[3] - size[0]) // 2
    return resized[:, :, top : top + size[1], left : left + size[0]]

"""Frames as arrays, and the tensors that a VAE takes: 8 bit as uint8, deeper pictures as uint16 over the full 0..65535."""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
from av.video.reformatter import ColorRange, Colorspace, VideoReformatter
from numpy.typing import NDArray

if TYPE_CHECKING:
    from torch import Tensor

Frame = NDArray[np.uint8] | NDArray[np.uint16]
PathLike = str | os.PathLike[str]
Depth = Literal[8, 16]
FORMATS: dict[int, str] = {8: "rgb24", 16: "rgb48le"}
HD_LINES = 720  # files that do not say are BT.601 below this height and BT.709 from it on
UNSPECIFIED = 2  # AVCOL_SPC_UNSPECIFIED, and the same for primaries and transfer function
BT709 = 1  # the code of BT.709 as matrix, primaries and transfer function


class TimedFrame(NamedTuple):
    """A frame `[H, W, 3]` RGB and when it is shown: `pts` counts the `time_base` of its film."""

    pixels: Frame
    pts: int


def rotation_of(frame: Any) -> int:
    """Degrees counter-clockwise that turn the stored picture upright: 0, 90, 180 or 270."""
    return round(frame.rotation / 90) % 4 * 90


def to_rgb(frame: Any, reformatter: VideoReformatter, depth: Depth = 8) -> Frame:
    """A decoded frame as upright RGB of 8 or 16 bits, by the matrix and range that it is tagged with."""
    matrix = None
    if frame.colorspace == UNSPECIFIED:
        matrix = Colorspace.ITU709 if frame.height >= HD_LINES else Colorspace.ITU601
    picture = reformatter.reformat(frame, format=FORMATS[depth], src_colorspace=matrix, dst_color_range=ColorRange.JPEG).to_ndarray()
    upright: Any = np.ascontiguousarray(np.rot90(picture, rotation_of(frame) // 90))
    return upright  # type: ignore[no-any-return]


def to_tensor(frames: Iterable[Frame]) -> Tensor:
    """Frames `[H, W, 3]` (or one array `[T, H, W, 3]`), uint8 or uint16, to a float32 video `[1, 3, T, H, W]` in [-1, 1]."""
    import torch

    pixels: Any = np.stack(list(frames))
    middle = np.iinfo(pixels.dtype).max / 2
    video = torch.from_numpy(pixels.astype(np.float32) if pixels.dtype == np.uint16 else pixels)
    return video.permute(3, 0, 1, 2)[None].float().div_(middle).sub_(1.0)


def to_frames(video: Tensor, depth: Depth = 8) -> Frame:
    """A video `[1, 3, T, H, W]` in [-1, 1] to frames `[T, H, W, 3]`, rounded to the nearest level: uint8, or uint16 for depth 16."""
    if video.ndim != 5 or video.shape[:2] != (1, 3):
        raise ValueError(f"expected one video [1, 3, T, H, W], got {list(video.shape)}")
    levels: Any = _levels(video, depth).cpu().numpy()
    return levels.view(np.uint8 if depth == 8 else np.uint16)  # type: ignore[no-any-return]


def _levels(video: Tensor, depth: Depth) -> Tensor:
    """The frames as uint8, or as int16 with the bits of uint16, which not every device has; where the video is."""
    import torch

    top = 2**depth - 1
    levels = video[0].float().add(1.0).mul_(top / 2).round_().clamp_(0, top)
    levels = levels.to(torch.uint8) if depth == 8 else levels.to(torch.int32).to(torch.int16)
    return levels.permute(1, 2, 3, 0).contiguous()

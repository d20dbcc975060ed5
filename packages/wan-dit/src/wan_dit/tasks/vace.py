"""VACE: creation and editing by frames, masks and reference images (Jiang et al., arXiv 2503.07598; official `vace.py`).

Control (depth, pose, scribble, layout, grey): the frames of the control as `video`, no mask. Inpainting: a video and a mask.
Outpainting: a video and `outpaint=True`. References: pictures of what is to appear. First and last frame: `ImageToVideo`. More of
a video: `Continuation`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..contracts import Conditioning
from ..inputs import PictureSource, read_image
from ..sizes import Size, area_size, keeps_shape
from .clips import ClipSource, Extent, extent, read_clip, read_mask_clip
from .conditioning import vace_context
from .pictures import on_white
from .task import Encoders, Prepared, Target, refuse

ROUNDED = (2, 2)  # pixels a side that a mask of another size than its video may be off


@dataclass(frozen=True, eq=False)
class Vace:
    """Frames to follow or to edit, and pictures of what is to appear; all of it optional.

    video: a file, a folder of frames, or a tensor `[3, T, H, W]` in [-1, 1]
    mask: in the shape of the video, or one picture for all frames; white (1) is made anew, black (0) stays; None makes all anew
    references: pictures, each shown whole on a white canvas
    scale: strength of the hints, one number or one a VACE block
    outpaint: the video is shown whole in the middle, and what is around it is made anew; else it is cropped to the size
    """

    video: ClipSource | None = None
    mask: ClipSource | None = None
    references: tuple[PictureSource, ...] = ()
    scale: float | tuple[float, ...] = 1.0
    outpaint: bool = False
    name = "vace"

    def check(self, target: Target) -> None:
        if target.scheme != "vace":
            raise refuse(target, "mask, reference image or video to edit")
        if self.video is None and (self.mask is not None or self.outpaint):
            raise ValueError(f"{'a mask' if self.mask is not None else 'outpainting'} needs the video that it is for (--video)")
        if self.mask is not None and self.outpaint:
            raise ValueError("give a mask or outpaint, not both: outpainting makes its own mask")
        if not all(math.isfinite(scale) for scale in (self.scale if isinstance(self.scale, tuple) else (self.scale,))):
            raise ValueError(f"the scale of VACE must be a number such as 1, got {self.scale}")
        for picture in self.references:
            read_image(picture)
        if self.video is not None:
            self._check_clips(target, extent(self.video, target.model.fps))

    def size(self, target: Target) -> Size | None:
        if self.video is None or self.outpaint:
            return None
        _, high, wide = target.backbone.stride
        return area_size(extent(self.video, target.model.fps).size, target.size[0] * target.size[1], target.multiple, (wide, high))

    def frames(self, target: Target) -> int | None:
        if self.video is None:
            return None
        count, time = extent(self.video, target.model.fps).frames, target.backbone.stride[0]
        return min(target.frames, 1 + (count - 1) // time * time)

    def prepare(self, target: Target, encoders: Encoders) -> Prepared:
        frames, mask = self._frames(target)
        references = [on_white(read_image(picture), target.size) for picture in self.references]
        context = vace_context(frames, mask, references, target.backbone.stride, encoders.video)
        return Prepared(Conditioning(vace=context, vace_scale=self.scale), front=len(references))

    def _check_clips(self, target: Target, video: Extent) -> None:
        clips = {"video": video} if self.mask is None else {"video": video, "mask": extent(self.mask, target.model.fps, "mask")}
        for what, clip in clips.items():
            if clip.frames < target.frames and (what, clip.frames) != ("mask", 1):
                found = f"the {what} has {clip.frames} frames at {target.model.fps} a second, {target.frames} are needed"
                raise ValueError(f"{found}: give a longer {what}, or ask for fewer frames")
            if not (keeps_shape(clip.size, video.size, ROUNDED) or keeps_shape(video.size, clip.size, ROUNDED)):
                sizes = "the mask is {}x{}, the video {}x{}".format(*clip.size, *video.size)
                raise ValueError(f"{sizes}: give a mask in the shape of the video, of any size")

    def _frames(self, target: Target) -> tuple[Tensor, Tensor]:
        """Frames `[3, T, H, W]` and mask `[1, T, H, W]` at the size of the target."""
        count, (wide, high), fps = target.frames, target.size, target.model.fps
        if self.video is None:
            frames = torch.zeros(3, count, high, wide)
            return frames, torch.ones_like(frames[:1])
        if self.outpaint:
            inner = _within(extent(self.video, fps).size, target.size)
            return _in_the_middle(read_clip(self.video, fps, inner, frames=count), target.size)
        frames = read_clip(self.video, fps, target.size, frames=count)
        if self.mask is None:
            return frames, torch.ones_like(frames[:1])
        return frames, read_mask_clip(self.mask, fps, target.size, count)

    def inputs(self) -> dict[str, Any]:
        return {"video": self.video, "mask": self.mask} | {f"reference_{i}": picture for i, picture in enumerate(self.references)}

    def settings(self) -> dict[str, Any]:
        return {"scale": self.scale, "outpaint": self.outpaint}


def _within(picture: Size, size: Size) -> Size:
    """The largest size of a picture's shape that is not beyond `size`."""
    scale = min(size[0] / picture[0], size[1] / picture[1])
    return max(1, int(picture[0] * scale)), max(1, int(picture[1] * scale))


def _in_the_middle(video: Tensor, size: Size) -> tuple[Tensor, Tensor]:
    """A video in the middle of `size` on grey (0), and the mask of what is around it."""
    high, wide = video.shape[2:]
    top, left = (size[1] - high) // 2, (size[0] - wide) // 2
    frames, mask = torch.zeros(3, video.shape[1], size[1], size[0]), torch.ones(1, video.shape[1], size[1], size[0])
    frames[:, :, top : top + high, left : left + wide] = video
    mask[:, :, top : top + high, left : left + wide] = 0
    return frames, mask

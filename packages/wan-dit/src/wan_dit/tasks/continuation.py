"""More of a video: its last frames are the first of the new one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from ..sizes import Size, area_size, best_output_size
from .clips import ClipSource, extent, read_clip
from .conditioning import condition
from .task import Encoders, Prepared, Target, refuse


@dataclass(frozen=True, eq=False)
class Continuation:
    """The frames that follow a video, by a model that takes known frames: I2V, TI2V or VACE.

    video: a file, a folder of frames, or a tensor `[3, T, H, W]` in [-1, 1]
    overlap: how many of its last frames the model is given, 1 + a multiple of 4; they are also the first of the result
    """

    video: ClipSource
    overlap: int = 5
    name = "continuation"

    def check(self, target: Target) -> None:
        if target.scheme == "text":
            raise refuse(target, "video to continue")
        time = target.backbone.stride[0]
        if self.overlap < 1 or (self.overlap - 1) % time:
            nearest = 1 + max(0, round((self.overlap - 1) / time)) * time
            raise ValueError(f"overlap must be 1 + a multiple of {time}, got {self.overlap}; nearest: {nearest}")
        if self.overlap >= target.frames:
            raise ValueError(f"overlap is {self.overlap} of {target.frames} frames, which leaves nothing to make: ask for more frames")
        if (count := extent(self.video, target.model.fps).frames) < self.overlap:
            found = f"the video has {count} frames at {target.model.fps} a second"
            raise ValueError(f"{found}, {self.overlap} are needed: give a longer video, or a smaller overlap")

    def size(self, target: Target) -> Size:
        picture, area = extent(self.video, target.model.fps).size, target.size[0] * target.size[1]
        if target.scheme == "first_frame":
            return best_output_size(picture, area, target.multiple)
        _, high, wide = target.backbone.stride
        return area_size(picture, area, target.multiple, (wide, high))

    def frames(self, target: Target) -> int | None:
        return None

    def prepare(self, target: Target, encoders: Encoders) -> Prepared:
        clip = read_clip(self.video, target.model.fps, target.size, last=self.overlap)
        if target.scheme == "first_frame":
            return Prepared(known=encoders.video(clip))
        frames, known = torch.zeros(3, target.frames, *clip.shape[2:]), torch.arange(target.frames) < self.overlap
        frames[:, : self.overlap] = clip
        return condition(frames, known, [clip[:, 0]], target, encoders)

    def inputs(self) -> dict[str, Any]:
        return {"video": self.video}

    def settings(self) -> dict[str, Any]:
        return {"overlap": self.overlap}

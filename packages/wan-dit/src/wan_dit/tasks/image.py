"""From text alone, and from a first picture (and a last one) with text."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from ..contracts import Conditioning
from ..inputs import PictureSource, read_image
from ..sizes import Size, area_size, best_output_size
from .conditioning import condition, vace_context
from .pictures import as_tensor, covered, fitted, like_official_last, stretched
from .task import Compat, Encoders, Prepared, Target, refuse

OFFICIAL_FRAMES = 81  # for which the official FLF2V makes its mask, whatever the number of frames is


@dataclass(frozen=True)
class TextToVideo:
    """A video, or with one frame an image, from text alone."""

    name = "t2v"

    def check(self, target: Target) -> None:
        if target.scheme == "channels":
            raise refuse(target, "text alone")

    def size(self, target: Target) -> Size | None:
        return None

    def frames(self, target: Target) -> int | None:
        return None

    def prepare(self, target: Target, encoders: Encoders) -> Prepared:
        if target.scheme != "vace":
            return Prepared()
        blank = torch.zeros(3, target.frames, target.size[1], target.size[0])
        return Prepared(Conditioning(vace=vace_context(blank, torch.ones_like(blank[:1]), (), target.backbone.stride, encoders.video)))

    def inputs(self) -> dict[str, Any]:
        return {}

    def settings(self) -> dict[str, Any]:
        return {}


@dataclass(frozen=True, eq=False)
class ImageToVideo:
    """A video that begins with a picture, and ends with another where one is given.

    image, last_image: files, PIL images, or tensors `[3, H, W]` in [-1, 1]
    """

    image: PictureSource
    last_image: PictureSource | None = None

    @property
    def name(self) -> str:
        return "i2v" if self.last_image is None else "flf2v"

    def check(self, target: Target) -> None:
        scheme, backbone = target.scheme, target.backbone
        if scheme == "text":
            raise refuse(target, "image")
        for picture in (self.image, self.last_image):
            if picture is not None:
                read_image(picture)
        two = (getattr(backbone, "image_tokens", None) or 0) > 500
        if self.last_image is None:
            if two:
                raise ValueError(f"model '{target.model.name}' needs a last image too (--last-image; in Python ImageToVideo(first, last))")
            return
        if scheme == "first_frame" or (backbone.image_dim is not None and not two):
            raise ValueError(f"model '{target.model.name}' takes a first image alone; a last one is for FLF2V, VACE and Wan2.2 I2V models")
        if target.frames < 2:
            raise ValueError(f"a first and a last image need 5 frames or more, got {target.frames}")
        if target.compat == "official" and target.frames != OFFICIAL_FRAMES:
            raise ValueError(
                f"the official code takes a last image at {OFFICIAL_FRAMES} frames only, got {target.frames}: use compat 'fixed'"
            )

    def size(self, target: Target) -> Size:
        width, height = target.size
        picture = read_image(self.image).size
        if target.scheme == "first_frame":
            return best_output_size(picture, width * height, target.multiple)
        _, high, wide = target.backbone.stride
        return area_size(picture, width * height, target.multiple, (wide, high))

    def frames(self, target: Target) -> int | None:
        return None

    def prepare(self, target: Target, encoders: Encoders) -> Prepared:
        first = read_image(self.image)
        if target.scheme == "first_frame":
            return Prepared(known=encoders.video(as_tensor(covered(first, target.size))[:, None]))
        pictures = [as_tensor(first)]
        if self.last_image is not None:
            pictures.append(_in_shape_of(first.size, read_image(self.last_image), target.compat))
        frames, known = torch.zeros(3, target.frames, target.size[1], target.size[0]), torch.zeros(target.frames, dtype=torch.bool)
        for i, picture in zip((0, -1), pictures, strict=False):
            official = target.compat == "official"
            frames[:, i] = stretched(picture, target.size) if official else fitted(picture, target.size, target.multiple)
            known[i] = True
        return condition(frames, known, pictures, target, encoders)

    def inputs(self) -> dict[str, Any]:
        return {"image": self.image, "last_image": self.last_image}

    def settings(self) -> dict[str, Any]:
        return {}


def _in_shape_of(first: Size, last: Image.Image, compat: Compat) -> Tensor:
    """The last picture in the shape of the first, whose size is given."""
    if last.size == first:
        return as_tensor(last)
    return like_official_last(as_tensor(last), first) if compat == "official" else as_tensor(covered(last, first))

"""A few small pictures of a video and its reconstruction, kept while they stream by."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .video import Frame

PICTURES = 4  # at most, of a video
WIDTH, HEIGHT = 240, 320  # pixels that a picture which is kept fits into; smaller ones are enlarged by a whole number
AMPLIFY = 8  # times the difference, to be seen


@dataclass(frozen=True)
class Sample:
    """Frame `index`: uint8 pictures `[h, w, 3]` of the original, the reconstruction and 8 times their absolute difference."""

    index: int
    original: Frame
    reconstruction: Frame
    difference: Frame


class Samples:
    """The first frame, the last, and others evenly between, of a video whose length is not known before it ends."""

    def __init__(self) -> None:
        self._kept: list[Sample] = []
        self._last: tuple[int, Tensor, Tensor] | None = None
        self._step, self._count = 1, 0

    def add(self, a: Tensor, b: Tensor) -> None:
        """Take in the next frames of the original `a` and the reconstruction `b`, `[1, 3, n, H, W]` in [-1, 1]."""
        for index, (x, y) in enumerate(zip(a[0].unbind(1), b[0].unbind(1), strict=True), self._count):
            if index % self._step == 0:
                self._kept.append(_sample(index, x, y))
            if len(self._kept) > 2 * PICTURES:
                self._step *= 2
                self._kept = [sample for sample in self._kept if sample.index % self._step == 0]
        self._count += a.shape[2]
        self._last = self._count - 1, a[0, :, -1], b[0, :, -1]

    def pictures(self) -> list[Sample]:
        """At most four samples in order."""
        if not self._last:
            return []
        kept = self._kept if self._kept[-1].index == self._last[0] else [*self._kept, _sample(*self._last)]
        if len(kept) <= PICTURES:
            return kept
        return [kept[round(i * (len(kept) - 1) / (PICTURES - 1))] for i in range(PICTURES)]


def _sample(index: int, x: Tensor, y: Tensor) -> Sample:
    difference = (x.float() - y.float()).abs() * AMPLIFY - 1
    return Sample(index, *(_small(picture) for picture in (x, y, difference)))


def _small(picture: Tensor) -> Frame:
    """`[3, H, W]` in [-1, 1] to uint8 `[h, w, 3]`, scaled down, or enlarged by a whole number, to fit `WIDTH` and `HEIGHT`."""
    height, width = picture.shape[-2:]
    scale = min(WIDTH / width, HEIGHT / height)
    pixels = picture.float().cpu()[None]
    if scale < 1:
        pixels = F.interpolate(pixels, (max(1, round(height * scale)), max(1, round(width * scale))), mode="area")
    elif scale >= 2:
        pixels = F.interpolate(pixels, scale_factor=float(int(scale)), mode="nearest")
    levels = ((pixels[0] + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
    frame: Frame = levels.permute(1, 2, 0).contiguous().numpy()
    return frame

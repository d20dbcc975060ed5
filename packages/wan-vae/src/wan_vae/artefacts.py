"""What video codecs get wrong over time and at borders: a first frame unlike the rest, seams between groups and tiles, flicker.

All from the error `e = reconstruction - original` in 8-bit levels (a video in [-1, 1] spans 255), frame by frame. Unlike PSNR
they tell how an error moves: a constant error flickers by 0.
"""

from __future__ import annotations

from array import array
from statistics import median

import torch
import torch.nn.functional as F
from torch import Tensor

from .metrics import decibels

LEVELS = 127.5  # 8-bit levels per unit of a video in [-1, 1]
BLOCK = 8  # pixels: means over blocks show a jump of brightness that grain would hide
STATIC = 1.0  # levels: a pixel of the original that changes by no more stands still

ArtefactResult = dict[str, float | None]


class ArtefactMeter:
    """Measures a video that comes in pieces; it keeps one frame, and four numbers a frame.

    group: frames that the codec makes at a time after the first, its temporal stride: seams are looked for where frames
        1 + k * group begin (k >= 1; where frame 1 follows frame 0 is the first-frame check's)
    tile: height and width of the tiles that the codec works in, whose borders are compared with the rest

    Example: `meter.add(original, reconstruction)` for every piece `[1, 3, n, H, W]` in [-1, 1], then `meter.result()`.
    """

    def __init__(self, *, group: int, tile: tuple[int, int] | None = None) -> None:
        if group < 1 or (tile and min(tile) < 2):
            raise ValueError(f"expected a group of at least 1 frame and tiles of at least 2x2 pixels, got {group} and {tile}")
        self.group, self.tile = group, tile
        self._errors, self._colours = array("d"), array("d")
        self._means: dict[str, _Mean] = {}
        self._last: tuple[Tensor, Tensor] | None = None

    def add(self, a: Tensor, b: Tensor) -> None:
        """Take in the next frames of the original `a` and its reconstruction `b`."""
        if a.shape != b.shape or a.ndim != 5 or a.shape[:2] != (1, 3) or not a.numel():
            raise ValueError(f"expected two videos of one shape [1, 3, T, H, W], got {list(a.shape)} and {list(b.shape)}")
        for original, reconstruction in zip(a[0].float().unbind(1), b[0].float().unbind(1), strict=True):
            self._add_frame(LEVELS * original, LEVELS * (reconstruction - original))

    def result(self) -> ArtefactResult:
        """The checks; None is what the clip has no frames, still pixels or tiles for.

        first_frame: dB, PSNR of frame 0 less the median PSNR of the others; 0 is good, negative a worse first frame
        first_frame_colour: levels, mean error of frame 0 less the median of the others', of the channel where they differ most
        seam: levels, mean absolute change of the error, averaged over blocks of 8x8 pixels, from the last frame of a group to
            the first of the next, less the same inside groups; 0 is good
        flicker: levels, mean absolute change of the error of a pixel from frame to frame
        flicker_static: the same of the pixels that stand still in the original, changing by at most 1 level a channel
        tile_step: levels, mean absolute step of the error across tile borders, less that between other neighbouring pixels
        tile_error: levels, mean absolute error of the pixels at tile borders less that of the others
        """
        if not self._errors:
            raise ValueError("no frame was measured")
        found = {key: mean.value() for key, mean in self._means.items()}
        return {
            "first_frame": self._first_frame(),
            "first_frame_colour": self._first_colour(),
            "seam": _less(found.get("seam"), found.get("inside")),
            "flicker": found.get("flicker"),
            "flicker_static": found.get("static"),
            "tile_step": _less(found.get("border step"), found.get("other step")),
            "tile_error": _less(found.get("border error"), found.get("other error")),
        }

    def _add_frame(self, original: Tensor, error: Tensor) -> None:
        index = len(self._errors)
        self._errors.append(float(error.square().mean()))
        self._colours.extend(error.mean(dim=(1, 2)).tolist())
        if self._last:
            last_original, last_error = self._last
            change = (error - last_error).abs()
            self._mean("flicker", change)
            self._mean("static", change[:, (original - last_original).abs().amax(0) <= STATIC])
            if index > 1:
                blocks = F.avg_pool2d(error - last_error, BLOCK, ceil_mode=True, count_include_pad=False)
                self._mean("seam" if (index - 1) % self.group == 0 else "inside", blocks.abs())
        if self.tile:
            self._add_borders(error, -2, self.tile[0])
            self._add_borders(error, -1, self.tile[1])
        self._last = original, error

    def _add_borders(self, error: Tensor, axis: int, tile: int) -> None:
        size = error.shape[axis]
        borders = torch.arange(size, device=error.device)[tile::tile]
        if not len(borders):
            return
        steps = error.diff(dim=axis).abs()  # step i is between pixels i and i + 1
        at_border = torch.zeros(size - 1, dtype=torch.bool, device=error.device)
        at_border[borders - 1] = True
        touching = torch.zeros(size, dtype=torch.bool, device=error.device)
        touching[borders] = touching[borders - 1] = True
        for name, values, chosen in (("step", steps, at_border), ("error", error.abs(), touching)):
            self._mean(f"border {name}", values.index_select(axis, chosen.nonzero()[:, 0]))
            self._mean(f"other {name}", values.index_select(axis, (~chosen).nonzero()[:, 0]))

    def _mean(self, key: str, values: Tensor) -> None:
        self._means.setdefault(key, _Mean()).add(values)

    def _first_frame(self) -> float | None:
        if len(self._errors) < 2:
            return None
        first, *others = (decibels(error, 2 * LEVELS) for error in self._errors)
        typical = median(others)
        return 0.0 if first == typical else first - typical  # equal also where both are infinite

    def _first_colour(self) -> float | None:
        if len(self._errors) < 2:
            return None
        shifts = [self._colours[c] - median(self._colours[3 + c :: 3]) for c in range(3)]
        return max(shifts, key=abs)


class _Mean:
    """A running mean of tensors; None of nothing."""

    def __init__(self) -> None:
        self.total, self.count = 0.0, 0

    def add(self, values: Tensor) -> None:
        if values.numel():
            self.total += float(values.mean()) * values.numel()
            self.count += values.numel()

    def value(self) -> float | None:
        return self.total / self.count if self.count else None


def _less(a: float | None, b: float | None) -> float | None:
    return None if a is None or b is None else a - b

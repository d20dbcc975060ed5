"""3x3x3 and 3x3 convolutions by Winograd's minimal filtering: a quarter to a sixth of the multiplications, on a CPU in fp32.

In space F(4x4, 3x3): 16 outputs of a tile cost 36 products instead of 144, and 25 where the picture is doubled by the nearest
neighbour first, since one combination of repeated rows is zero. In time F(2, 3): two frames cost 4 products instead of 6.
Lavin and Gray, "Fast Algorithms for Convolutional Neural Networks" (2015), with the points 0, 1, -1, 2, -2.
No gradients.

Shapes: T frames, H height, W width, C channels in, O channels out, n combinations along an axis (6, doubled 5), P = n * n
products of a tile, h and w rows and columns of tiles, N = h * w tiles of a band.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from math import isqrt

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .transformed_filters import BUDGET, TransformedFilters

TILE = 4
BAND = 200  # tiles at a time: what a transform writes is still in the cache when it is multiplied
MIN_CHANNELS = 64  # with fewer, the transforms cost more than the products save


class Winograd:
    """Runs convolutions by transformed filters, of which it keeps what `budget` bytes hold.

    min_channels: layers with fewer channels, in or out, are left to others
    Example: `Winograd().convolve(layer, frames)`
    """

    def __init__(self, budget: int = BUDGET, min_channels: int = MIN_CHANNELS) -> None:
        self.filters, self.min_channels = TransformedFilters(budget), min_channels

    def __reduce__(self) -> tuple[type[Winograd], tuple[int, int]]:
        """A copy, or what is unpickled, starts without filters: they belong to the layers they were made of."""
        return Winograd, (self.filters.budget, self.min_channels)

    def takes(self, layer: nn.Conv2d | nn.Conv3d) -> bool:
        """Whether this layer has the shape for it."""
        wide = min(layer.in_channels, layer.out_channels) >= self.min_channels
        return wide and layer.kernel_size[-2:] == (3, 3) and layer.kernel_size[:-2] in ((), (3,)) and set(layer.stride) == {1}

    def convolve(self, layer: nn.Conv2d | nn.Conv3d, frames: Sequence[Tensor], rows: int = 1, *, doubled: bool = False) -> Tensor | None:
        """`frames` (T of them, `[H, W, C]`, with the history in front) to `[T', H', W', O]`; None where the budget is spent.

        T' is T for a 2D layer and T - 2 for a 3D one, or 1 for a single frame, whose taps in the past meet zeros.
        rows: 1 pads height with zeros as width is padded, 0 takes the first and the last row as padding that is there
        doubled: the frames are to be doubled in height and width by the nearest neighbour first; for 2D layers
        """
        form = DOUBLED if doubled else PLAIN
        new = len(frames) - 2 if layer.weight.ndim == 5 and len(frames) > 1 else len(frames)
        variant = "doubled" if doubled else "last" if len(frames) == new else "pairs" if new % 2 == 0 else "taps"
        height, width = ((size * TILE) // form.step for size in frames[0].shape[:2])
        height -= 2 * (1 - rows)
        filters_TPCO = self.filters.of(layer, variant, new * height * width)
        if filters_TPCO is None:
            return None
        h, w = -(-height // TILE), -(-width // TILE)
        y_ThrwrO = frames[0].new_empty(new, h, TILE, w, TILE, layer.out_channels)
        band = max(1, round(BAND / w))
        wide_nhWC = frames[0].new_zeros(form.combinations, min(band, h), form.step * w + 2, layer.in_channels)
        for top in range(0, h, band):
            bottom = min(h, top + band)
            transformed = (_transform(frame, top, bottom, rows, wide_nhWC[:, : bottom - top], form) for frame in frames)
            for t, m_PNO in enumerate(_MULTIPLY[variant](transformed, filters_TPCO, layer.bias)):
                _untransform(m_PNO, y_ThrwrO[t, top:bottom], form)
        return y_ThrwrO.view(new, TILE * h, TILE * w, -1)[:, :height, :width]


def _one_by_one(v: Iterator[Tensor], filters_TPCO: Tensor, bias: Tensor | None) -> Iterator[Tensor]:
    for v_PNC in v:
        yield _biased(torch.bmm(v_PNC, filters_TPCO[0]), bias)


def _by_taps(v: Iterator[Tensor], filters_TPCO: Tensor, bias: Tensor | None) -> Iterator[Tensor]:
    before, last = next(v), next(v)
    for v_PNC in v:
        m_PNO = torch.bmm(before, filters_TPCO[0])
        torch.baddbmm(m_PNO, last, filters_TPCO[1], out=m_PNO)
        yield _biased(torch.baddbmm(m_PNO, v_PNC, filters_TPCO[2], out=m_PNO), bias)
        before, last = last, v_PNC


def _by_pairs(v: Iterator[Tensor], filters_TPCO: Tensor, bias: Tensor | None) -> Iterator[Tensor]:
    """F(2, 3) over four frames: m0 + m1 + m2 and m1 - m2 - m3. What is not needed again is overwritten."""
    v0, v1 = next(v), next(v)
    for v2, v3 in zip(v, v, strict=True):
        first_PNO = torch.bmm(torch.sub(v0, v2, out=v0), filters_TPCO[0])
        second_PNO = torch.bmm(torch.add(v1, v2, out=v0), filters_TPCO[1])
        m2_PNO = torch.bmm(torch.sub(v2, v1, out=v0), filters_TPCO[2])
        first_PNO.add_(second_PNO).add_(m2_PNO)
        second_PNO.sub_(m2_PNO)
        torch.baddbmm(second_PNO, torch.sub(v1, v3, out=v0), filters_TPCO[3], alpha=-1, out=second_PNO)
        yield _biased(first_PNO, bias)
        yield _biased(second_PNO, bias)
        v0, v1 = v2, v3


_MULTIPLY = {"last": _one_by_one, "doubled": _one_by_one, "taps": _by_taps, "pairs": _by_pairs}


def _biased(m_PNO: Tensor, bias: Tensor | None) -> Tensor:
    if bias is not None:
        m_PNO[isqrt(len(m_PNO)) + 1] += bias  # combination 1 along both axes: its weight is 1 in all 16 outputs
    return m_PNO


def _transform(frame_HWC: Tensor, top: int, bottom: int, rows: int, wide_nhWC: Tensor, form: Form) -> Tensor:
    """The combinations `[P, N, C]` of what the tiles from `top` to `bottom` look at; `wide`: zeros, whose border stays zero."""
    height, width = frame_HWC.shape[:2]
    first, last = form.step * top - rows, form.step * bottom - rows + 2
    inner = frame_HWC[max(0, first) : last]
    if first < 0 or last > height:
        inner = F.pad(inner, (0, 0, 0, 0, max(0, -first), max(0, last - height)))
    looks = range(form.step + 2)
    form.combine([inner[i : i + len(inner) - form.step - 1 : form.step] for i in looks], wide_nhWC[:, :, 1 : width + 1])
    n, h, padded, channels = wide_nhWC.shape
    v_nnhwC = frame_HWC.new_empty(n, n, h, (padded - 2) // form.step, channels)
    form.combine([wide_nhWC[:, :, i : i + padded - form.step - 1 : form.step] for i in looks], v_nnhwC.transpose(0, 1))
    return v_nnhwC.view(n * n, -1, channels)


def _untransform(m_PNO: Tensor, y_hrwrO: Tensor, form: Form) -> None:
    """The products of each tile to its 4x4 outputs."""
    h, _, w, _, channels = y_hrwrO.shape
    n = form.combinations
    rows_rnhwO = m_PNO.new_empty(TILE, n, h, w, channels)
    form.separate(m_PNO.view(n, n, h, w, channels), rows_rnhwO)
    form.separate(rows_rnhwO.transpose(0, 1), [y_hrwrO[:, :, :, i].transpose(0, 1) for i in range(TILE)])


def _combine(d: Sequence[Tensor], out: Tensor) -> None:
    """B^T d of F(4, 3): six inputs to six combinations."""
    c, e = torch.sub(d[4], d[2]), torch.sub(d[3], d[1])
    torch.add(c, torch.sub(d[0], d[2]), alpha=4, out=out[0])
    torch.add(torch.sub(d[5], d[3]), e, alpha=-4, out=out[5])
    torch.add(c, e, alpha=2, out=out[3])
    torch.add(c, e, alpha=-2, out=out[4])
    torch.add(d[4], d[2], alpha=-4, out=c)
    torch.add(d[3], d[1], alpha=-4, out=e)
    torch.add(c, e, out=out[1])
    torch.sub(c, e, out=out[2])


def _separate(m: Tensor, out: Tensor | Sequence[Tensor]) -> None:
    """A^T m of F(4, 3): six products to four outputs."""
    sum1, difference1, sum2, difference2 = m[1] + m[2], m[1] - m[2], m[3] + m[4], m[3] - m[4]
    torch.add(sum1, sum2, alpha=4, out=out[2])
    torch.add(difference1, difference2, alpha=2, out=out[1])
    torch.add(sum1.add_(sum2), m[0], out=out[0])
    torch.add(difference1.add_(difference2, alpha=8), m[5], out=out[3])


def _combine_doubled(d: Sequence[Tensor], out: Tensor) -> None:
    """Four inputs, each standing for two, to five combinations."""
    step = torch.sub(d[1], d[2], out=out[2])
    out[3] = step
    torch.add(step, torch.sub(d[0], d[1]), alpha=4, out=out[0])
    out[0].sub_(step, alpha=2)
    torch.add(torch.mul(d[2], 2), d[1], alpha=-8, out=out[1])
    torch.sub(d[3], d[2], out=out[4])
    out[4].add_(step, alpha=4)


def _separate_doubled(m: Tensor, out: Tensor | Sequence[Tensor]) -> None:
    """Five products to four outputs."""
    torch.add(m[0], m[1], out=out[0]).add_(m[2])
    torch.add(m[1], m[3], alpha=2, out=out[1])
    torch.add(m[1], m[2], alpha=4, out=out[2])
    torch.add(m[1], m[3], alpha=8, out=out[3]).add_(m[4])


@dataclass(frozen=True)
class Form:
    """How 4 outputs along an axis come of inputs.

    step: inputs from one tile to the next, of step + 2 that it looks at
    """

    step: int
    combinations: int
    combine: Callable[[Sequence[Tensor], Tensor], None]
    separate: Callable[[Tensor, Tensor | Sequence[Tensor]], None]


PLAIN = Form(TILE, 6, _combine, _separate)
DOUBLED = Form(TILE // 2, 5, _combine_doubled, _separate_doubled)

"""3x3x3 and 3x3 convolutions by Winograd's minimal filtering: a quarter to a sixth of the multiplications, on a CPU in fp32.

In space F(4x4, 3x3): 16 outputs of a tile cost 36 products instead of 144. In time F(2, 3): two frames cost 4 products
instead of 6. Lavin and Gray, "Fast Algorithms for Convolutional Neural Networks" (2015), with the points 0, 1, -1, 2, -2.
Filters are transformed in float64 and kept in float32. No gradients.

Shapes: T frames, H height, W width, C channels in, O channels out, P the 36 products of a tile, h and w rows and columns
of tiles, N = h * w tiles of a band.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from threading import Lock
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn

TILE = 4
BAND = 200  # tiles at a time: what a transform writes is still in the cache when it is multiplied
BUDGET = 1_000_000_000  # bytes of transformed filters kept at once
MIN_CHANNELS = 64  # with fewer, the transforms cost more than the products save

SPACE = torch.tensor(
    [[1 / 4, 0, 0], [-1 / 6, -1 / 6, -1 / 6], [-1 / 6, 1 / 6, -1 / 6], [1 / 24, 1 / 12, 1 / 6], [1 / 24, -1 / 12, 1 / 6], [0, 0, 1]],
    dtype=torch.float64,
)
TIME = torch.tensor([[1, 0, 0], [1 / 2, 1 / 2, 1 / 2], [1 / 2, -1 / 2, 1 / 2], [0, 0, 1]], dtype=torch.float64)
TAPS = {"taps": 3, "pairs": 4, "last": 1}
SAMPLE = 256  # numbers of a filter that tell whether it is still the one that was transformed
EVERYWHERE = 7  # the product whose weight is 1 in every output of a tile: a bias added there reaches all 16


@dataclass
class Kept:
    """The transformed filters of a layer, by variant, of which weights they are, and the pixels a chunk that they serve."""

    weights: Tensor
    pixels: int = 0
    variants: dict[str, Tensor] = field(default_factory=dict)

    @property
    def bytes(self) -> int:
        return sum(filters.nbytes for filters in self.variants.values())


class Winograd:
    """Runs convolutions, and keeps the transformed filters of as many layers as `budget` bytes hold.

    Layers of larger pictures come first, since a filter saves by the pixel and costs by its size.
    min_channels: layers with fewer channels, in or out, are left to others
    Example: `Winograd().convolve(layer, frames)`
    """

    def __init__(self, budget: int = BUDGET, min_channels: int = MIN_CHANNELS) -> None:
        self.budget, self.min_channels = budget, min_channels
        self._kept: WeakKeyDictionary[nn.Module, Kept] = WeakKeyDictionary()
        self._lock = Lock()

    def __reduce__(self) -> tuple[type[Winograd], tuple[int, int]]:
        """A copy, or what is unpickled, starts without filters: they belong to the layers they were made of."""
        return Winograd, (self.budget, self.min_channels)

    @property
    def bytes_kept(self) -> int:
        """Size of the transformed filters that are kept."""
        return sum(kept.bytes for kept in self._kept.values())

    def takes(self, layer: nn.Conv2d | nn.Conv3d) -> bool:
        """Whether this layer has the shape for it."""
        wide = min(layer.in_channels, layer.out_channels) >= self.min_channels
        return wide and layer.kernel_size[-2:] == (3, 3) and layer.kernel_size[:-2] in ((), (3,)) and set(layer.stride) == {1}

    def filters(self, layer: nn.Conv2d | nn.Conv3d, variant: str, pixels: int) -> Tensor | None:
        """Transformed filters `[taps, P, C, O]`; None where keeping them would pass the budget.

        variant: "taps" for each temporal tap, "pairs" for two frames at a time, "last" for the present frame alone
        pixels: of a chunk; filters that serve fewer make room
        """
        sample = _sample(layer.weight)
        with self._lock:
            kept = self._kept.get(layer)
            if kept is None or not torch.equal(kept.weights, sample):
                self._kept.pop(layer, None)
                kept = Kept(sample)
            if variant == "last":
                for whole in ("taps", "pairs"):
                    if whole in kept.variants:
                        return kept.variants[whole][-1:]
            if variant not in kept.variants:
                taps = 1 if layer.weight.ndim == 4 else TAPS[variant]
                if not self._make_room(4 * taps * 36 * layer.in_channels * layer.out_channels, pixels, layer):
                    return None
                if variant != "last":
                    kept.variants.pop("last", None)
                kept.variants[variant] = transform_filters(layer.weight.detach(), variant)
                self._kept[layer] = kept
            kept.pixels = max(kept.pixels, pixels)
            return kept.variants[variant]

    def drop(self, layers: Iterable[nn.Module]) -> None:
        """Forget the filters of these layers."""
        with self._lock:
            self._forget(layers)

    def _forget(self, layers: Iterable[nn.Module]) -> None:
        for layer in layers:
            self._kept.pop(layer, None)

    def _make_room(self, size: int, pixels: int, layer: nn.Module) -> bool:
        lesser = sorted((kept.pixels, i, other) for i, (other, kept) in enumerate(self._kept.items()) if kept.pixels < pixels)
        freed, room = [], self.budget - self.bytes_kept - size
        for _, _, other in lesser:
            if room >= 0:
                break
            if other is not layer:
                room += self._kept[other].bytes
                freed.append(other)
        if room >= 0:
            self._forget(freed)
        return room >= 0

    def convolve(self, layer: nn.Conv2d | nn.Conv3d, frames: Sequence[Tensor], rows: int = 1) -> Tensor | None:
        """`frames` (T of them, `[H, W, C]`, with the history in front) to `[T', H', W, O]`; None where the budget is spent.

        T' is T for a 2D layer and T - 2 for a 3D one, or 1 for a single frame, whose taps in the past meet zeros.
        rows: 1 pads height with zeros as width is padded, 0 takes the first and the last row as padding that is there
        """
        new = len(frames) - 2 if layer.weight.ndim == 5 and len(frames) > 1 else len(frames)
        variant = "last" if len(frames) == new else "pairs" if new % 2 == 0 else "taps"
        height, width = frames[0].shape[0] - 2 * (1 - rows), frames[0].shape[1]
        filters_TPCO = self.filters(layer, variant, new * height * width)
        if filters_TPCO is None:
            return None
        h, w = -(-height // TILE), -(-width // TILE)
        y_ThrwrO = frames[0].new_empty(new, h, TILE, w, TILE, layer.out_channels)
        band = max(1, round(BAND / w))
        for top in range(0, h, band):
            bottom = min(h, top + band)
            transformed = (_transform(_window(frame, top, bottom, w, rows), bottom - top, w) for frame in frames)
            for t, m_PNO in enumerate(_PRODUCTS[variant](transformed, filters_TPCO, layer.bias)):
                _untransform(m_PNO, y_ThrwrO[t, top:bottom])
        return y_ThrwrO.view(new, TILE * h, TILE * w, -1)[:, :height, :width]


def _sample(weight: Tensor) -> Tensor:
    """Numbers of `weight` from all over it: whatever way weights are changed or replaced, some of these change."""
    return weight.detach().flatten()[:: max(1, weight.numel() // SAMPLE)].clone()


def transform_filters(weight: Tensor, variant: str = "taps") -> Tensor:
    """Filters `[O, C, 3, 3]` or `[O, C, 3, 3, 3]` to `[taps, P, C, O]`: taps is 1, 3, or 4 for "pairs"."""
    weight = weight.double() if weight.ndim == 5 else weight.double().unsqueeze(2)
    if variant == "last":
        weight = weight[:, :, -1:]
    elif variant == "pairs":
        weight = torch.einsum("ut,octij->ocuij", TIME, weight)
    products = torch.einsum("ai,octij,bj->tabco", SPACE, weight, SPACE)
    return products.flatten(1, 2).float().contiguous()


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


_PRODUCTS = {"last": _one_by_one, "taps": _by_taps, "pairs": _by_pairs}


def _biased(m_PNO: Tensor, bias: Tensor | None) -> Tensor:
    if bias is not None:
        m_PNO[EVERYWHERE] += bias
    return m_PNO


def _window(frame_HWC: Tensor, top: int, bottom: int, w: int, rows: int) -> Tensor:
    """The rows that the tiles from `top` to `bottom` look at, with zeros where they reach beyond the frame."""
    height, width = frame_HWC.shape[:2]
    first, last = TILE * top - rows, TILE * bottom - rows + 2
    inner = frame_HWC[max(0, first) : last]
    return F.pad(inner, (0, 0, 1, TILE * w - width + 1, max(0, -first), max(0, last - height)))


def _transform(frame_HWC: Tensor, h: int, w: int) -> Tensor:
    """A padded band of a frame to the 36 combinations of each of its 6x6 windows, `[P, N, C]`."""
    rows = frame_HWC.new_empty(6, h, *frame_HWC.shape[1:])
    _combine([frame_HWC[i : i + TILE * h - 3 : TILE] for i in range(6)], rows)
    v = frame_HWC.new_empty(6, 6, h, w, frame_HWC.shape[2])
    _combine([rows[:, :, i : i + TILE * w - 3 : TILE] for i in range(6)], v.transpose(0, 1))
    return v.view(36, h * w, -1)


def _untransform(m_PNO: Tensor, y_hrwrO: Tensor) -> None:
    """The 36 products of each tile to its 4x4 outputs."""
    h, _, w, _, channels = y_hrwrO.shape
    rows = m_PNO.new_empty(4, 6, h, w, channels)
    _separate(m_PNO.view(6, 6, h, w, channels), rows)
    _separate(rows.transpose(0, 1), [y_hrwrO[:, :, :, i].transpose(0, 1) for i in range(4)])


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

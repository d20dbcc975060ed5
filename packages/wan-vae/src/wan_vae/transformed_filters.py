"""Filters transformed for Winograd's algorithm, kept within a budget of memory.

Transformed in float64 and kept in float32. Shapes: C channels in, O channels out, P products of a tile of 4x4 outputs.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from threading import Lock
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

BUDGET = 1_000_000_000  # bytes of transformed filters kept at once

SPACE = torch.tensor(
    [[1 / 4, 0, 0], [-1 / 6, -1 / 6, -1 / 6], [-1 / 6, 1 / 6, -1 / 6], [1 / 24, 1 / 12, 1 / 6], [1 / 24, -1 / 12, 1 / 6], [0, 0, 1]],
    dtype=torch.float64,
)
# a doubled row repeats every input: combination 2 is 0 and 3 is -3 times 4, so 3 and 4 meet their filters' sum and difference
DOUBLED_SPACE = torch.stack([SPACE[0], SPACE[1], SPACE[4] - 3 * SPACE[3], -SPACE[4] - 3 * SPACE[3], SPACE[5]])
TIME = torch.tensor([[1, 0, 0], [1 / 2, 1 / 2, 1 / 2], [1 / 2, -1 / 2, 1 / 2], [0, 0, 1]], dtype=torch.float64)
PRODUCTS = {"taps": 3 * 36, "pairs": 4 * 36, "last": 36, "doubled": 25}
SAMPLE = 256  # numbers of a filter that tell whether it is still the one that was transformed


@dataclass
class Kept:
    """The transformed filters of a layer, by variant, of which weights they are, and the pixels a chunk that they serve."""

    weights: Tensor
    pixels: int = 0
    variants: dict[str, Tensor] = field(default_factory=dict)

    @property
    def bytes(self) -> int:
        return sum(filters.nbytes for filters in self.variants.values())


class TransformedFilters:
    """The filters of as many layers as `budget` bytes hold, each in the variants that were asked for.

    Layers of larger pictures come first, since a filter saves by the pixel and costs by its size.
    """

    def __init__(self, budget: int = BUDGET) -> None:
        self.budget = budget
        self._kept: WeakKeyDictionary[nn.Module, Kept] = WeakKeyDictionary()
        self._lock = Lock()

    @property
    def bytes_kept(self) -> int:
        """Size of the transformed filters that are kept."""
        return sum(kept.bytes for kept in self._kept.values())

    def of(self, layer: nn.Conv2d | nn.Conv3d, variant: str, pixels: int) -> Tensor | None:
        """Transformed filters `[taps, P, C, O]`; None where keeping them would pass the budget.

        variant: "taps" for each temporal tap, "pairs" for two frames at a time, "last" for the present frame alone, "doubled"
        for pictures that are doubled first
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
                if not self._make_room(4 * PRODUCTS[variant] * layer.in_channels * layer.out_channels, pixels, layer):
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


def _sample(weight: Tensor) -> Tensor:
    """Numbers of `weight` from all over it: whatever way weights are changed or replaced, some of these change."""
    return weight.detach().flatten()[:: max(1, weight.numel() // SAMPLE)].clone()


def transform_filters(weight: Tensor, variant: str = "taps") -> Tensor:
    """Filters `[O, C, 3, 3]` or `[O, C, 3, 3, 3]` to `[taps, P, C, O]`: taps is 1, 3, or 4 for "pairs"."""
    space = DOUBLED_SPACE if variant == "doubled" else SPACE
    weight = weight.double() if weight.ndim == 5 else weight.double().unsqueeze(2)
    if variant == "last":
        weight = weight[:, :, -1:]
    elif variant == "pairs":
        weight = torch.einsum("ut,octij->ocuij", TIME, weight)
    products = torch.einsum("ai,octij,bj->tabco", space, weight, space)
    return products.flatten(1, 2).float().contiguous()

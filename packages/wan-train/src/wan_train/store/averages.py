"""Means of per-sample figures by what the samples are: their timestep, their resolution."""

from __future__ import annotations

from collections.abc import Sequence
from math import fsum

from .ranks import Ranks


class Averages:
    """Sums and counts by key; the mean over all samples of all processes does not depend on who had which."""

    def __init__(self) -> None:
        self._values: dict[str, list[float]] = {}

    def add(self, keys: Sequence[str], values: Sequence[float]) -> None:
        """One value a sample."""
        for key, value in zip(keys, values, strict=True):
            self._values.setdefault(key, []).append(value)

    def reduced(self, ranks: Ranks) -> dict[str, float]:
        """The mean of each key that any process has seen, in the order of the keys, and begin anew. Collective."""
        merged: dict[str, list[float]] = {}
        for values in ranks.gather(self._values):
            for key, own in values.items():
                merged.setdefault(key, []).extend(own)
        self._values = {}
        return {key: fsum(merged[key]) / len(merged[key]) for key in sorted(merged)}  # exact sums: the order of samples is no matter


def timestep_key(sigma: float, buckets: int = 10) -> str:
    """`loss_t/0.3-0.4` of a noise level in [0, 1]; the last bucket holds 1."""
    index = min(int(sigma * buckets), buckets - 1)
    return f"loss_t/{index / buckets:g}-{(index + 1) / buckets:g}"


def resolution_key(frames: int, height: int, width: int) -> str:
    """`loss_shape/81x480x832`: frames, height and width in pixels."""
    return f"loss_shape/{frames}x{height}x{width}"

"""A shuffled order of any length that is computed, not stored: a Feistel network over the next power of four, walked in cycles.

Luby and Rackoff (1988) for the network; Black and Rogaway, "Ciphers with arbitrary finite domains" (2002) for the walk.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ..randomness import derived_seed

_ROUNDS = 8
Indices = NDArray[np.int64]


class Permutation:
    """A permutation of 0..n-1, fixed by (seed, epoch, block, stream); `permutation[i]` takes an index or an array of them."""

    def __init__(self, n: int, seed: int, epoch: int, block: int, stream: str) -> None:
        if n < 0:
            raise ValueError(f"a permutation has 0 elements or more, got {n}")
        self.n = n
        self._bits = max(1, ((n - 1).bit_length() + 1) // 2)  # of each half
        self._keys = [np.uint64(derived_seed(seed, epoch, block, f"{stream} {i}")) for i in range(_ROUNDS)]

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, index: ArrayLike) -> Indices:
        places = np.asarray(index, dtype=np.int64)
        if places.size and not (places.min() >= 0 and places.max() < self.n):
            raise IndexError(f"a place in a permutation is from 0 to {self.n - 1}, got {places.min()} to {places.max()}")
        values = self._network(places.astype(np.uint64))
        while (outside := values >= self.n).any():
            values[outside] = self._network(values[outside])
        return values.astype(np.int64)

    def _network(self, values: NDArray[np.uint64]) -> NDArray[np.uint64]:
        shift, mask = np.uint64(self._bits), np.uint64(2**self._bits - 1)
        left, right = np.atleast_1d(values) >> shift, np.atleast_1d(values) & mask
        for key in self._keys:
            left, right = right, left ^ (_mixed(right ^ key) & mask)
        return (left << shift | right).reshape(values.shape)


def _mixed(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The finaliser of splitmix64: every bit of the result depends on every bit given."""
    with np.errstate(over="ignore"):
        values = (values ^ values >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)
        values = (values ^ values >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
        return values ^ values >> np.uint64(31)

"""The order in which samples are taken: each once an epoch, shuffled by seed and epoch, whatever the number of processes."""

from __future__ import annotations

from functools import lru_cache

import torch

from .randomness import generator


class Order:
    """An endless list of sample indices; its place is the number of samples that were taken."""

    def __init__(self, samples: int, seed: int) -> None:
        self.samples, self.seed = samples, seed
        self._epoch = lru_cache(maxsize=2)(self._shuffled)

    def take(self, start: int, count: int) -> list[int]:
        """The samples at places `start` to `start + count`."""
        return [self._epoch(place // self.samples)[place % self.samples] for place in range(start, start + count)]

    def _shuffled(self, epoch: int) -> list[int]:
        shuffled: list[int] = torch.randperm(self.samples, generator=generator(self.seed, epoch, 0, "order")).tolist()
        return shuffled

"""The order in which samples are taken: each once an epoch, shuffled by seed and epoch, whatever the number of processes."""

from __future__ import annotations

from .data.permutation import Permutation


class Order:
    """An endless list of sample indices; its place is the number of samples that were taken."""

    def __init__(self, samples: int, seed: int) -> None:
        self.samples, self.seed = samples, seed

    def take(self, start: int, count: int) -> list[int]:
        """The samples at places `start` to `start + count`."""
        taken = list[int]()
        while len(taken) < count:
            epoch, place = divmod(start + len(taken), self.samples)
            end = min(self.samples, place + count - len(taken))
            taken += Permutation(self.samples, self.seed, epoch, 0, "order")[range(place, end)].tolist()
        return taken

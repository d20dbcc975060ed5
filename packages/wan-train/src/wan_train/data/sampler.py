"""Which samples a step trains on: a pure function of the seed and the place in the data, whatever the number of processes.

An epoch is cut into windows. A window holds a share of every group's shuffled samples; it sorts them into buckets, fills
micro-batches as far as the budget allows, and shuffles those. No order is stored: `Permutation` computes it. Imports no torch.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from . import buckets
from .buckets import Bucket
from .mix import Group
from .permutation import Indices, Permutation

WINDOW = 8192


@dataclass(frozen=True, order=True)
class Position:
    """The whole state of a sampler: the epoch, and how many of its samples are used up."""

    epoch: int = 0
    index: int = 0


class Micro(NamedTuple):
    """Samples of one bucket that go through the model at once: indices of the data set."""

    bucket: Bucket
    samples: tuple[int, ...]


class Sampler:
    """Cuts an endless stream of samples into steps.

    groups: what to draw from, and how often; at weight 1 an epoch takes each sample exactly once
    bucket_of: the shape of a sample; capacity: how many samples of a shape a micro-batch holds, such as a `Budget`
    batch_size: samples of a step; or micro_batches: full micro-batches of a step, whose number of samples then varies
    stage: its name changes the order, so that a later stage does not repeat an earlier one
    window: samples that are sorted into buckets together; more of them fill micro-batches better
    """

    def __init__(
        self,
        groups: Iterable[Group],
        bucket_of: Callable[[int], Bucket],
        capacity: Callable[[Bucket], int],
        *,
        batch_size: int = 0,
        micro_batches: int = 0,
        seed: int = 0,
        stage: str = "",
        window: int = WINDOW,
    ) -> None:
        self.groups = [group for group in groups if len(group.samples)]
        if any(not (math.isfinite(group.weight) and group.weight >= 0) for group in self.groups):
            raise ValueError(f"weights are 0 or more, got {', '.join(f'{group.name} {group.weight:g}' for group in self.groups)}")
        self.counts = [round(len(group.samples) * group.weight) for group in self.groups]
        if not any(self.counts):
            raise ValueError("no sample to draw: there are none, or all weights are 0")
        if (batch_size > 0) == (micro_batches > 0) or min(batch_size, micro_batches) < 0:
            raise ValueError(f"give batch_size or micro_batches, one of them above 0, got {batch_size} and {micro_batches}")
        if window < 1:
            raise ValueError(f"window must be 1 or more, got {window}")
        self.bucket_of, self.capacity, self.seed, self.stage = bucket_of, capacity, seed, stage
        self.batch_size, self.micro_batches = batch_size, micro_batches
        # no more than one pass over a group in a window, so that a repeated sample is not twice in a step
        self.windows = max(math.ceil(len(self) / window), *(math.ceil(group.weight) for group in self.groups))
        self._filled = lru_cache(maxsize=4)(self._fill)

    def __len__(self) -> int:
        """Samples of an epoch."""
        return sum(self.counts)

    def step(self, position: Position) -> tuple[list[Micro], Position]:
        """The micro-batches of the step at `position`, and where the next one is; a step may go on into the next epoch.

        Raises ValueError for a place that is not in the data.
        """
        if position.epoch < 0 or not 0 <= position.index < len(self):
            raise ValueError(f"no such place in the data: {position}; an epoch has {len(self)} samples")
        found: list[Micro] = []
        taken = 0
        for micro in self._from(position):
            samples = micro.samples[: self.batch_size - taken] if self.batch_size else micro.samples
            found.append(Micro(micro.bucket, samples))
            taken += len(samples)
            if taken == self.batch_size or len(found) == self.micro_batches:
                break
        epochs, index = divmod(position.index + taken, len(self))
        return found, Position(position.epoch + epochs, index)

    def _from(self, position: Position) -> Iterator[Micro]:
        """The endless stream of micro-batches; the first is what is left of the one at `position`."""
        epoch, window = position.epoch, self._window(position.index)
        skip = position.index - self._start(window)
        while True:
            for micro in self._filled(epoch, window):
                if skip < len(micro.samples):
                    yield Micro(micro.bucket, micro.samples[skip:])
                skip = max(0, skip - len(micro.samples))
            epoch, window = (epoch, window + 1) if window + 1 < self.windows else (epoch + 1, 0)

    def _start(self, window: int) -> int:
        """Samples of an epoch before a window."""
        return sum(count * window // self.windows for count in self.counts)

    def _window(self, index: int) -> int:
        return bisect_right(range(self.windows + 1), index, key=self._start) - 1

    def _fill(self, epoch: int, window: int) -> list[Micro]:
        sorted_: dict[Bucket, list[int]] = {}
        samples = self._drawn(epoch, window)
        for sample in samples[self._permutation(len(samples), epoch, window, "window")[np.arange(len(samples))]].tolist():
            sorted_.setdefault(self.bucket_of(sample), []).append(sample)
        micros = []
        for bucket in sorted(sorted_):
            size, members = self.capacity(bucket), sorted_[bucket]
            micros += [Micro(bucket, tuple(members[i : i + size])) for i in range(0, len(members), size)]
        order = self._permutation(len(micros), epoch, window, "micro-batches")[np.arange(len(micros))]
        return [micros[i] for i in order.tolist()]

    def _drawn(self, epoch: int, window: int) -> Indices:
        """The samples of a window. A group is an endless list of shuffled passes; an epoch takes the next `count` of it."""
        drawn = []
        for group, count in zip(self.groups, self.counts, strict=True):
            places = np.arange(epoch * count + count * window // self.windows, epoch * count + count * (window + 1) // self.windows)
            for turn in np.unique(places // len(group.samples)).tolist():
                within = places[places // len(group.samples) == turn] % len(group.samples)
                drawn.append(group.samples[self._permutation(len(group.samples), turn, 0, f"pass {group.name}")[within]])
        return np.concatenate(drawn) if drawn else np.empty(0, np.int64)

    def _permutation(self, count: int, epoch: int, block: int, stream: str) -> Permutation:
        return Permutation(count, self.seed, epoch, block, f"{stream} {self.stage}")


def share(micros: Sequence[Micro], rank: int, ranks: int, cost: Callable[[Bucket], float] = buckets.cost) -> list[Micro]:
    """The micro-batches of data rank `rank`: all ranks together have each sample once, at nearly equal cost.

    Costly ones go first, each to the rank that has least. Where there are fewer than ranks the costliest are halved, which
    leaves the mean over the step's samples as it is; with fewer samples than ranks some ranks get none.
    """
    if not 0 <= rank < ranks:
        raise ValueError(f"rank {rank} of {ranks} data ranks")
    parts, loads, given = list(micros), [0.0] * ranks, [list[Micro]() for _ in range(ranks)]

    def costs(micro: Micro) -> float:
        return cost(micro.bucket) * len(micro.samples)

    while len(parts) < ranks and (divisible := [i for i, micro in enumerate(parts) if len(micro.samples) > 1]):
        micro = parts.pop(max(divisible, key=lambda i: costs(parts[i])))
        half = len(micro.samples) // 2
        parts += [Micro(micro.bucket, micro.samples[:half]), Micro(micro.bucket, micro.samples[half:])]
    for micro in sorted(parts, key=costs, reverse=True):
        least = min(range(ranks), key=loads.__getitem__)
        given[least].append(micro)
        loads[least] += costs(micro)
    return given[rank]

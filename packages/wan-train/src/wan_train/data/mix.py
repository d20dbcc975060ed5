"""What a stage draws from: several data sets as one, and how often an epoch takes each sample of a group. Imports no torch."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING, Any

import numpy as np

from .buckets import Bucket, Info
from .permutation import Indices

if TYPE_CHECKING:
    from torch import Tensor

KINDS = ("image", "video")


@dataclass(frozen=True)
class Group:
    """Samples that are drawn alike: `weight` is how often an epoch takes each, 0.5 one half of them, and the others in the next."""

    name: str
    samples: Indices
    weight: float = 1.0


class Mix:
    """Data sets by name as one: the samples of the first, then those of the second, and so on; satisfies `contracts.Dataset`."""

    def __init__(self, sources: Mapping[str, Any]) -> None:
        if not sources:
            raise ValueError("a mix needs at least one data set")
        self.names, self.datasets = tuple(sources), tuple(sources.values())
        self._ends = list(accumulate(len(dataset) for dataset in self.datasets))

    def __len__(self) -> int:
        return self._ends[-1]

    def key(self) -> str:
        """What a cache of this data set depends on."""
        return " + ".join(f"{name}: {dataset.key()}" for name, dataset in zip(self.names, self.datasets, strict=True))

    def identity(self, index: int) -> str:
        """What the pixels of a sample depend on, whatever else is in the mix."""
        dataset, own = self._own(index)
        return identity(dataset, own)

    def info(self, index: int) -> Info:
        dataset, own = self._own(index)
        return Info(*dataset.info(own))

    def captions(self, index: int) -> list[str]:
        dataset, own = self._own(index)
        found: list[str] = dataset.captions(own)
        return found

    def clip(self, index: int, bucket: Bucket) -> Tensor:
        """`[3, T, H, W]` in [-1, 1]."""
        return clip_of(*self._own(index), bucket)

    def video(self, indices: Sequence[int]) -> Tensor:
        """Clips `[N, 3, T, H, W]` of one size."""
        import torch

        owners = [self._own(index) for index in indices]
        return torch.cat([dataset.video([own]) for dataset, own in owners])

    def evaluation_prompts(self, n: int) -> list[str]:
        """Those of the first data set."""
        prompts: list[str] = self.datasets[0].evaluation_prompts(n)
        return prompts

    def evaluate(self, clips: Tensor, prompts: Sequence[str]) -> dict[str, float]:
        """By the first data set."""
        figures: dict[str, float] = self.datasets[0].evaluate(clips, prompts)
        return figures

    def groups(self, weights: Mapping[str, float] | None = None) -> list[Group]:
        """The groups `source/image` and `source/video`, as far as there are such samples.

        weights: by `image`, `video`, the name of a source, or `source/video`; those that fit a group are multiplied
        Raises ValueError for a name that fits none, and a weight below 0.
        """
        found: dict[str, list[int]] = {f"{name}/{kind}": [] for name in self.names for kind in KINDS}
        for index in range(len(self)):
            found[f"{self.names[bisect_right(self._ends, index)]}/{KINDS[self.info(index).frames > 1]}"].append(index)
        given = dict(weights or {})
        if unknown := set(given) - {*self.names, *KINDS, *found}:
            known = ", ".join((*KINDS, *self.names, *found))
            raise ValueError(f"weights of {', '.join(sorted(unknown))}, which are no group of the data; known are {known}")
        groups = []
        for name, samples in found.items():
            source, kind = name.rsplit("/", 1)
            weight = float(np.prod([given.get(key, 1.0) for key in {source, kind, name}]))
            if samples:
                groups.append(Group(name, np.array(samples, dtype=np.int64), weight))
        return groups

    def _own(self, index: int) -> tuple[Any, int]:
        if index < 0:
            raise IndexError(f"sample {index} of a mix of {len(self)}")
        if index >= len(self):  # never trained on: one of each data set in turn
            turn, place = divmod(index - len(self), len(self.datasets))
            return self.datasets[place], len(self.datasets[place]) + turn
        place = bisect_right(self._ends, index)
        return self.datasets[place], index - (self._ends[place - 1] if place else 0)


def shares(groups: Sequence[Group], wanted: Mapping[str, float]) -> list[Group]:
    """The groups with weights that give each its wanted share of the samples drawn; an epoch is as long as all samples together.

    Example: `shares(mix.groups(), {"web/image": 0.8, "films/video": 0.2})`. ValueError where the names differ.
    """
    if set(wanted) != {group.name for group in groups} or min(wanted.values(), default=0) < 0 or not sum(wanted.values()):
        raise ValueError(f"shares are of {', '.join(group.name for group in groups)}, 0 or more, and not all 0; got {dict(wanted)}")
    count, total = sum(len(group.samples) for group in groups), sum(wanted.values())
    return [Group(group.name, group.samples, wanted[group.name] / total * count / len(group.samples)) for group in groups]


def identity(dataset: Any, index: int) -> str:
    """What the pixels of a sample depend on: the data set's own word, or its key and the index."""
    if hasattr(dataset, "identity"):
        return str(dataset.identity(index))
    return f"{dataset.key()} {index}"


def clip_of(dataset: Any, index: int, bucket: Bucket) -> Tensor:
    """A clip `[3, T, H, W]` in the shape of a bucket; a data set without `clip` has its own shape alone. ValueError for another one."""
    if hasattr(dataset, "clip"):
        made: Tensor = dataset.clip(index, bucket)
        return made
    clip: Tensor = dataset.video([index])[0]
    if tuple(clip.shape[1:]) != tuple(bucket):
        own = "x".join(map(str, clip.shape[1:]))
        raise ValueError(f"data set '{type(dataset).__name__}' has clips of {own} alone, got {bucket}: give it a method `clip`")
    return clip

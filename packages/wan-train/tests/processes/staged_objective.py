"""An objective that learns one number, for the tests of stages; a module of its own, which a recipe can name."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from wan_train.data.buckets import Bucket

SEEN: list[tuple[Bucket, tuple[int, ...]]] = []


class Brightness:
    """Learns one number, and remembers what it was given."""

    grid = (4, 8, 8)

    def __init__(self, settings: dict[str, Any], dataset: Any, folder: Path, device: str, pm: Any) -> None:
        self.dataset, self.samples = dataset, len(dataset)
        self.modules: dict[str, nn.Module] = {"mean": nn.Linear(1, 1)}

    def parameter_groups(self) -> list[dict[str, Any]]:
        return [{"params": list(self.modules["mean"].parameters())}]

    def prepare(self) -> None: ...

    def batch_size(self, given: int, progress: float) -> int:
        return given

    def batch(self, samples: Sequence[int], draw: Any, progress: float, bucket: Bucket) -> Tensor:
        SEEN.append((bucket, tuple(samples)))
        return torch.stack([self.dataset.clip(sample, bucket) for sample in samples])

    def losses(self, batch: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        means = batch.flatten(1).mean(1, keepdim=True)
        losses = (self.modules["mean"](torch.ones_like(means)) - means).square().flatten()
        return losses, {"frames": torch.full((len(batch),), float(batch.shape[2]))}

    def export(self, modules: dict[str, nn.Module], folder: str) -> None:
        Path(folder).mkdir()

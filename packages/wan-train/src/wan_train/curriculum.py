"""The stages of a run: images first, then images and videos together, then larger ones (report, section 4.2), in one go.

A stage has shapes, a mix of data, a batch and a share of the rate of its own. It ends at a step, or earlier where the rate has fallen
as far as it goes on a plateau. The order of samples in a stage is its own.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from .config import StageConfig, TrainConfig
from .data.buckets import Buckets, Budget, Grid
from .data.mix import Group, Mix
from .data.sampler import Micro, Position, Sampler
from .order import Order


class Curriculum:
    """Where the run is in its stages, and what its next step trains on; without stages all samples have one shape.

    dataset: with stages one that has `info` and `clip`; samples: how many are trained on; grid: pixels of a token in (time, height, width)
    """

    def __init__(self, config: TrainConfig, dataset: Any, samples: int, grid: Grid) -> None:
        self.config, self.dataset, self.grid = config, dataset, grid
        self.order = Order(samples, config.seed)
        self.index, self.position, self.taken = 0, Position(), 0
        self._samplers: dict[int, Sampler] = {}
        _check(config.stages, config.steps)

    @property
    def stage(self) -> StageConfig | None:
        """The stage of the next step."""
        return self.config.stages[self.index] if self.config.stages else None

    @property
    def rate(self) -> float:
        """What the learning rate is multiplied by."""
        return self.stage.lr if self.stage else 1.0

    @property
    def shift(self) -> float | None:
        """That of the stage's noise levels, None for the objective's own."""
        return self.stage.shift if self.stage else None

    def advance(self, step: int, *, spent: bool) -> bool:
        """Go on to the next stage where it begins at `step`, or where the rate is `spent` and this one may end early; says whether."""
        stage = self.stage
        if stage is None or self.index + 1 == len(self.config.stages) or not (step >= stage.until or (spent and stage.may_end_early)):
            return False
        self.index, self.position = self.index + 1, Position()
        return True

    def take(self, count: int) -> list[Micro]:
        """The micro-batches of the next step; of `count` samples where there are no stages."""
        if self.stage is None:
            samples = self.order.take(self.taken, count)
            self.taken += count
            return [Micro(None, tuple(samples))]  # type: ignore[arg-type]  # one shape, which the objective knows
        micros, self.position = self.sampler(self.index).step(self.position)
        self.taken += sum(len(micro.samples) for micro in micros)
        return micros

    def state(self) -> dict[str, Any]:
        """Plain values for a checkpoint."""
        return {"index": self.index, "epoch": self.position.epoch, "place": self.position.index, "taken": self.taken}

    def load(self, state: dict[str, Any]) -> None:
        self.index, self.taken = state["index"], state["taken"]
        self.position = Position(state["epoch"], state["place"])

    def sampler(self, index: int) -> Sampler:
        """What the stage at `index` draws, and the shape of each sample. ValueError that names the stage, there and in what it calls."""
        if index not in self._samplers:
            stage = self.config.stages[index]
            with _in_stage(stage.name):
                self._samplers[index] = self._sampler(stage)
        return self._samplers[index]

    def _sampler(self, stage: StageConfig) -> Sampler:
        buckets = Buckets(video=stage.video, image=stage.image, frames=stage.frames, grid=self.grid)
        budget = Budget(stage.tokens, stage.squared, self.grid)
        batch = stage.batch_size or (0 if stage.micro_batches else self.config.batch_size)
        most = min((count for count in (stage.samples, batch) if count), default=0)  # more would be several steps of one shape
        return Sampler(
            self._groups(stage),
            _in_stage(stage.name)(lambda sample: buckets.of(self.dataset.info(sample))),
            _in_stage(stage.name)(lambda bucket: min(budget(bucket), most or budget(bucket))),
            batch_size=batch,
            micro_batches=stage.micro_batches, seed=self.config.seed, stage=stage.name,
        )  # fmt: skip

    def _groups(self, stage: StageConfig) -> Sequence[Group]:
        mix = self.dataset if isinstance(self.dataset, Mix) else Mix({"data": self.dataset})
        return mix.groups(stage.weights)


@contextmanager
def _in_stage(name: str) -> Iterator[None]:
    """Say of which stage an error is."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"stage '{name}': {error}") from error


def _check(stages: Sequence[StageConfig], steps: int) -> None:
    ends = [stage.until for stage in stages]
    if ends and (sorted(set(ends)) != ends or ends[-1] != steps):
        raise ValueError(f"stages end at steps {', '.join(map(str, ends))}: they must rise, and the last one end the run, at {steps}")
    if len({stage.name for stage in stages}) < len(stages):
        raise ValueError(f"stages must differ in name: {', '.join(stage.name for stage in stages)}")

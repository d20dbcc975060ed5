"""What a cache costs and saves: the same run with it and without, from the same noise."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..contracts import Backbone, Cache, CacheRun, Conditioning, Context, Schedule, Scheduler
from ..events import Done, Step
from ..guidance import guided_velocity
from .magcache import Calibration, Ratios

if TYPE_CHECKING:
    from ..pipeline import Pipeline


@dataclass(frozen=True)
class Trial:
    """One run of a backbone by itself: what its latents are made from.

    noise: `[B, C, T', H', W']`; seed: of the fresh noise of schedulers that take any
    """

    backbone: Backbone
    scheduler: Scheduler
    schedule: Schedule
    noise: Tensor
    context: Context
    negative_context: Context | None = None
    scale: float = 1.0
    conditioning: Conditioning | None = None
    guided: Callable[..., Tensor] = guided_velocity
    seed: int = 0

    @torch.no_grad()
    def latents(self, run: CacheRun | None = None) -> Tensor:
        """The last latents, fp32, under a cache or without one."""
        state, generator = self.scheduler.start(self.schedule), torch.Generator().manual_seed(self.seed)
        latents, rest = self.noise * self.schedule.noise_scale, (self.context, self.negative_context, self.scale, self.conditioning)
        for step, time_ in enumerate(self.schedule.timesteps):
            given = self.backbone, latents, time_.to(latents.device, torch.float32).reshape(1), *rest
            velocity = self.guided(*given) if run is None else run.velocity(*given, step=step, guided=self.guided)
            latents = self.scheduler.step(state, velocity.float(), latents, generator)
        return latents


@dataclass(frozen=True)
class Measured:
    """error: of the last latents, L2 of the difference over L2 of the uncached ones
    seconds, uncached_seconds: of the two runs
    report: of the cached run
    """

    error: float
    seconds: float
    uncached_seconds: float
    report: dict[str, Any]


def measured_error(cache: Cache, trial: Trial) -> Measured:
    """Run a trial without a cache and with it."""
    run = cache.start(trial.schedule.timesteps)
    times, results = [time.perf_counter()], []
    for each in (None, run):
        results.append(trial.latents(each))
        if results[-1].is_cuda:
            torch.cuda.synchronize()
        times.append(time.perf_counter())
    uncached, cached = results
    return Measured(relative_error(cached, uncached), times[2] - times[1], times[1] - times[0], run.report())


def measured_run(pipeline: Pipeline, cache: str, prompt: str, **settings: Any) -> Measured:
    """As `measured_error`, of a whole pipeline with its tasks, experts and processes; `settings` are those of `Pipeline.stream`."""
    latents: list[Tensor] = []
    seconds: list[float] = []
    report: dict[str, Any] = {}
    for each in (None, cache):
        for event in pipeline.stream(prompt, cache=each, **settings):
            if isinstance(event, Step) and event.i == event.n and event.state is not None:
                latents.append(event.state.latents)
            if isinstance(event, Done):
                seconds.append(event.result.timings["denoise"])
                report = event.result.manifest["cache"]
    uncached, cached = latents
    return Measured(relative_error(cached, uncached), seconds[1], seconds[0], report)


def relative_error(got: Tensor, expected: Tensor) -> float:
    """L2 of the difference over L2 of what was expected."""
    return float((got.double() - expected.double()).norm() / expected.double().norm())


def calibrate(trial: Trial) -> Ratios:
    """The ratios of a backbone for MagCache, from a run without a cache; `write_ratios` writes them for `magcache:ratios=FILE`."""
    run = Calibration(trial.schedule.timesteps)
    trial.latents(run)
    return run.ratios

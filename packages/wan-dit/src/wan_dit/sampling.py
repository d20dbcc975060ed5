"""The denoising of one request: latents, scheduler, random numbers. It can stop after any step and go on to the same bits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .contracts import Backbone, CacheRun, Context, Schedule, Scheduler
from .guidance import guided_velocity
from .tasks.task import Prepared

HIGH, LOW = "backbone", "low_noise_backbone"  # the parts that take a step


class Sampling:
    """State of one request; one `step` is one model evaluation, at guidance 1, or two.

    prepared: what the task made; its known latents are put back before the first step and after every one, and their time is 0
    scales: guidance of the low-noise and of the high-noise expert
    boundary: the expert of low noise takes the steps whose truncated timestep is below 1000 * boundary; 0 is one model alone
    guide: what makes one velocity of two (`guided_velocity`, or one over several processes)
    cache: the run of a cache around it (see `wan_dit.caching`)
    """

    def __init__(
        self,
        scheduler: Scheduler,
        schedule: Schedule,
        shape: tuple[int, ...],
        prepared: Prepared,
        *,
        seed: int,
        scales: tuple[float, float],
        boundary: float = 0.0,
        guide: Callable[..., Tensor] = guided_velocity,
        cache: CacheRun | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        self.scheduler, self.schedule, self.prepared = scheduler, schedule, prepared
        self.scales, self.boundary, self.device = scales, boundary, torch.device(device)
        self.guide, self.cache = guide, cache
        self.state = scheduler.start(schedule)
        self.generator = torch.Generator("cpu").manual_seed(seed)
        noise = torch.randn(shape, generator=self.generator)  # on the CPU, so that a seed means the same on every device
        self.latents = self._known((noise * schedule.noise_scale).to(self.device))

    @property
    def i(self) -> int:
        """Index of the next evaluation."""
        return int(self.state["i"])

    @property
    def expert(self) -> str:
        """The part that takes the next step: chosen by the truncated timestep, as in the official code."""
        return self._expert_at(self.i)

    @property
    def expert_ahead(self) -> str:
        """The part that takes the step after the next one."""
        return self._expert_at(min(self.i + 1, len(self.schedule.timesteps) - 1))

    def _expert_at(self, i: int) -> str:
        return HIGH if int(self.schedule.timesteps[i]) >= 1000 * self.boundary else LOW

    def timestep(self) -> Tensor:
        """`[1]`, or `[1, T']` where frames are known."""
        timestep = self.schedule.timesteps[self.i].to(self.device, torch.float32).reshape(1)
        if self.prepared.known is None:
            return timestep
        times = timestep.expand(1, self.latents.shape[2]).clone()
        times[:, : self.prepared.known.shape[2]] = 0
        return times

    def step(self, backbone: Backbone, context: Context, negative: Context | None, dtype: torch.dtype) -> Tensor:
        """Take a step; returns the video as predicted before it, latents of the shape of `latents`."""
        sigma = float(self.schedule.sigmas[self.i])
        scale = self.scales[0 if self.expert == LOW else 1]
        given = backbone, self.latents.to(dtype), self.timestep(), context, negative, scale, self.prepared.conditioning
        if self.cache is None:
            velocity = self.guide(*given).float()
        else:
            velocity = self.cache.velocity(*given, step=self.i, expert=self.expert, guided=self.guide).float()
        denoised = self._known(self.latents - sigma * velocity)
        self.latents = self._known(self.scheduler.step(self.state, velocity, self.latents, self.generator))
        return denoised

    def _known(self, latents: Tensor) -> Tensor:
        if (known := self.prepared.known) is not None:
            latents = torch.cat([known.to(latents), latents[:, :, known.shape[2] :]], dim=2)
        return latents

    def snapshot(self) -> dict[str, Any]:
        """`latents`, and the states of `scheduler`, `generator` and `cache`; later steps do not change them."""
        cache = None if self.cache is None else self.cache.state_dict()
        return {"latents": self.latents, "scheduler": dict(self.state), "generator": self.generator.get_state(), "cache": cache}

    def restore(self, latents: Tensor, scheduler: dict[str, Any], generator: Tensor, cache: dict[str, Any] | None) -> None:
        """Go on from a snapshot; ValueError where it is of another schedule or shape."""
        if latents.shape != self.latents.shape or not torch.equal(scheduler["sigmas"], self.state["sigmas"]):
            raise ValueError("the saved state is of a run with another size, number of frames or noise schedule")
        self.latents, self.state = latents.to(self.device), self._moved(scheduler)
        self.generator.set_state(generator)
        if self.cache is not None and cache is not None:
            self.cache.load_state_dict(self._moved(cache, every=True))

    def _moved(self, value: Any, *, every: bool = False) -> Any:
        """Tensors of the latents' shape, or every one, on their device; all others stay on the CPU."""
        if isinstance(value, Tensor):
            return value.to(self.device) if every or value.shape == self.latents.shape else value
        if isinstance(value, dict):
            return {key: self._moved(inner, every=every) for key, inner in value.items()}
        return type(value)(self._moved(inner, every=every) for inner in value) if isinstance(value, list | tuple) else value

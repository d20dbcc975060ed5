"""The sampler of consistency and DMD models: predict the data, then mix it with fresh noise.

Luo et al., "Latent Consistency Models" (2023), on the flow path. The step is the one of diffusers' FlowMatchLCMScheduler, FastVideo's
DMD stage, Self-Forcing and rCM's SDE.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..contracts import Schedule
from .schedule import SigmaGrid, make_schedule, next_index, shift_sigmas, sigma_grid, start_state


class LCM:
    """One evaluation a step, float timesteps; the last step returns the predicted data.

    `generator` is asked once, at the first step, for a seed that the state keeps; every step's noise is drawn on the CPU from that
    seed and the step's index. So a saved state needs no generator to resume, and a run is the same on every device.

    grid: `"linear"`, `"training"` or a function, see `sigma_grid`
    """

    def __init__(self, grid: SigmaGrid = "linear") -> None:
        self._grid = sigma_grid(grid)

    def schedule(self, steps: int, shift: float) -> Schedule:
        """sigmas `[steps + 1]` and float32 timesteps `[steps]`; ValueError for steps < 1 or shift <= 0."""
        return make_schedule(shift_sigmas(self._grid(steps), shift))

    def start(self, schedule: Schedule) -> dict[str, Any]:
        """`{"i", "sigmas"}`; the first `step` adds `seed`. Any schedule that falls to 0 will do."""
        return start_state(schedule)

    def step(self, state: dict[str, Any], velocity: Tensor, sample: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """(1 - s) * data + s * noise at the next sigma s, in the dtype and on the device of `sample`."""
        i, sigmas = next_index(state), state["sigmas"]
        if "seed" not in state:
            device = "cpu" if generator is None else generator.device
            state["seed"] = int(torch.randint(2**62, (), generator=generator, device=device))
        data = sample - sigmas[i] * velocity.to(sample.dtype)
        state["i"] = i + 1
        if sigmas[i + 1] == 0:
            return data
        noise = torch.randn(sample.shape, generator=torch.Generator().manual_seed(state["seed"] + i))
        return (1 - sigmas[i + 1]) * data + sigmas[i + 1] * noise.to(sample)

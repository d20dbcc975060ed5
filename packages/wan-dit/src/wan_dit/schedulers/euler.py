"""Euler's method on the flow: x moves along the velocity, from sigma to sigma."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..contracts import Schedule
from .schedule import SigmaGrid, make_schedule, next_index, shift_sigmas, sigma_grid, start_state


class Euler:
    """First order, one evaluation a step, float timesteps.

    grid: `"linear"` (the sigmas of the official `get_sampling_sigmas`), `"training"` or a function, see `sigma_grid`
    """

    def __init__(self, grid: SigmaGrid = "linear") -> None:
        self._grid = sigma_grid(grid)

    def schedule(self, steps: int, shift: float) -> Schedule:
        """sigmas `[steps + 1]` and float32 timesteps `[steps]`; ValueError for steps < 1 or shift <= 0."""
        return make_schedule(shift_sigmas(self._grid(steps), shift))

    def start(self, schedule: Schedule) -> dict[str, Any]:
        """`{"i", "sigmas"}`; any schedule that falls to 0 will do."""
        return start_state(schedule)

    def step(self, state: dict[str, Any], velocity: Tensor, sample: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """The sample at the next sigma, in the dtype and on the device of `sample`."""
        i, sigmas = next_index(state), state["sigmas"]
        state["i"] = i + 1
        return sample + (sigmas[i + 1] - sigmas[i]) * velocity.to(sample.dtype)

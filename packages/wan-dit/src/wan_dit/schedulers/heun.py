"""Heun's method: a step of Euler, then the same step again with the mean of the velocities at its two ends."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..contracts import Schedule
from .schedule import SigmaGrid, make_schedule, next_index, shift_sigmas, sigma_grid, start_state


class Heun:
    """Second order, float timesteps. `steps` steps take 2 * steps - 1 evaluations: at sigma 0 there is nothing left to evaluate.

    An even evaluation predicts the next sample, the odd one after it corrects that sample.

    grid: `"linear"`, `"training"` or a function, see `sigma_grid`
    """

    def __init__(self, grid: SigmaGrid = "linear") -> None:
        self._grid = sigma_grid(grid)

    def schedule(self, steps: int, shift: float) -> Schedule:
        """sigmas `[2 * steps]`, timesteps `[2 * steps - 1]`: every sigma but the first and the last stands twice."""
        return make_schedule(np.repeat(shift_sigmas(self._grid(steps), shift), 2)[1:])

    def start(self, schedule: Schedule) -> dict[str, Any]:
        """`{"i", "sigmas"}`; between a prediction and its correction also `velocity` and `sample` of the step's start.

        ValueError where the sigmas do not come in such pairs, as those of a solver with one evaluation a step.
        """
        state = start_state(schedule)
        inner = state["sigmas"][1:-1]
        if len(inner) % 2 or not torch.equal(inner[::2], inner[1::2]):
            raise ValueError("Heun evaluates every sigma but the first twice; use its own `schedule`")
        return state

    def step(self, state: dict[str, Any], velocity: Tensor, sample: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """The sample at `sigmas[i + 1]`, in the dtype and on the device of `sample`."""
        i, sigmas = next_index(state), state["sigmas"]
        velocity = velocity.to(sample.dtype)
        state["i"] = i + 1
        if i % 2 == 0:
            state.update(velocity=velocity.clone(), sample=sample.clone())
            return sample + (sigmas[i + 1] - sigmas[i]) * velocity
        mean = (state.pop("velocity") + velocity) / 2
        start: Tensor = state.pop("sample")
        return start + (sigmas[i] - sigmas[i - 1]) * mean

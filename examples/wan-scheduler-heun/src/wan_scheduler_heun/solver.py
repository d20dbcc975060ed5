"""Heun's method: a step of Euler, then the same step again with the mean of the velocities at its two ends."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor
from wan_dit.contracts import Schedule
from wan_dit.schedulers.schedule import linear_sigmas, make_schedule, next_index, shift_sigmas, start_state


class Heun:
    """Second order; `steps` steps take 2 * steps - 1 evaluations, since at sigma 0 there is nothing left to evaluate.

    Evaluations alternate: an even one predicts the next sample, the odd one after it corrects that sample.
    """

    def schedule(self, steps: int, shift: float) -> Schedule:
        """One entry an evaluation: every sigma but the first stands twice, where it is reached and where it is left."""
        sigmas = shift_sigmas(linear_sigmas(steps), shift)
        return make_schedule(np.repeat(sigmas, 2)[1:])

    def start(self, schedule: Schedule) -> dict[str, Any]:
        """`{"i", "sigmas"}`; between a prediction and its correction also `velocity` and `sample` of the step's start."""
        return start_state(schedule)

    def step(self, state: dict[str, Any], velocity: Tensor, sample: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """The sample at `sigmas[i + 1]`."""
        i, sigmas = next_index(state), state["sigmas"]
        velocity = velocity.to(sample.dtype)
        state["i"] = i + 1
        if i % 2 == 0:
            state.update(velocity=velocity.clone(), sample=sample.clone())
            return sample + (sigmas[i + 1] - sigmas[i]) * velocity
        mean = (state.pop("velocity") + velocity) / 2
        return state.pop("sample") + (sigmas[i] - sigmas[i - 1]) * mean

"""The step list of rCM and TurboDiffusion, which is given as angles of the trigonometric flow cos(t) * data + sin(t) * noise.

Zheng et al., "Large Scale Diffusion Distillation via Score-Regularized Continuous-Time Consistency" (2025), and TurboDiffusion
`turbodiffusion/inference/`. An angle t is sigma = sin(t) / (sin(t) + cos(t)) of our flow. The original keeps the sample in
float64; here it keeps the pipeline's type.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from ..contracts import Schedule
from .schedule import make_schedule, start_state
from .step_list import solver_of


class TrigFlow:
    """One to `len(angles) + 1` evaluations: the start, and the first angles.

    sigma_max: noise over data at the start, tan of the first angle; 80, or 200 of image to video
    angles: those that follow, falling
    renoise: `"fresh"`, new noise at every step (SDE); `"flow"`, along the velocity (ODE)

    The run's shift is not used. The first noise is scaled by the first sigma, as `Schedule.noise_scale` says.
    """

    def __init__(
        self, sigma_max: float = 80.0, angles: Sequence[float] = (1.5, 1.4, 1.0), *, renoise: Literal["fresh", "flow"] = "fresh"
    ) -> None:
        self._angles = np.array([math.atan(sigma_max), *angles])
        if not (np.diff(self._angles) < 0).all() or self._angles[-1] <= 0:
            raise ValueError(f"angles fall from atan(sigma_max) = {self._angles[0]:.4f} and stay above 0, got {tuple(angles)}")
        self._solver = solver_of(renoise)
        self.steps = len(self._angles)

    def schedule(self, steps: int, shift: float) -> Schedule:
        """sigmas `[steps + 1]`, float32 timesteps `[steps]` and the scale of the first noise; ValueError for more steps than angles."""
        if not isinstance(steps, int) or not 1 <= steps <= self.steps:
            raise ValueError(f"steps is {steps!r}; this scheduler runs 1 to {self.steps} steps")
        angles = self._angles[:steps]
        sigmas = np.sin(angles) / (np.sin(angles) + np.cos(angles))
        made = make_schedule(sigmas)
        return Schedule(made.sigmas, made.timesteps, noise_scale=float(sigmas[0]))

    def start(self, schedule: Schedule) -> dict[str, Any]:
        """`{"i", "sigmas"}`; with fresh noise the first `step` adds `seed`."""
        return start_state(schedule)

    def step(self, state: dict[str, Any], velocity: Tensor, sample: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """The sample at the next sigma, in the dtype and on the device of `sample`."""
        return self._solver.step(state, velocity, sample, generator)


rcm_i2v_4step = partial(TrigFlow, 200.0)

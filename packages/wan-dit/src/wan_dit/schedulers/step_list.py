"""Fixed lists of timesteps, which few-step models are distilled on, and the published ones.

A list is in one of two spaces, and taking one for the other is the common error: `raw` timesteps are counted on the even grid and
shifted by the run's shift, `shifted` ones are what the model gets.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from functools import partial
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from ..contracts import Schedule
from .euler import Euler
from .lcm import LCM
from .schedule import TRAIN_TIMESTEPS, Grid, linear_sigmas, make_schedule, shift_sigmas, start_state

SOLVERS: dict[str, type[Euler] | type[LCM]] = {"flow": Euler, "fresh": LCM}
COMMON_SHIFTS = (3.0, 5.0, 8.0, 12.0, 16.0)


class StepList:
    """One evaluation a timestep of a list.

    timesteps: falling, in (0, 1000]
    space: `"raw"`, moved by the run's shift; `"shifted"`, used as they are, whatever the run's shift
    renoise: `"flow"`, along the velocity (deterministic); `"fresh"`, with new noise, see `LCM`
    shift: the one a raw list was distilled with; a run with another is warned of
    sigmas: noise levels of a shifted list, one a timestep, where they are not timesteps / 1000

    `steps` and `shift` are the settings it is made for: a run that gives none takes them.
    """

    def __init__(
        self,
        timesteps: Sequence[float],
        *,
        space: Literal["raw", "shifted"],
        renoise: Literal["flow", "fresh"],
        shift: float | None = None,
        sigmas: Sequence[float] | None = None,
    ) -> None:
        if space not in ("raw", "shifted"):
            raise ValueError(f"space is {space!r}; a list is 'raw' (the run's shift is applied) or 'shifted' (it is what the model gets)")
        if space == "raw" and sigmas is not None:
            raise ValueError("a raw list has no sigmas of its own: they follow from its timesteps and the run's shift")
        if space == "shifted" and shift is not None:
            raise ValueError(f"a shifted list takes no shift, got {shift:g}")
        self._timesteps = _checked(timesteps)
        self._sigmas = self._timesteps / TRAIN_TIMESTEPS if sigmas is None else np.asarray(sigmas, np.float64)
        if self._sigmas.shape != self._timesteps.shape:
            raise ValueError(f"{len(self._timesteps)} timesteps need as many sigmas, got {len(self._sigmas)}")
        self._raw = space == "raw"
        self._solver = solver_of(renoise)
        self.steps, self.shift = len(self._timesteps), shift

    def schedule(self, steps: int, shift: float) -> Schedule:
        """sigmas `[steps + 1]` and float32 timesteps `[steps]`; ValueError where `steps` is not the length of the list.

        Warns where a raw list is one that was shifted already, or is run with another shift than the one it was made for.
        """
        if steps != self.steps:
            raise ValueError(
                f"steps is {steps!r}; this scheduler runs the {self.steps} timesteps {_text(self._timesteps)}: use {self.steps}"
            )
        if not self._raw:
            made = make_schedule(self._sigmas)
            return Schedule(made.sigmas, torch.from_numpy(self._timesteps.astype(np.float32)))
        made = make_schedule(shift_sigmas(self._sigmas, shift))
        if (twice := _shift_within(self._timesteps, shift)) is not None:
            warnings.warn(
                f"the raw timesteps {_text(self._timesteps)} look as if shift {twice:g} were in them already, and the run applies "
                f"{shift:g} to them; if so, declare space='shifted'",
                stacklevel=2,
            )
        if self.shift not in (None, shift):
            warnings.warn(
                f"these {self.steps} timesteps were made for shift {self.shift:g}; the run's shift {shift:g} is used", stacklevel=2
            )
        return made

    def start(self, schedule: Schedule) -> dict[str, Any]:
        """`{"i", "sigmas"}`; with fresh noise the first `step` adds `seed`."""
        return start_state(schedule)

    def step(self, state: dict[str, Any], velocity: Tensor, sample: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """The sample at the next sigma, in the dtype and on the device of `sample`."""
        return self._solver.step(state, velocity, sample, generator)


def solver_of(renoise: str) -> Euler | LCM:
    """What takes the sample from one sigma of a list to the next."""
    if renoise not in SOLVERS:
        raise ValueError(f"renoise is {renoise!r}; it is 'flow' (along the velocity) or 'fresh' (with new noise)")
    return SOLVERS[renoise]()


def _checked(timesteps: Sequence[float]) -> Grid:
    values = np.asarray(timesteps, np.float64)
    if values.ndim != 1 or not len(values) or values[0] > TRAIN_TIMESTEPS or values[-1] <= 0 or not (np.diff(values) < 0).all():
        raise ValueError(f"a step list falls from at most {TRAIN_TIMESTEPS} and ends above 0 (the last 0 is not written), got {timesteps}")
    return values


def _shift_within(timesteps: Grid, shift: float) -> float | None:
    """The shift that makes an even grid of this list's length into this list, if any does; truncated timesteps count too."""
    even = linear_sigmas(len(timesteps))
    for candidate in (1.0, shift, *COMMON_SHIFTS):
        if np.abs(shift_sigmas(even, candidate) * TRAIN_TIMESTEPS - timesteps).max() < 1.5:
            return None if candidate == 1 else candidate
    return None


def _text(timesteps: Grid) -> str:
    return ", ".join(f"{value:g}" for value in timesteps)


# LightX2V's step-distilled Wan2.1 and Wan2.2 models and LoRAs (WanStepDistillScheduler), without guidance. Of an A14B pair each
# expert runs two of them.
lightx2v_4step = partial(StepList, (1000, 750, 500, 250), space="raw", renoise="flow", shift=5.0)
# Self-Forcing of Wan2.1 1.3B, within each chunk of its causal rollout (`denoising_step_list`, `warp_denoising_step`)
self_forcing_4step = partial(StepList, (1000, 750, 500, 250), space="raw", renoise="fresh", shift=5.0)
# Self-Forcing of Wan2.2 A14B (FastVideo)
self_forcing_8step = partial(StepList, (1000, 850, 700, 550, 350, 275, 200, 125), space="raw", renoise="fresh", shift=12.0)
# FastWan (FastVideo, `dmd_denoising_steps`). The model gets these timesteps; the solver, the nearest sigmas of the 1000 training
# steps at shift 8, which are raw timesteps 1000, 280 and 120.
fastwan_3step = partial(
    StepList, (1000, 757, 522), space="shifted", renoise="fresh", sigmas=tuple(shift_sigmas(np.array([1.0, 0.28, 0.12]), 8.0).tolist())
)

"""Sigma grids and what every solver does with them.

A grid is made in float64 and rounded once to float32, as the official samplers do (Wan2.1 `wan/utils/fm_solvers.py` and
`fm_solvers_unipc.py`). Sigmas stay on the CPU; a solver reads them by index, never by looking a timestep up, since
truncated timesteps repeat at a high shift.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ..contracts import Schedule

Grid = npt.NDArray[np.float64]
SigmaGrid = str | Callable[[int], Grid]

TRAIN_TIMESTEPS = 1000
# sigma of the first of 1000 training steps, 1 - 1/1000, through float32 as the official UniPC stores it
SIGMA_MAX = float(np.float32(1 - 1 / TRAIN_TIMESTEPS))


def linear_sigmas(steps: int) -> Grid:
    """`steps` unshifted sigmas, evenly spaced from 1 towards 0 (0 not included)."""
    return _evenly(1.0, steps)


def training_sigmas(steps: int) -> Grid:
    """`steps` unshifted sigmas from SIGMA_MAX towards 0: the grid of the official UniPC, which never reaches 1."""
    return _evenly(SIGMA_MAX, steps)


GRIDS: dict[str, Callable[[int], Grid]] = {"linear": linear_sigmas, "training": training_sigmas}


def sigma_grid(grid: SigmaGrid) -> Callable[[int], Grid]:
    """The unshifted grid of a name, `"linear"` (from 1) or `"training"` (from SIGMA_MAX), or a function `steps -> sigmas` as given."""
    if isinstance(grid, str) and grid not in GRIDS:
        raise ValueError(f"no sigma grid is called {grid!r}; there are {', '.join(GRIDS)}, and functions from steps to sigmas")
    return GRIDS[grid] if isinstance(grid, str) else grid


def shift_sigmas(sigmas: Grid, shift: float) -> Grid:
    """Move a grid towards noise: shift * sigma / (1 + (shift - 1) * sigma). Shift 1 leaves it as it is."""
    if not 0 < shift < float("inf"):
        raise ValueError(f"shift is {shift}; it must be a positive number: 1 is an even grid, Wan models use 3 to 16")
    return shift * sigmas / (1 + (shift - 1) * sigmas)


def make_schedule(sigmas: Grid, *, truncate: bool = False) -> Schedule:
    """A Schedule over `sigmas` `[E]` and a last 0; `truncate` cuts the timesteps to integers, as the official solvers do."""
    full = torch.from_numpy(np.append(sigmas, 0.0).astype(np.float32))
    timesteps = torch.from_numpy((sigmas * TRAIN_TIMESTEPS).astype(np.int64)) if truncate else full[:-1] * TRAIN_TIMESTEPS
    return Schedule(full, timesteps)


def start_state(schedule: Schedule) -> dict[str, Any]:
    """The state every solver begins with: `{"i": 0, "sigmas": float32 [E + 1] on the CPU}`.

    Raises ValueError where the schedule does not fall from at most 1 to 0 with one timestep an evaluation.
    """
    sigmas, timesteps = schedule.sigmas.cpu(), schedule.timesteps
    if sigmas.dtype != torch.float32 or sigmas.dim() != 1 or len(sigmas) < 2 or timesteps.shape != sigmas[:-1].shape:
        raise ValueError(
            f"a schedule has float32 sigmas [E + 1] and timesteps [E], got {sigmas.dtype} {list(sigmas.shape)} and {list(timesteps.shape)}"
        )
    if sigmas[0] > 1 or sigmas[-1] != 0 or not bool((sigmas[:-2] >= sigmas[1:-1]).all() and (sigmas[:-1] > 0).all()):
        raise ValueError(f"sigmas must fall from at most 1 (noise) to 0 (data), got {sigmas[0]:.4g} ... {sigmas[-1]:.4g}")
    return {"i": 0, "sigmas": sigmas}


def next_index(state: dict[str, Any]) -> int:
    """The index of the evaluation that `step` is called for; ValueError where the last one is done."""
    i, evaluations = state["i"], len(state["sigmas"]) - 1
    if not 0 <= i < evaluations:
        raise ValueError(f"step {i} of a run of {evaluations} evaluations: the run is over; start a new state")
    return int(i)


def half_log_snr(sigma: Tensor) -> Tensor:
    """log((1 - sigma) / sigma), the time in which exponential integrators step; -inf at 1, inf at 0."""
    return torch.log(1 - sigma) - torch.log(sigma)


def _evenly(first: float, steps: int) -> Grid:
    if not isinstance(steps, int) or steps < 1:
        raise ValueError(f"steps is {steps!r}; it must be an integer of at least 1")
    return np.linspace(first, 0.0, steps + 1)[:-1]

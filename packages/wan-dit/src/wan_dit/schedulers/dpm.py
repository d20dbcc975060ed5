"""DPM-Solver++ of order 2, multistep, predicting the data: the official sampler `dpm++`.

Lu et al., "DPM-Solver++: Fast Solver for Guided Sampling of Diffusion Probabilistic Models" (2022), its midpoint form 2M, on the
flow path alpha = 1 - sigma, as in Wan2.1 `wan/utils/fm_solvers.py`. Equal to the bit, on a CPU, to diffusers'
DPMSolverMultistepScheduler on the same sigmas: the scalars are float32 tensors, combined in the same order.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..contracts import Schedule
from .schedule import SigmaGrid, half_log_snr, make_schedule, next_index, shift_sigmas, sigma_grid, start_state


class DPMpp:
    """One evaluation a step; the first and the last step are of order 1. Timesteps are truncated to integers.

    grid: `"linear"` (the sigmas of the official `get_sampling_sigmas`), `"training"` or a function, see `sigma_grid`
    """

    def __init__(self, grid: SigmaGrid = "linear") -> None:
        self._grid = sigma_grid(grid)

    def schedule(self, steps: int, shift: float) -> Schedule:
        """sigmas `[steps + 1]` and int64 timesteps `[steps]`; ValueError for steps < 1 or shift <= 0."""
        return make_schedule(shift_sigmas(self._grid(steps), shift), truncate=True)

    def start(self, schedule: Schedule) -> dict[str, Any]:
        """`{"i", "sigmas"}`; `step` adds `data`, the last predicted data. ValueError where sigmas repeat."""
        state = start_state(schedule)
        if not bool((state["sigmas"][:-1] > state["sigmas"][1:]).all()):
            raise ValueError(f"DPM-Solver++ needs strictly falling sigmas, got {state['sigmas'][:3].tolist()} ...")
        return state

    def step(self, state: dict[str, Any], velocity: Tensor, sample: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """The sample at the next sigma, in the dtype and on the device of `sample`."""
        i, sigmas = next_index(state), state["sigmas"]
        start, end = sigmas[i], sigmas[i + 1]
        data = sample - start * velocity.to(sample.dtype)
        h = half_log_snr(end) - half_log_snr(start)  # infinite from sigma 1 and to sigma 0, where its exponential is exact
        gain = (1 - end) * (torch.exp(-h) - 1.0)
        result = (end / start) * sample - gain * data
        if 0 < i < len(sigmas) - 2:
            ratio = (half_log_snr(start) - half_log_snr(sigmas[i - 1])) / h
            result = result - 0.5 * gain * ((1.0 / ratio) * (data - state["data"]))
        state.update(data=data, i=i + 1)
        return result

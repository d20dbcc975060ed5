"""UniPC of order 2 in its B2(h) form, predicting the data: the official default sampler.

Zhao et al., "UniPC: A Unified Predictor-Corrector Framework for Fast Sampling of Diffusion Models" (2023), on
the flow path alpha = 1 - sigma, as in Wan2.1 `wan/utils/fm_solvers_unipc.py`. Equal to the bit, on a CPU, to diffusers'
UniPCMultistepScheduler on the same sigmas: the scalars are float32 tensors, combined in the same order. They stay on the CPU;
the sample may be on any device.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..contracts import Schedule
from .schedule import SigmaGrid, half_log_snr, make_schedule, next_index, shift_sigmas, sigma_grid, start_state

ORDER = 2


class UniPC:
    """Multistep predictor-corrector, one evaluation a step.

    Every sample but the first is corrected with the velocity found there before the next is predicted. The first and
    the last prediction are of order 1. Timesteps are truncated to integers.

    grid: `"training"`, or a function (see `sigma_grid`) whose sigmas stay below 1
    """

    def __init__(self, grid: SigmaGrid = "training") -> None:
        self._grid = sigma_grid(grid)

    def schedule(self, steps: int, shift: float) -> Schedule:
        """sigmas `[steps + 1]` and int64 timesteps `[steps]`; ValueError for steps < 1 or shift <= 0."""
        return make_schedule(shift_sigmas(self._grid(steps), shift), truncate=True)

    def start(self, schedule: Schedule) -> dict[str, Any]:
        """`{"i", "sigmas"}`; `step` adds `data` (the last predicted data), `older_data` and `sample` (the last corrected one).

        ValueError where the sigmas reach 1 or repeat: the solver works on log((1 - sigma) / sigma).
        """
        state = start_state(schedule)
        sigmas = state["sigmas"]
        if sigmas[0] >= 1 or not bool((sigmas[:-1] > sigmas[1:]).all()):
            raise ValueError(f"UniPC needs strictly falling sigmas below 1, got {sigmas[:3].tolist()} ...; use the grid 'training'")
        return state

    def step(self, state: dict[str, Any], velocity: Tensor, sample: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """The sample at the next sigma, in the dtype and on the device of `sample`."""
        i, sigmas = next_index(state), state["sigmas"]
        data = sample - sigmas[i] * velocity.to(sample.dtype)
        sample = _correct(state, data) if i else sample.clone()
        if i:
            state["older_data"] = state["data"]
        state.update(data=data, sample=sample, i=i + 1)
        return _predict(state, i)


def _predict(state: dict[str, Any], i: int) -> Tensor:
    """UniP: from sigmas[i] to sigmas[i + 1]."""
    base, gain, _ = _first_order(state, i)
    return base - gain * (0.5 * _curvature(state, i)) if _order(state, i) == 2 else base


def _correct(state: dict[str, Any], data: Tensor) -> Tensor:
    """UniC: the last step again, from sigmas[i - 1] to sigmas[i], now that `data` at its end is known."""
    i = state["i"] - 1
    base, gain, h = _first_order(state, i)
    change = data - state["data"]
    if _order(state, i) == 1:
        return base - gain * (0.5 * change)
    rho = _corrector_weights(h, _ratio(state["sigmas"], i))
    return base - gain * (rho[0] * _curvature(state, i) + rho[1] * change)


def _order(state: dict[str, Any], i: int) -> int:
    """Order of step i: bounded by the past data there is, and 1 for the last step."""
    return min(ORDER, i + 1, len(state["sigmas"]) - 1 - i)


def _first_order(state: dict[str, Any], i: int) -> tuple[Tensor, Tensor, Tensor]:
    """The order 1 step from the state's sample, the factor of its correction terms, and h, the step in log-SNR / 2."""
    start, end = state["sigmas"][i], state["sigmas"][i + 1]
    h = half_log_snr(end) - half_log_snr(start)
    gain = (1 - end) * torch.expm1(-h)
    return end / start * state["sample"] - gain * state["data"], gain, h


def _curvature(state: dict[str, Any], i: int) -> Tensor:
    """D_1: the difference quotient of the two last data predictions."""
    return (state["older_data"] - state["data"]) / _ratio(state["sigmas"], i)


def _ratio(sigmas: Tensor, i: int) -> Tensor:
    """r_1: the step before step i over step i in half log-SNR; negative."""
    here = half_log_snr(sigmas[i])
    return (half_log_snr(sigmas[i - 1]) - here) / (half_log_snr(sigmas[i + 1]) - here)


def _corrector_weights(h: Tensor, ratio: Tensor) -> Tensor:
    """The weights rho of the order 2 corrector: R rho = b with B(h) = exp(-h) - 1."""
    phi_1 = torch.expm1(-h)
    phi_2 = phi_1 / -h - 1
    phi_3 = phi_2 / -h - 0.5
    nodes = torch.stack([ratio, torch.ones_like(ratio)])
    return torch.linalg.solve(torch.stack([torch.ones_like(nodes), nodes]), torch.stack([phi_2 / phi_1, phi_3 * 2 / phi_1]))

"""Schedules and trajectories of the official samplers (case `schedulers`), and `get_sampling_sigmas` (case `sizes`)."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from wan_dit.schedulers import DPMpp, Euler, UniPC
from wan_dit.schedulers.schedule import linear_sigmas, shift_sigmas

FOLDER = Path(os.environ.get("WAN_GOLDEN") or Path(__file__).parent / "golden")
CASE = json.loads((FOLDER / "schedulers.json").read_text())
SIZES = json.loads((FOLDER / "sizes.json").read_text())
TENSORS = load_file(FOLDER / "schedulers.safetensors")
SOLVERS = {"unipc": UniPC, "dpmpp": DPMpp}

pytestmark = pytest.mark.golden


def runs(*solvers: str) -> list[Any]:
    return [pytest.param(run, id=run["name"]) for run in CASE["runs"] if run["solver"] in solvers]


def trajectory(run: dict[str, Any]) -> Tensor:
    """`[N + 1, ...]` on the flow that the case's `convention` defines."""
    solver = SOLVERS[run["solver"]]()
    schedule = solver.schedule(run["steps"], run["shift"])
    state, samples = solver.start(schedule), [TENSORS["inputs/x"]]
    for t in schedule.timesteps:
        x = samples[-1]
        samples.append(solver.step(state, torch.sin(3 * x) * (0.5 + t / 1000) + 0.1 * x, x))
    return torch.stack(samples)


@pytest.mark.parametrize("run", runs("unipc", "dpmpp"))
def test_sigmas_and_timesteps_are_the_official_ones_to_the_bit(run: dict[str, Any]) -> None:
    schedule = SOLVERS[run["solver"]]().schedule(run["steps"], run["shift"])
    for name in ("sigmas", "timesteps"):
        assert torch.equal(getattr(schedule, name), TENSORS[f"outputs/{run['name']}/{name}"])
    assert str(schedule.timesteps.dtype) == f"torch.{run['timestep_dtype']}"
    assert str(schedule.sigmas.dtype) == f"torch.{run['sigma_dtype']}"


@pytest.mark.parametrize("run", runs("unipc", "dpmpp"))
def test_trajectories_are_the_official_ones(run: dict[str, Any]) -> None:
    expected, tolerance = TENSORS[f"outputs/{run['name']}/trajectory"], CASE["tolerance"]
    torch.testing.assert_close(trajectory(run), expected, rtol=tolerance["trajectory_rtol"], atol=tolerance["trajectory_atol"])


@pytest.mark.parametrize("run", runs("dpmpp"))
def test_euler_runs_on_the_official_sampling_sigmas(run: dict[str, Any]) -> None:
    expected = TENSORS[f"outputs/{run['name']}/sampling_sigmas"]
    schedule = Euler().schedule(run["steps"], run["shift"])
    torch.testing.assert_close(schedule.sigmas[:-1], expected, rtol=0, atol=CASE["tolerance"]["sigmas_atol"])
    truncated = schedule.timesteps - TENSORS[f"outputs/{run['name']}/timesteps"]
    assert truncated.min() > -1e-3
    assert truncated.max() < 1 + 1e-3


@pytest.mark.parametrize("case", SIZES["get_sampling_sigmas"], ids=lambda case: f"{case['steps']}_{case['shift']:g}")
def test_sampling_sigmas_are_the_official_ones(case: dict[str, Any]) -> None:
    got = shift_sigmas(linear_sigmas(case["steps"]), case["shift"])
    assert np.abs(got - np.array(case["sigmas"])).max() <= SIZES["tolerance"]["sigmas_atol"]

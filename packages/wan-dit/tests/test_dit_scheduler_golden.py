"""Schedules and trajectories of the official samplers (case `schedulers`)."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from wan_dit.schedulers import Euler, UniPC

FOLDER = Path(os.environ.get("WAN_GOLDEN") or Path(__file__).parent / "golden")
CASE = json.loads((FOLDER / "schedulers.json").read_text())
TENSORS = load_file(FOLDER / "schedulers.safetensors")

pytestmark = pytest.mark.golden


def runs(solver: str) -> list[Any]:
    return [pytest.param(run, id=run["name"]) for run in CASE["runs"] if run["solver"] == solver]


@pytest.mark.parametrize("run", runs("unipc"))
def test_unipc_follows_the_official_trajectory(run: dict[str, Any]) -> None:
    expected = {name: TENSORS[f"outputs/{run['name']}/{name}"] for name in ("sigmas", "timesteps", "trajectory")}
    unipc, tolerance = UniPC(), CASE["tolerance"]
    schedule = unipc.schedule(run["steps"], run["shift"])
    torch.testing.assert_close(schedule.sigmas, expected["sigmas"], rtol=0, atol=tolerance["sigmas_atol"])
    assert torch.equal(schedule.timesteps, expected["timesteps"])
    assert str(schedule.timesteps.dtype) == f"torch.{run['timestep_dtype']}"
    assert str(schedule.sigmas.dtype) == f"torch.{run['sigma_dtype']}"
    state, samples = unipc.start(schedule), [TENSORS["inputs/x"]]
    for t in schedule.timesteps:
        x = samples[-1]
        samples.append(unipc.step(state, torch.sin(3 * x) * (0.5 + t / 1000) + 0.1 * x, x))  # the case's `convention`
    limits = {"rtol": tolerance["trajectory_rtol"], "atol": tolerance["trajectory_atol"]}
    torch.testing.assert_close(torch.stack(samples), expected["trajectory"], **limits)


def test_unipc_sigmas_are_the_official_ones_to_the_bit() -> None:
    for run in CASE["runs"]:
        if run["solver"] == "unipc":
            assert torch.equal(UniPC().schedule(run["steps"], run["shift"]).sigmas, TENSORS[f"outputs/{run['name']}/sigmas"])


@pytest.mark.parametrize("run", runs("dpmpp"))
def test_euler_runs_on_the_official_sampling_sigmas(run: dict[str, Any]) -> None:
    expected = TENSORS[f"outputs/{run['name']}/sampling_sigmas"]
    schedule = Euler().schedule(run["steps"], run["shift"])
    torch.testing.assert_close(schedule.sigmas[:-1], expected, rtol=0, atol=CASE["tolerance"]["sigmas_atol"])
    truncated = schedule.timesteps - TENSORS[f"outputs/{run['name']}/timesteps"]
    assert truncated.min() > -1e-3
    assert truncated.max() < 1 + 1e-3

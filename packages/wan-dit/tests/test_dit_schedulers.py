"""Sigma grids, the solvers with one evaluation a step, and what holds for every registered scheduler."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor
from wan_dit.contracts import Schedule
from wan_dit.plugin import wan_schedulers
from wan_dit.schedulers import DPMpp, Euler, UniPC
from wan_dit.schedulers.schedule import linear_sigmas, make_schedule, shift_sigmas, start_state, training_sigmas

SOLVERS = {"unipc": UniPC(), "euler": Euler(), "dpm++": DPMpp()}
EACH = pytest.mark.parametrize("solver", SOLVERS.values(), ids=SOLVERS)
REGISTERED = {spec.name: spec.load() for spec in wan_schedulers()}

steps_and_shift = given(steps=st.integers(1, 60), shift=st.floats(1, 16))


def flow(sample: Tensor, timestep: Tensor) -> Tensor:
    return torch.sin(3 * sample) * (0.5 + timestep / 1000) + 0.1 * sample


@pytest.mark.parametrize(
    ("steps", "shift", "first", "last", "timesteps"),
    [
        (50, 5, [0.9998, 0.995732, 0.99153], 0.092507, [999, 995, 991, 987, 92]),
        (40, 3, [0.999666, 0.991189, 0.98242], 0.071361, [999, 991, 982, 973, 71]),
        (40, 12, [0.999917, 0.997783, 0.995546], 0.23511, [999, 997, 995, 993, 235]),
        (40, 5, [0.9998, 0.994695, 0.989377], 0.113533, [999, 994, 989, 983, 113]),
        (50, 16, [0.999937], 0.245964, [999]),
    ],
)
def test_official_tables(steps: int, shift: float, first: list[float], last: float, timesteps: list[int]) -> None:
    schedule = UniPC().schedule(steps, shift)
    torch.testing.assert_close(schedule.sigmas[: len(first)], torch.tensor(first), rtol=0, atol=1e-6)
    assert schedule.sigmas[-2].item() == pytest.approx(last, abs=1e-6)
    assert schedule.timesteps[: min(4, len(timesteps))].tolist() == timesteps[:4]
    assert len(timesteps) < 5 or schedule.timesteps[-1].item() == timesteps[4]


# the third: shift 3, which converted folders of T2V-A14B carry
@pytest.mark.parametrize(("boundary", "shift", "high"), [(0.875, 12, 26), (0.9, 5, 15), (0.875, 3, 12)])
def test_high_noise_steps_of_the_two_expert_models(boundary: float, shift: float, high: int) -> None:
    assert int((UniPC().schedule(40, shift).timesteps >= boundary * 1000).sum()) == high


def test_grids_start_where_the_official_ones_do() -> None:
    assert training_sigmas(4)[0] == 0.9990000128746033
    assert linear_sigmas(4).tolist() == [1.0, 0.75, 0.5, 0.25]
    assert shift_sigmas(linear_sigmas(4), 5).tolist() == pytest.approx([1.0, 0.9375, 0.8333333, 0.625])
    assert make_schedule(shift_sigmas(linear_sigmas(4), 5)).timesteps.tolist() == pytest.approx([1000, 937.5, 833.3333, 625])


@EACH
@settings(max_examples=60, deadline=None)
@steps_and_shift
def test_schedules_fall_to_zero(solver: Any, steps: int, shift: float) -> None:
    schedule = solver.schedule(steps, shift)
    assert schedule.sigmas.dtype == torch.float32
    assert schedule.sigmas.shape == (steps + 1,)
    assert schedule.timesteps.shape == (steps,)
    assert schedule.sigmas[-1] == 0
    assert 0.99 < schedule.sigmas[0] <= 1
    assert (schedule.sigmas[1:] < schedule.sigmas[:-1]).all()
    assert (1000 * schedule.sigmas[:-1] - schedule.timesteps).abs().max() < 1.001
    plain = solver.schedule(steps, 1.0)
    assert (schedule.sigmas[1:-1] >= plain.sigmas[1:-1]).all()


@EACH
@settings(max_examples=15, deadline=None)
@steps_and_shift
def test_a_straight_flow_ends_at_the_data(solver: Any, steps: int, shift: float) -> None:
    data, noise = torch.randn(2, 1, 2, 2, 3, 3, generator=torch.Generator().manual_seed(steps))
    schedule = solver.schedule(steps, shift)
    state, sample = solver.start(schedule), torch.lerp(data, noise, schedule.sigmas[0].item())
    for _ in range(steps):
        sample = solver.step(state, noise - data, sample)
    torch.testing.assert_close(sample, data, rtol=0, atol=2e-5)


@EACH
def test_state_goes_through_json_and_safetensors(solver: Any, tmp_path: Path) -> None:
    schedule = solver.schedule(6, 5.0)
    state, sample = solver.start(schedule), torch.randn(1, 4, 2, 3, 4, generator=torch.Generator().manual_seed(1))
    for i, t in enumerate(schedule.timesteps):
        tensors = {name: value for name, value in state.items() if isinstance(value, Tensor)}
        save_file(tensors, tmp_path / "state.safetensors")
        numbers = json.dumps({name: value for name, value in state.items() if name not in tensors})
        again = {**json.loads(numbers), **load_file(tmp_path / "state.safetensors")}
        resumed = solver.step(again, flow(sample, t), sample)
        sample = solver.step(state, flow(sample, t), sample)
        assert torch.equal(resumed, sample), f"differs at i = {i}"


def run(name: str, data: st.DataObject) -> tuple[Any, Schedule]:
    """A registered scheduler and a schedule that it takes."""
    scheduler = REGISTERED[name]
    steps = data.draw(st.just(scheduler.steps) if hasattr(scheduler, "steps") else st.integers(1, 24), label="steps")
    return scheduler, scheduler.schedule(steps, getattr(scheduler, "shift", None) or data.draw(st.floats(1, 16), label="shift"))


def advance(scheduler: Any, state: dict[str, Any], schedule: Schedule, sample: Tensor, until: int) -> Tensor:
    generator = torch.Generator().manual_seed(7)  # a new one wherever a run goes on: its state is not part of what is kept
    while state["i"] < until:
        sample = scheduler.step(state, flow(sample, schedule.timesteps[state["i"]]), sample, generator)
    return sample


@pytest.mark.parametrize("name", REGISTERED)
@settings(max_examples=20, deadline=None)
@given(data=st.data())
def test_a_run_stopped_anywhere_resumes_to_the_same_bits(name: str, data: st.DataObject) -> None:
    scheduler, schedule = run(name, data)
    count, noise = len(schedule.timesteps), torch.randn(1, 2, 1, 3, 4, generator=torch.Generator().manual_seed(1))
    expected = advance(scheduler, scheduler.start(schedule), schedule, noise, count)
    state = scheduler.start(schedule)
    sample = advance(scheduler, state, schedule, noise, data.draw(st.integers(0, count), label="stopped at"))
    file = io.BytesIO()
    torch.save({"state": state, "sample": sample}, file)
    file.seek(0)
    kept = torch.load(file, weights_only=True)
    assert torch.equal(advance(scheduler, kept["state"], schedule, kept["sample"], count), expected)


@pytest.mark.parametrize("name", REGISTERED)
def test_the_state_does_not_share_what_the_caller_gave(name: str) -> None:
    scheduler = REGISTERED[name]
    schedule = scheduler.schedule(getattr(scheduler, "steps", 3), getattr(scheduler, "shift", None) or 5.0)
    results = []
    for overwrite in (False, True):
        state, noise = scheduler.start(schedule), torch.ones(1, 1, 1, 2, 2)
        velocity = flow(noise, schedule.timesteps[0])
        sample = scheduler.step(state, velocity, noise, torch.Generator().manual_seed(0))
        if overwrite:
            noise.zero_()
            velocity.zero_()
        results.append(scheduler.step(state, flow(sample, schedule.timesteps[1]), sample))
    assert torch.equal(*results)


@pytest.mark.parametrize("solver", [UniPC(), DPMpp()], ids=["unipc", "dpm++"])
def test_repeated_timesteps_are_steps_of_their_own(solver: Any) -> None:
    """Truncation makes neighbours equal at a high shift; what is looked up by timestep would take one of them twice."""
    schedule = solver.schedule(200, 16.0)
    assert len(schedule.timesteps.unique()) < 200
    assert len(schedule.sigmas.unique()) == 201
    sample = torch.randn(1, 2, 1, 3, 4, generator=torch.Generator().manual_seed(1))
    exact = sample * (schedule.sigmas[100] - 0.5) / (schedule.sigmas[0] - 0.5)
    state = solver.start(schedule)
    for i in range(100):  # a straight flow through sigma 1/2, where every sample is 0: the velocity depends on the true sigma
        sample = solver.step(state, sample / (schedule.sigmas[i] - 0.5), sample)
    torch.testing.assert_close(sample, exact, rtol=1e-4, atol=1e-5)


def test_order_two_is_closer_than_euler() -> None:
    """On a flow with a known end: data drawn from N(0, 1/4)."""
    errors = {}
    for name, solver in SOLVERS.items():
        schedule = make_schedule(shift_sigmas(training_sigmas(20), 3.0))
        state, sample = solver.start(schedule), torch.ones(1, 1, 1, 1, 1)
        for sigma in schedule.sigmas[:-1]:
            sample = solver.step(state, sample * (sigma - (1 - sigma) / 4) / ((1 - sigma) ** 2 / 4 + sigma**2), sample)
        errors[name] = abs(sample.item() - 0.5 / ((1 - schedule.sigmas[0]) ** 2 / 4 + schedule.sigmas[0] ** 2).sqrt().item())
    assert errors["unipc"] < 0.25 * errors["euler"]  # the last step is of order 1 in all
    assert errors["dpm++"] < 0.25 * errors["euler"]


@EACH
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_samples_keep_their_dtype(solver: Any, dtype: torch.dtype) -> None:
    schedule = solver.schedule(3, 5.0)
    state, sample = solver.start(schedule), torch.ones(1, 1, 1, 2, 2, dtype=dtype)
    for _ in range(3):
        sample = solver.step(state, torch.full(sample.shape, 0.5), sample)
        assert sample.dtype == dtype
        assert sample.isfinite().all()


@EACH
@pytest.mark.parametrize(
    ("steps", "shift", "message"),
    [
        (0, 5.0, "steps is 0"),
        (2.5, 5.0, "steps is 2.5"),
        (4, 0.0, "shift is 0.0"),
        (4, -3.0, "shift is -3.0"),
        (4, float("nan"), "shift is nan"),
    ],
)
def test_bad_runs_are_refused(solver: Any, steps: Any, shift: float, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        solver.schedule(steps, shift)


@EACH
def test_a_run_ends(solver: Any) -> None:
    state, sample = solver.start(solver.schedule(1, 1.0)), torch.zeros(1, 1, 1, 2, 2)
    solver.step(state, sample, sample)
    with pytest.raises(ValueError, match="the run is over"):
        solver.step(state, sample, sample)


@pytest.mark.parametrize(
    ("sigmas", "timesteps", "message"),
    [
        ([1.0, 0.5, 0.0], [1000.0], r"sigmas \[E \+ 1\] and timesteps \[E\]"),
        ([0.0, 0.5, 1.0], [0.0, 500.0], "must fall"),
        ([1.0, 0.5, 0.1], [1000.0, 500.0], "must fall"),
        ([14.6, 0.5, 0.0], [1000.0, 500.0], "must fall"),
    ],
)
def test_a_schedule_that_does_not_fall_to_zero_is_refused(sigmas: list[float], timesteps: list[float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        start_state(Schedule(torch.tensor(sigmas), torch.tensor(timesteps)))


def test_unipc_refuses_sigma_one() -> None:
    with pytest.raises(ValueError, match="below 1"):
        UniPC().start(Euler().schedule(4, 5.0))


def test_schedulers_import_without_diffusers() -> None:
    code = (
        "import sys; sys.modules['diffusers'] = None; import wan_dit.schedulers as s;"
        "s.UniPC().schedule(4, 5.0); assert not [m for m in sys.modules if m.startswith('diffusers.')]"
    )
    subprocess.run([sys.executable, "-c", code], check=True)

"""diffusers' schedulers behind our protocol: the same sigmas and, where the solver is the same, the same bits."""

from __future__ import annotations

import io
import json
import pickle
import warnings
from typing import Any

import diffusers.schedulers as theirs
import numpy as np
import pytest
import torch
from torch import Tensor
from wan_dit.contracts import Schedule
from wan_dit.plugins import find
from wan_dit.schedulers import DiffusersScheduler, DPMpp, Euler, Heun, UniPC, as_scheduler
from wan_dit.schedulers.diffusers import config_differences
from wan_dit.schedulers.schedule import SIGMA_MAX

GRIDS = [(steps, shift) for steps in (1, 2, 4, 20, 40, 50) for shift in (1.0, 3.0, 5.0, 8.0, 12.0, 16.0)]


def noise(batch: int = 1) -> Tensor:
    return torch.randn(batch, 4, 2, 3, 4, generator=torch.Generator().manual_seed(3))


def flow(sample: Tensor, timestep: Tensor) -> Tensor:
    return torch.sin(3 * sample) * (0.5 + timestep / 1000) + 0.1 * sample


def trajectory(scheduler: Any, steps: int, shift: float) -> list[Tensor]:
    return along(scheduler, scheduler.schedule(steps, shift))


def along(scheduler: Any, schedule: Schedule) -> list[Tensor]:
    state, samples = scheduler.start(schedule), [noise()]
    for i, t in enumerate(schedule.timesteps):
        samples.append(scheduler.step(state, flow(samples[-1], t), samples[-1], torch.Generator().manual_seed(i)))
    return samples


def plain_trajectory(solver: Any) -> list[Tensor]:
    """diffusers' own loop."""
    samples = [noise()]
    for t in solver.timesteps:
        samples.append(solver.step(flow(samples[-1], t), t, samples[-1], return_dict=False)[0])
    return samples


def same(got: list[Tensor], expected: list[Tensor]) -> bool:
    return len(got) == len(expected) and all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


@pytest.mark.parametrize(("steps", "shift"), GRIDS)
def test_unipc_equals_diffusers_on_the_official_grid_to_the_bit(steps: int, shift: float) -> None:
    solver = theirs.UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=shift)
    solver.set_timesteps(sigmas=np.linspace(SIGMA_MAX, 0, steps + 1)[:-1])
    for ours in (UniPC(), DiffusersScheduler(theirs.UniPCMultistepScheduler)):
        schedule = ours.schedule(steps, shift)
        assert torch.equal(schedule.sigmas, solver.sigmas)
        assert torch.equal(schedule.timesteps, solver.timesteps)
    expected = plain_trajectory(solver)
    assert same(trajectory(UniPC(), steps, shift), expected)
    assert same(trajectory(as_scheduler(theirs.UniPCMultistepScheduler), steps, shift), expected)


def test_unipc_equals_diffusers_on_a_batch() -> None:
    solver = theirs.UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=5.0)
    solver.set_timesteps(sigmas=np.linspace(SIGMA_MAX, 0, 7)[:-1])
    unipc = UniPC()
    state, ours, expected = unipc.start(unipc.schedule(6, 5.0)), noise(3), noise(3)
    for t in solver.timesteps:
        ours = unipc.step(state, flow(ours, t), ours)
        expected = solver.step(flow(expected, t), t, expected, return_dict=False)[0]
        assert torch.equal(ours, expected)


@pytest.mark.parametrize(("steps", "shift"), GRIDS)
def test_flow_match_euler_is_ours(steps: int, shift: float) -> None:
    adapted, ours = as_scheduler(theirs.FlowMatchEulerDiscreteScheduler()), Euler()
    assert torch.equal(adapted.schedule(steps, shift).sigmas, ours.schedule(steps, shift).sigmas)
    assert torch.equal(adapted.schedule(steps, shift).timesteps, ours.schedule(steps, shift).timesteps)
    assert same(trajectory(adapted, steps, shift), trajectory(ours, steps, shift))


@pytest.mark.parametrize(("steps", "shift"), GRIDS)
def test_dpm_equals_diffusers_on_the_official_grid_to_the_bit(steps: int, shift: float) -> None:
    """diffusers has no setting for that grid; the adapter runs on the schedule that it is started with."""
    schedule = DPMpp().schedule(steps, shift)
    assert same(along(DPMpp(), schedule), along(DiffusersScheduler(theirs.DPMSolverMultistepScheduler), schedule))


@pytest.mark.parametrize(("steps", "shift"), [(1, 5.0), (2, 1.0), (9, 3.0)])
def test_heun_is_that_of_diffusers_on_the_same_grid(steps: int, shift: float) -> None:
    schedule = Heun().schedule(steps, shift)
    got, expected = (along(scheduler, schedule) for scheduler in (Heun(), DiffusersScheduler(theirs.FlowMatchHeunDiscreteScheduler)))
    torch.testing.assert_close(torch.stack(got), torch.stack(expected), rtol=0, atol=2e-6)


def test_the_shift_is_applied_once() -> None:
    """diffusers given the unshifted grid and the shift, as its own pipelines would use it."""
    solver = theirs.FlowMatchEulerDiscreteScheduler(shift=5.0)
    solver.set_timesteps(sigmas=np.linspace(1, 0, 21)[:-1])
    schedule = as_scheduler(theirs.FlowMatchEulerDiscreteScheduler).schedule(20, 5.0)
    torch.testing.assert_close(schedule.sigmas, solver.sigmas, rtol=0, atol=1e-6)
    torch.testing.assert_close(schedule.timesteps, solver.timesteps, rtol=0, atol=1e-3)


def test_the_shift_of_an_instance_gives_way_and_it_is_said() -> None:
    adapted = as_scheduler(theirs.UniPCMultistepScheduler(use_flow_sigmas=True, flow_shift=3.0))
    with pytest.warns(UserWarning, match="made with shift 3; the run's shift 12 is used"):
        schedule = adapted.schedule(40, 12.0)
    assert torch.equal(schedule.sigmas, UniPC().schedule(40, 12.0).sigmas)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        adapted.schedule(40, 3.0)


def test_the_configuration_of_an_instance_is_kept() -> None:
    instance = theirs.UniPCMultistepScheduler(solver_order=3)
    adapted = as_scheduler(instance)
    assert not same(trajectory(adapted, 8, 5.0), trajectory(UniPC(), 8, 5.0))
    by_class = DiffusersScheduler(theirs.UniPCMultistepScheduler, solver_order=3)
    assert same(trajectory(adapted, 8, 5.0), trajectory(by_class, 8, 5.0))
    assert trajectory(adapted, 8, 5.0)[-1].isfinite().all()
    assert instance.num_inference_steps is None, "the caller's object was used"


@pytest.mark.parametrize("name", ["DPMSolverMultistepScheduler", "FlowMatchHeunDiscreteScheduler"])
def test_a_scheduler_on_its_own_grid_says_so_and_equals_its_own_loop(name: str) -> None:
    adapted = as_scheduler(getattr(theirs, name))
    with pytest.warns(UserWarning, match=f"{name} takes no sigmas: it runs on its own grid"):
        got = trajectory(adapted, 6, 5.0)
    if name.startswith("DPM"):
        solver = theirs.DPMSolverMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=5.0)
    else:
        solver = theirs.FlowMatchHeunDiscreteScheduler(shift=5.0)
    solver.set_timesteps(6)
    solver.set_begin_index(0)
    assert same(got, plain_trajectory(solver))


def test_changed_sigmas_are_reported() -> None:
    adapted = DiffusersScheduler(theirs.UniPCMultistepScheduler, shift_terminal=0.1)
    with pytest.warns(UserWarning, match="changes the sigmas it is given"):
        schedule = adapted.schedule(8, 5.0)
    assert schedule.sigmas[-2] == pytest.approx(0.1)


def test_a_stochastic_scheduler_uses_the_generator() -> None:
    adapted = as_scheduler(theirs.FlowMatchLCMScheduler)
    assert same(trajectory(adapted, 4, 5.0), trajectory(adapted, 4, 5.0))
    schedule = adapted.schedule(4, 5.0)
    results = []
    for seed in (0, 1):
        state = adapted.start(schedule)
        results.append(adapted.step(state, noise(), noise(), torch.Generator().manual_seed(seed)))
    assert not torch.equal(*results)


@pytest.mark.parametrize("name", ["UniPCMultistepScheduler", "FlowMatchEulerDiscreteScheduler", "DPMSolverMultistepScheduler"])
@pytest.mark.filterwarnings("ignore:.* takes no sigmas")
def test_state_and_adapter_can_be_saved(name: str) -> None:
    adapted = as_scheduler(getattr(theirs, name))
    schedule, expected = adapted.schedule(5, 5.0), trajectory(adapted, 5, 5.0)
    state = adapted.start(schedule)
    for i, t in enumerate(schedule.timesteps):
        file = io.BytesIO()
        torch.save(state, file)
        file.seek(0)
        state, again = torch.load(file, weights_only=True), pickle.loads(pickle.dumps(adapted))
        assert torch.equal(again.step(state, flow(expected[i], t), expected[i]), expected[i + 1])


def test_a_kept_state_is_not_changed_by_later_steps() -> None:
    adapted = as_scheduler(theirs.UniPCMultistepScheduler)
    schedule, expected = adapted.schedule(5, 5.0), trajectory(adapted, 5, 5.0)
    state = adapted.start(schedule)
    kept = []
    for i, t in enumerate(schedule.timesteps):
        kept.append(dict(state))
        adapted.step(state, flow(expected[i], t), expected[i])
    for i, t in enumerate(schedule.timesteps):
        assert torch.equal(adapted.step(kept[i], flow(expected[i], t), expected[i]), expected[i + 1])


def test_names_people_type() -> None:
    assert isinstance(as_scheduler(find("wan_schedulers", "unipc").load()), UniPC)
    assert isinstance(as_scheduler(find("wan_schedulers", "diffusers.schedulers:UniPCMultistepScheduler").load()), DiffusersScheduler)
    assert isinstance(as_scheduler(Euler), Euler)
    ours = Euler()
    assert as_scheduler(ours) is ours


@pytest.mark.parametrize("scheduler", [theirs.EulerDiscreteScheduler, theirs.DDIMScheduler(), object(), "unipc"])
def test_what_is_no_flow_scheduler_is_refused(scheduler: Any) -> None:
    with pytest.raises(ValueError, match="is not a flow-matching scheduler"):
        as_scheduler(scheduler)


def test_bad_use_is_refused() -> None:
    with pytest.raises(ValueError, match="has no field solver_odrer; it takes"):
        DiffusersScheduler(theirs.UniPCMultistepScheduler, solver_odrer=3)
    with pytest.raises(ValueError, match="FlowMatchEulerDiscreteScheduler cannot be used: sigmas must fall"):
        DiffusersScheduler(theirs.FlowMatchEulerDiscreteScheduler, invert_sigmas=True).schedule(4, 5.0)
    with pytest.raises(ValueError, match="steps is 0"):
        as_scheduler(theirs.DPMSolverMultistepScheduler).schedule(0, 5.0)


UNIPC_FILE = {"_class_name": "UniPCMultistepScheduler", "prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0}


@pytest.mark.parametrize(
    ("config", "lines"),
    [
        ({}, ["shift 3 in scheduler_config.json, the model's official shift 12 is used"]),
        ({"flow_shift": 12}, []),
        (
            {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 12.0, "flow_shift": 12.0},
            ["FlowMatchEulerDiscreteScheduler (here: euler) in scheduler_config.json, unipc is used"],
        ),
        ({"_class_name": "SASolverScheduler", "flow_shift": 12.0}, ["SASolverScheduler in scheduler_config.json, unipc is used"]),
        (
            {"use_flow_sigmas": False, "prediction_type": "epsilon"},
            [
                "UniPCMultistepScheduler in scheduler_config.json has use_flow_sigmas False and prediction_type 'epsilon', which is not "
                "flow matching; unipc is used"
            ],
        ),
        (
            {"use_dynamic_shifting": True},
            ["a shift that depends on the size in scheduler_config.json, the model's official shift 12 is used"],
        ),
    ],
)
def test_a_contradiction_of_a_folder_is_told(config: dict[str, Any], lines: list[str]) -> None:
    assert config_differences({**UNIPC_FILE, **config}, scheduler="unipc", shift=12.0) == lines


def test_a_file_that_diffusers_writes_is_read() -> None:
    unipc = theirs.UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=5.0)
    for solver, name in ((unipc, "unipc"), (theirs.FlowMatchEulerDiscreteScheduler(shift=5.0), "euler")):
        assert config_differences(json.loads(solver.to_json_string()), scheduler=name, shift=5.0) == []
    plain = {"_class_name": "FlowMatchEulerDiscreteScheduler"}  # diffusers runs it with shift 1
    assert config_differences(plain, scheduler="euler", shift=3.0) == [
        "shift 1 in scheduler_config.json, the model's official shift 3 is used"
    ]


@pytest.mark.parametrize("shift", ["3", None, 0, -3.0, float("nan"), True])
def test_a_broken_scheduler_config_is_refused(shift: Any) -> None:
    with pytest.raises(ValueError, match=r"the shift of scheduler_config\.json is"):
        config_differences({**UNIPC_FILE, "flow_shift": shift}, scheduler="unipc", shift=5.0)
    with pytest.raises(ValueError, match="names its class in `_class_name`, got None"):
        config_differences({"flow_shift": 3.0}, scheduler="unipc", shift=5.0)

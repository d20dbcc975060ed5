"""Fixed step lists: which timesteps the model gets, how noise comes back, and what is said where a list is misused."""

from __future__ import annotations

import math
import warnings
from typing import Any

import diffusers.schedulers as theirs
import pytest
import torch
from torch import Tensor
from wan_dit.plugins import find
from wan_dit.schedulers import LCM, DPMpp, Euler, Heun, StepList, TrigFlow, UniPC

RAW = (1000, 750, 500, 250)
SHIFTED = (1000, 937.5, 833.3333, 625)


def named(name: str) -> Any:
    return find("wan_schedulers", name).load()


def flow(sample: Tensor, timestep: Tensor) -> Tensor:
    return torch.sin(3 * sample) * (0.5 + timestep / 1000) + 0.1 * sample


def run(scheduler: Any, steps: int, shift: float, seed: int = 0) -> Tensor:
    schedule = scheduler.schedule(steps, shift)
    generator = torch.Generator().manual_seed(seed)
    state, sample = scheduler.start(schedule), torch.randn(1, 4, 2, 3, 4, generator=generator)
    for t in schedule.timesteps:
        sample = scheduler.step(state, flow(sample, t), sample, generator)
    return sample


@pytest.mark.parametrize(
    ("name", "steps", "shift", "timesteps"),
    [
        ("lightx2v-4step", 4, 5.0, [1000, 937.5, 833.3333, 625]),
        ("self-forcing-4step", 4, 5.0, [1000, 937.5, 833.3333, 625]),
        ("self-forcing-8step", 8, 12.0, [1000, 985.507, 965.517, 936.170, 865.979, 819.876, 750, 631.579]),
        ("fastwan-3step", 3, 8.0, [1000, 757, 522]),
        ("rcm-4step", 4, 5.0, [987.654, 933.781, 852.895, 608.979]),
        ("rcm-i2v-4step", 4, 5.0, [995.025, 933.781, 852.895, 608.979]),
    ],
)
def test_timesteps_of_the_published_lists(name: str, steps: int, shift: float, timesteps: list[float]) -> None:
    scheduler = named(name)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        schedule = scheduler.schedule(steps, shift)
    assert scheduler.steps == steps
    assert schedule.timesteps.tolist() == pytest.approx(timesteps, abs=1e-3)
    assert schedule.timesteps.dtype == torch.float32  # not truncated
    assert schedule.sigmas[-1] == 0


def test_each_expert_runs_two_steps_of_four() -> None:
    for name, boundary in (("lightx2v-4step", 875), ("lightx2v-4step", 900), ("rcm-i2v-4step", 900)):
        scheduler = named(name)
        assert int((scheduler.schedule(4, 5.0).timesteps >= boundary).sum()) == 2


def test_lightx2v_is_euler_and_self_forcing_is_lcm() -> None:
    assert torch.equal(run(named("lightx2v-4step"), 4, 5.0), run(Euler(), 4, 5.0))
    assert torch.equal(run(named("self-forcing-4step"), 4, 5.0), run(LCM(), 4, 5.0))
    assert not torch.equal(run(named("self-forcing-4step"), 4, 5.0), run(Euler(), 4, 5.0))


def test_fastwan_solves_on_the_nearest_training_sigmas() -> None:
    """FastVideo looks them up in the 1000 sigmas of FlowMatchEulerDiscreteScheduler(shift=8)."""
    table = theirs.FlowMatchEulerDiscreteScheduler(shift=8.0)
    nearest = [table.sigmas[(table.timesteps - t).abs().argmin()].item() for t in (1000, 757, 522)]
    assert named("fastwan-3step").schedule(3, 5.0).sigmas[:-1].tolist() == pytest.approx(nearest, abs=1e-7)


def test_the_step_of_lcm_is_that_of_diffusers() -> None:
    """With the noise that diffusers draws put in its place."""
    solver = theirs.FlowMatchLCMScheduler(shift=5.0)
    solver.set_timesteps(sigmas=[1.0, 0.75, 0.5, 0.25])
    x = torch.randn(1, 4, 2, 3, 4, generator=torch.Generator().manual_seed(1))
    expected = solver.step(flow(x, solver.timesteps[0]), solver.timesteps[0], x, torch.Generator().manual_seed(9), return_dict=False)[0]
    lcm = LCM()
    state = {**lcm.start(lcm.schedule(4, 5.0)), "seed": 9}
    torch.testing.assert_close(lcm.step(state, flow(x, torch.tensor(1000.0)), x), expected, rtol=0, atol=1e-6)


def test_fresh_noise_has_the_strength_of_its_sigma() -> None:
    lcm = LCM()
    schedule = lcm.schedule(4, 5.0)
    state, data = lcm.start(schedule), torch.full((1, 1, 1, 200, 200), 3.0)
    sample = torch.randn(data.shape, generator=torch.Generator().manual_seed(0))
    seen = [sample]
    for sigma, following in zip(schedule.sigmas[:-1], schedule.sigmas[1:], strict=True):
        sample = lcm.step(state, (sample - data) / sigma, sample, torch.Generator().manual_seed(5))
        noise = sample - (1 - following) * data
        assert noise.std().item() == pytest.approx(following.item(), abs=0.02)
        assert abs(noise.mean().item()) < 0.02
        correlation = torch.corrcoef(torch.stack([noise.flatten(), seen[-1].flatten()]))[0, 1]
        assert following == 0 or abs(correlation) < 0.03, "the noise is not fresh"
        seen.append(sample)


def test_a_seed_decides_the_noise_whoever_resumes() -> None:
    lcm = LCM()
    assert torch.equal(run(lcm, 4, 5.0, seed=1), run(LCM(), 4, 5.0, seed=1))
    schedule, x = lcm.schedule(4, 5.0), torch.ones(1, 1, 1, 2, 2)
    state = lcm.start(schedule)
    first = lcm.step(state, flow(x, schedule.timesteps[0]), x, torch.Generator().manual_seed(3))
    kept = dict(state)
    expected = lcm.step(state, flow(first, schedule.timesteps[1]), first, torch.Generator().manual_seed(4))
    assert torch.equal(lcm.step(kept, flow(first, schedule.timesteps[1]), first), expected)
    other = lcm.start(schedule)
    assert not torch.equal(lcm.step(other, flow(x, schedule.timesteps[0]), x, torch.Generator().manual_seed(4)), first)


def test_lists_of_ones_own() -> None:
    raw = StepList(RAW, space="raw", renoise="flow")
    assert torch.equal(raw.schedule(4, 5.0).sigmas, Euler().schedule(4, 5.0).sigmas)
    shifted = StepList(SHIFTED, space="shifted", renoise="flow")
    for shift in (1.0, 5.0, 12.0):  # not used
        assert shifted.schedule(4, shift).timesteps.tolist() == pytest.approx(list(SHIFTED))
    torch.testing.assert_close(shifted.schedule(4, 9.0).sigmas, raw.schedule(4, 5.0).sigmas, rtol=0, atol=1e-6)
    assert torch.equal(StepList([900.0, 300.0], space="raw", renoise="fresh").schedule(2, 1.0).timesteps, torch.tensor([900.0, 300.0]))


@pytest.mark.parametrize("timesteps", [SHIFTED, (1000, 937, 833, 625), (1000, 937.5, 833.33, 624.2)])
@pytest.mark.parametrize("shift", [1.0, 5.0, 8.0])
def test_a_shifted_list_given_as_raw_is_warned_of(timesteps: tuple[float, ...], shift: float) -> None:
    with pytest.warns(UserWarning, match=r"look as if shift 5 were in them already.*declare space='shifted'"):
        StepList(timesteps, space="raw", renoise="flow").schedule(4, shift)


@pytest.mark.parametrize("timesteps", [RAW, (1000,), (999,), (1000, 500), (1000, 757, 522), (1000, 850, 700, 550, 350, 275, 200, 125)])
@pytest.mark.parametrize("shift", [1.0, 1.001, 3.0, 5.0, 8.0, 12.0])
def test_a_raw_list_is_not_warned_of(timesteps: tuple[float, ...], shift: float) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        StepList(timesteps, space="raw", renoise="flow").schedule(len(timesteps), shift)


def test_another_shift_than_that_of_the_list_is_used_and_warned_of() -> None:
    scheduler = named("lightx2v-4step")
    with pytest.warns(UserWarning, match="made for shift 5; the run's shift 12 is used"):
        schedule = scheduler.schedule(4, 12.0)
    assert torch.equal(schedule.sigmas, Euler().schedule(4, 12.0).sigmas)


@pytest.mark.parametrize(
    ("name", "steps", "message"),
    [
        ("lightx2v-4step", 50, "steps is 50; this scheduler runs the 4 timesteps 1000, 750, 500, 250: use 4"),
        ("fastwan-3step", 4, "steps is 4; this scheduler runs the 3 timesteps 1000, 757, 522: use 3"),
        ("rcm-4step", 5, "steps is 5; this scheduler runs 1 to 4 steps"),
        ("rcm-4step", 0, "steps is 0; this scheduler runs 1 to 4 steps"),
    ],
)
def test_other_steps_are_refused(name: str, steps: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        named(name).schedule(steps, 5.0)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"space": "warped"}, "space is 'warped'; a list is 'raw'"),
        ({"renoise": "sde"}, "renoise is 'sde'; it is 'flow'"),
        ({"timesteps": ()}, "a step list falls"),
        ({"timesteps": (1000, 500, 0)}, r"ends above 0 \(the last 0 is not written\)"),
        ({"timesteps": (250, 500)}, "a step list falls"),
        ({"timesteps": (1001, 500)}, "from at most 1000"),
        ({"timesteps": (1000, float("nan"))}, "a step list falls"),
        ({"sigmas": (1.0, 0.5)}, "a raw list has no sigmas of its own"),
        ({"space": "shifted", "sigmas": (1.0,)}, "2 timesteps need as many sigmas, got 1"),
        ({"space": "shifted", "shift": 5.0}, "a shifted list takes no shift, got 5"),
    ],
)
def test_bad_lists_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        StepList(**{"timesteps": (1000, 500), "space": "raw", "renoise": "flow", **settings})


def test_the_trigonometric_flow_is_the_straight_one_scaled() -> None:
    """A point of cos(t) * data + sin(t) * noise over sin + cos is the point of our flow at the sigma of that angle."""
    data, noise = torch.randn(2, 1, 4, 2, 3, 4, generator=torch.Generator().manual_seed(2))
    schedule = TrigFlow().schedule(4, 5.0)
    for angle, sigma in zip((math.atan(80), 1.5, 1.4, 1.0), schedule.sigmas.tolist(), strict=False):
        point = (math.cos(angle) * data + math.sin(angle) * noise) / (math.cos(angle) + math.sin(angle))
        torch.testing.assert_close(point, torch.lerp(data, noise, sigma), rtol=0, atol=1e-5)
    assert schedule.noise_scale == pytest.approx(80 / 81)
    assert TrigFlow(200).schedule(4, 5.0).noise_scale == pytest.approx(200 / 201)
    assert Euler().schedule(4, 5.0).noise_scale == 1


def test_fewer_steps_of_the_trigonometric_flow_are_its_first_angles() -> None:
    four = TrigFlow().schedule(4, 5.0)
    for steps in (1, 2, 3):
        assert torch.equal(TrigFlow().schedule(steps, 5.0).timesteps, four.timesteps[:steps])


def test_the_trigonometric_flow_runs_as_ode_and_as_sde() -> None:
    ode = TrigFlow(renoise="flow")
    assert torch.equal(run(ode, 4, 5.0), run(StepList(ode.schedule(4, 5.0).timesteps.tolist(), space="shifted", renoise="flow"), 4, 5.0))
    assert not torch.equal(run(ode, 4, 5.0), run(TrigFlow(), 4, 5.0))
    with pytest.raises(ValueError, match="angles fall from"):
        TrigFlow(angles=(1.0, 1.4))


@pytest.mark.parametrize("solver", [Euler, DPMpp, LCM, Heun])
def test_a_solver_takes_another_grid(solver: Any) -> None:
    assert torch.equal(solver(grid="training").schedule(7, 5.0).sigmas.unique(), UniPC().schedule(7, 5.0).sigmas.unique())
    halves = solver(grid=lambda steps: 0.5 ** torch.arange(steps).double().numpy())
    assert halves.schedule(3, 1.0).sigmas.unique().tolist() == [0, 0.25, 0.5, 1]
    with pytest.raises(ValueError, match="no sigma grid is called 'karras'; there are linear, training"):
        solver(grid="karras")
    assert run(solver(grid="training"), 7, 5.0).isfinite().all()


def test_unipc_says_which_grid_it_needs() -> None:
    unipc = UniPC(grid="linear")
    with pytest.raises(ValueError, match=r"below 1, .* use the grid 'training'"):
        unipc.start(unipc.schedule(4, 5.0))


def test_heun_says_which_schedule_it_needs() -> None:
    with pytest.raises(ValueError, match="evaluates every sigma but the first twice"):
        Heun().start(Euler().schedule(4, 5.0))

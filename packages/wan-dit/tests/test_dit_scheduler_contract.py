"""The conformance kit of schedulers: ours and diffusers' pass it, deliberately wrong ones fail the test that is about them."""

from __future__ import annotations

import pickle
from typing import Any

import pytest
import torch
from torch import Tensor
from wan_dit.contracts import Schedule, Scheduler
from wan_dit.schedulers import LCM, DiffusersScheduler, DPMpp, Euler, Heun
from wan_dit.testing import SchedulerContract, StepListContract


class TestUniPC(SchedulerContract):
    plugin = "unipc"
    order = 2


class TestDPMpp(SchedulerContract):
    plugin = "dpm++"
    order = 2


class TestHeun(SchedulerContract):
    plugin = "heun"
    order = 2


class TestEuler(SchedulerContract):
    plugin = "euler"


class TestLCM(StepListContract):
    plugin = "lcm"
    runs = ((1, 1.0), (2, 5.0), (7, 3.0), (16, 12.0))


class TestLightX2V(StepListContract):
    plugin = "lightx2v-4step"
    runs = ((4, 5.0),)


class TestSelfForcing(StepListContract):
    plugin = "self-forcing-4step"
    runs = ((4, 5.0),)


class TestSelfForcingA14B(StepListContract):
    plugin = "self-forcing-8step"
    runs = ((8, 12.0),)


class TestFastWan(StepListContract):
    plugin = "fastwan-3step"
    runs = ((3, 8.0),)


class TestRCM(StepListContract):
    plugin = "rcm-4step"
    runs = ((1, 5.0), (2, 5.0), (4, 5.0))


class TestRCMImageToVideo(StepListContract):
    plugin = "rcm-i2v-4step"
    runs = ((3, 5.0), (4, 5.0))


class TestImported(SchedulerContract):
    plugin = "diffusers.schedulers:FlowMatchEulerDiscreteScheduler"


class TestDiffusersUniPC(SchedulerContract):
    plugin = "diffusers.schedulers:UniPCMultistepScheduler"


@pytest.mark.filterwarnings("ignore:.* takes no sigmas")
class TestOwnGrid(SchedulerContract):
    def make(self) -> Scheduler:
        from diffusers.schedulers import DPMSolverMultistepScheduler

        return DiffusersScheduler(DPMSolverMultistepScheduler, solver_order=3)


@pytest.mark.filterwarnings("ignore:.* takes no sigmas")
class TestTwoEvaluationsAStep(SchedulerContract):
    plugin = "diffusers.schedulers:FlowMatchHeunDiscreteScheduler"


class WrongWay(Euler):
    """Moves away from the data."""

    def step(self, state: dict[str, Any], velocity: Tensor, sample: Tensor, generator: torch.Generator | None = None) -> Tensor:
        return super().step(state, -velocity, sample)


class HalfWay(Euler):
    """Exact on a straight flow, but takes the velocity to be constant over two steps."""

    def step(self, state: dict[str, Any], velocity: Tensor, sample: Tensor, generator: torch.Generator | None = None) -> Tensor:
        velocity = state.setdefault("velocity", velocity)
        return super().step(state, velocity, sample)


class Rising(Euler):
    def schedule(self, steps: int, shift: float) -> Schedule:
        right = super().schedule(steps, shift)
        return Schedule(right.sigmas.flip(0), right.timesteps)


class Unfinished(Euler):
    """The last sigma is left out, so that noise stays in the sample."""

    def schedule(self, steps: int, shift: float) -> Schedule:
        right = super().schedule(steps + 1, shift)
        return Schedule(right.sigmas[:-1], right.timesteps[:-1])


class DoublePrecision(Euler):
    def schedule(self, steps: int, shift: float) -> Schedule:
        right = super().schedule(steps, shift)
        return Schedule(right.sigmas.double(), right.timesteps)


class UnitTimesteps(Euler):
    """Timesteps in 0..1."""

    def schedule(self, steps: int, shift: float) -> Schedule:
        right = super().schedule(steps, shift)
        return Schedule(right.sigmas, right.sigmas[:-1])


class NoShift(Euler):
    def schedule(self, steps: int, shift: float) -> Schedule:
        return super().schedule(steps, 1.0)


class Standing(Euler):
    """Never advances the state."""

    def step(self, state: dict[str, Any], velocity: Tensor, sample: Tensor, generator: torch.Generator | None = None) -> Tensor:
        return super().step(dict(state), velocity, sample)


class InPlace(Euler):
    def step(self, state: dict[str, Any], velocity: Tensor, sample: Tensor, generator: torch.Generator | None = None) -> Tensor:
        return sample.copy_(super().step(state, velocity, sample))


class Momentum(Euler):
    """Keeps the last velocity on itself."""

    last: Tensor | None = None

    def step(self, state: dict[str, Any], velocity: Tensor, sample: Tensor, generator: torch.Generator | None = None) -> Tensor:
        last, self.last = self.last if self.last is not None and state["i"] else velocity, velocity
        return super().step(state, (velocity + last) / 2, sample)


class Unsaveable(Euler):
    def start(self, schedule: Schedule) -> dict[str, Any]:
        return {**super().start(schedule), "schedule": schedule}


class FarMidpoint(DPMpp):
    """The difference of the last two data predictions with the wrong sign."""

    def step(self, state: dict[str, Any], velocity: Tensor, sample: Tensor, generator: torch.Generator | None = None) -> Tensor:
        data = sample - state["sigmas"][state["i"]] * velocity
        if "data" in state:
            state["data"] = 2 * data - state["data"]
        return super().step(state, velocity, sample)


class Uncorrected(Heun):
    def step(self, state: dict[str, Any], velocity: Tensor, sample: Tensor, generator: torch.Generator | None = None) -> Tensor:
        if state["i"] % 2:
            velocity = state["velocity"]
        return super().step(state, velocity, sample)


class NoisyEnd(LCM):
    """Mixes noise in at the last step too."""

    def step(self, state: dict[str, Any], velocity: Tensor, sample: Tensor, generator: torch.Generator | None = None) -> Tensor:
        return super().step(state, velocity, sample, generator) + 1e-3 * torch.randn(sample.shape, generator=generator)


@pytest.mark.parametrize(("wrong", "order"), [(FarMidpoint, 2), (Uncorrected, 2), (Euler, 2), (HalfWay, 1)])
def test_a_solver_of_a_lower_order_fails(wrong: type[Any], order: int) -> None:
    class Contract(SchedulerContract):
        def make(self) -> Scheduler:
            return wrong()

    Contract.order = order
    with pytest.raises(AssertionError, match=f"not of order {order}"):
        Contract().test_the_error_falls_with_the_order()


@pytest.mark.parametrize(
    ("wrong", "test"),
    [
        (NoisyEnd, "the_data_a_model_is_sure_of_is_reached"),
        (Rising, "sigmas_fall_from_noise_to_zero"),
        (Unfinished, "sigmas_fall_from_noise_to_zero"),
        (DoublePrecision, "sigmas_fall_from_noise_to_zero"),
        (UnitTimesteps, "timesteps_are_a_thousand_sigmas"),
        (NoShift, "shift_moves_the_grid_towards_noise"),
        (WrongWay, "straight_flow_is_exact_at_every_sigma"),
        (HalfWay, "more_steps_come_closer_on_a_curved_flow"),
        (Standing, "a_step_advances_and_changes_only_the_state"),
        (InPlace, "a_step_advances_and_changes_only_the_state"),
        (Momentum, "interleaved_requests_do_not_meet"),
        (Momentum, "a_saved_state_resumes_to_the_same_bits"),
        (Unsaveable, "a_saved_state_resumes_to_the_same_bits"),
    ],
)
def test_a_wrong_scheduler_fails(wrong: type[Any], test: str) -> None:
    class Contract(SchedulerContract):
        def make(self) -> Scheduler:
            return wrong()

    with pytest.raises(pickle.UnpicklingError if wrong is Unsaveable else AssertionError):
        getattr(Contract(), f"test_{test}")()

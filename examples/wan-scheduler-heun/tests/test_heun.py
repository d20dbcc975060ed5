"""The conformance kit of wan-dit, and what is particular to Heun's method."""

from __future__ import annotations

import pytest
import torch
from wan_dit.contracts import Scheduler
from wan_dit.schedulers import Euler
from wan_dit.testing import SchedulerContract
from wan_scheduler_heun.solver import Heun


class TestHeun(SchedulerContract):
    def make(self) -> Scheduler:
        return Heun()


@pytest.mark.parametrize("steps", [1, 2, 7])
def test_evaluations(steps: int) -> None:
    schedule = Heun().schedule(steps, 3.0)
    assert schedule.timesteps.shape == (2 * steps - 1,)
    assert schedule.sigmas.shape == (2 * steps,)
    assert torch.equal(schedule.sigmas.unique(), Euler().schedule(steps, 3.0).sigmas.unique())


def error(scheduler: Scheduler, steps: int) -> float:
    """Distance to the known end of a flow: data drawn from N(0, 1/4), started from noise of 1."""
    schedule = scheduler.schedule(steps, 1.0)
    state, sample = scheduler.start(schedule), torch.ones(1, 1, 1, 1, 1)
    for sigma in schedule.sigmas[:-1]:
        sample = scheduler.step(state, sample * (sigma - (1 - sigma) / 4) / ((1 - sigma) ** 2 / 4 + sigma**2), sample)
    return abs(sample.item() - 0.5)


def test_it_is_closer_than_euler_at_the_same_cost() -> None:
    assert error(Heun(), 20) < 0.2 * error(Euler(), 39)


def test_the_error_falls_with_the_square_of_the_steps() -> None:
    assert error(Heun(), 16) / error(Heun(), 32) == pytest.approx(4, rel=0.2)

"""What the guard decides, what a signal does, and figures of a run's health; pure, or one process."""

from __future__ import annotations

import math
import os
import random
import signal
import subprocess
import sys
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st
from wan_dit import plan
from wan_dit.config import T2V_1_3B
from wan_train.store.averages import Averages, resolution_key, timestep_key
from wan_train.store.guard import Guard, Limits, Verdict
from wan_train.store.ranks import Ranks
from wan_train.store.signals import Signals
from wan_train.store.stragglers import StepTimes, mfu, peak_rate, training_operations

GO, SKIP, ROLLBACK, STOP = Verdict


def trained(limits: Limits | None = None, steps: int = 200, seed: int = 0) -> Guard:
    """After steps of a falling loss with the noise of small batches."""
    guard, draw = Guard(limits), random.Random(seed)
    for step in range(steps):
        loss = (1 + 2 * math.exp(-step / 50)) * draw.lognormvariate(0, 0.25)
        assert guard.decide(loss, draw.lognormvariate(0, 0.4)) is GO, guard.reason
    return guard


@pytest.mark.parametrize("seed", range(20))
def test_noise_and_a_falling_loss_are_no_spike(seed: int) -> None:
    trained(steps=400, seed=seed)


@pytest.mark.parametrize(
    ("loss", "norm", "reason"),
    [
        (math.nan, 1.0, "the loss is nan"),
        (math.inf, 1.0, "the loss is inf"),
        (1.0, math.nan, "the gradient norm is nan"),
        (1.0, math.inf, "the gradient norm is inf"),
        (50.0, 1.0, "the loss is 50, "),
        (1.0, 90.0, "the gradient norm is 90, "),
    ],
)
def test_a_bad_step_is_skipped_and_says_why(loss: float, norm: float, reason: str) -> None:
    guard = trained()
    assert guard.decide(loss, norm) is SKIP
    assert guard.reason.startswith(reason)
    assert guard.decide(1.0, 1.0) is GO


def test_a_low_loss_is_no_fault_and_spikes_need_a_history() -> None:
    assert trained().decide(1e-6, 1e-6) is GO
    guard = Guard()
    assert [guard.decide(loss, 1.0) for loss in (1.0, 1e6, 1.0)] == [GO] * 3
    assert Guard().decide(math.nan, 1.0) is SKIP, "what is no number needs none"


def test_a_flat_history_makes_no_spike_of_a_ripple() -> None:
    guard = Guard()
    for _ in range(64):
        guard.decide(1.0, 1.0)
    assert guard.decide(1.1, 1.1) is GO
    assert guard.decide(1.5, 1.0) is SKIP


def test_skips_then_rollbacks_then_the_end() -> None:
    guard = trained(Limits(skips=2, rollbacks=2))
    verdicts = [guard.decide(math.nan, 1.0) for _ in range(9)]
    assert verdicts == [SKIP, SKIP, ROLLBACK, SKIP, SKIP, ROLLBACK, SKIP, SKIP, STOP]


def test_a_window_of_good_steps_forgives_a_rollback() -> None:
    guard = trained(Limits(skips=0, rollbacks=1, window=10, start=5, spike=0))
    assert guard.decide(math.nan, 1.0) is ROLLBACK
    for _ in range(10):
        assert guard.decide(1.0, 1.0) is GO
    assert guard.decide(math.nan, 1.0) is ROLLBACK
    assert guard.decide(math.nan, 1.0) is STOP


def test_spikes_do_not_become_the_measure() -> None:
    guard = trained(Limits(skips=1000))
    assert [guard.decide(50.0, 1.0) for _ in range(200)] == [SKIP] * 200


@given(st.lists(st.tuples(st.floats(), st.floats()), max_size=80), st.integers(0, 79))
def test_a_guard_that_is_resumed_decides_alike(figures: list[tuple[float, float]], cut: int) -> None:
    limits = Limits(window=8, start=4, skips=1, rollbacks=1)
    whole, first, second = Guard(limits), Guard(limits), Guard(limits)
    expected = [whole.decide(*given) for given in figures]
    found = [first.decide(*given) for given in figures[:cut]]
    second.load(first.state())
    assert [*found, *(second.decide(*given) for given in figures[cut:])] == expected


def test_a_new_stage_forgets() -> None:
    guard = trained()
    guard.reset()
    assert guard.decide(1000.0, 1000.0) is GO


def test_rollbacks_over_the_border_of_a_stage_come_to_an_end() -> None:
    guard = Guard(Limits(skips=0, rollbacks=2))
    for verdict in (ROLLBACK, ROLLBACK, STOP):
        guard.reset()  # the border, crossed once more
        assert guard.decide(math.nan, 1.0) is verdict


def test_signals_are_noted_and_handlers_put_back() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with Signals() as signals:
        assert signals.exit_code() == 0
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGINT)  # at once: the first one counts
        assert signals.exit_code() == 143
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_second_signal_leaves_at_once() -> None:
    source = "import time; from wan_train.store.signals import Signals\nwith Signals():\n  print('ready', flush=True)\n"
    source += "  try:\n    while True: time.sleep(0.01)\n  finally: print('late')"
    with subprocess.Popen([sys.executable, "-c", source], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGINT)
        time.sleep(1.3)
        assert process.poll() is None, "the first one waits for the step"
        process.send_signal(signal.SIGTERM)
        out, err = process.communicate(timeout=30)
    assert process.returncode == 143
    assert out == ""
    assert err == "SIGINT: the run saves after this step and ends; once more ends it at once\n"


def test_operations_of_a_step_are_three_forwards_of_the_plan() -> None:
    video, image = (81, 480, 832), (1, 480, 832)
    forward = plan.operations(T2V_1_3B, 32_760)
    assert training_operations(T2V_1_3B, [video]) == 3 * (forward.products + forward.attention + forward.context)
    both = training_operations(T2V_1_3B, [video, image])
    assert both == training_operations(T2V_1_3B, [video]) + training_operations(T2V_1_3B, [image])
    with pytest.raises(ValueError, match="80 frames"):
        training_operations(T2V_1_3B, [(80, 480, 832)])


def test_mfu_and_the_rates_of_devices() -> None:
    assert mfu(989e12, 2.0, 1, 989e12) == 0.5
    assert mfu(989e12, 2.0, 4, 989e12) == 0.125
    assert peak_rate("NVIDIA H100 80GB HBM3") == 989e12
    assert peak_rate("NVIDIA H100 PCIe") == 756e12
    assert peak_rate("a device of tomorrow") is None


def test_step_times_begin_anew() -> None:
    times, ranks = StepTimes(), Ranks()
    assert times.figures(ranks) == {}
    times.add(1.0)
    times.add(3.0)
    assert times.figures(ranks) == {"step_seconds": 2.0, "step_seconds_max": 2.0, "straggling": 1.0, "slowest_rank": 0}
    assert times.figures(ranks) == {}


@given(st.lists(st.tuples(st.floats(0, 1), st.floats(-1e9, 1e9)), min_size=1))
def test_means_by_timestep_do_not_depend_on_the_order_of_samples(samples: list[tuple[float, float]]) -> None:
    def means(given_samples: list[tuple[float, float]]) -> dict[str, float]:
        averages = Averages()
        for sigma, loss in given_samples:
            averages.add([timestep_key(sigma)], [loss])
        return averages.reduced(Ranks())

    assert means(samples) == means(samples[::-1])
    assert set(means(samples)) <= {timestep_key(index / 10) for index in range(10)}


def test_keys_of_figures() -> None:
    assert [timestep_key(sigma) for sigma in (0.0, 0.35, 0.999, 1.0)] == ["loss_t/0-0.1", "loss_t/0.3-0.4", "loss_t/0.9-1", "loss_t/0.9-1"]
    assert resolution_key(81, 480, 832) == "loss_shape/81x480x832"

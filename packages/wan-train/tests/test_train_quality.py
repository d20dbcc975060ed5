"""What the built-in models must stay good for: the figures of docs/tiny-models.md, with the room that another CPU's rounding needs."""

from __future__ import annotations

import pytest
from wan_train.evaluation.generated import evaluate_model, evaluate_vae


def test_the_tiny_vae_keeps_what_the_evaluator_reads() -> None:
    true, coded = evaluate_vae("tiny", count=24)
    assert (true["all_right"], coded["all_right"]) == (1.0, 1.0)
    assert float(coded["psnr"]) > 34


@pytest.mark.slow
def test_the_tiny_model_draws_what_its_prompts_ask_for() -> None:
    everything, seen, held_out = evaluate_model("tiny", count=200)
    assert everything["colour"] >= 0.97
    assert everything["motion"] >= 0.97
    assert everything["background"] >= 0.97
    assert everything["shape"] >= 0.95
    assert seen["all_right"] >= 0.96
    assert held_out["all_right"] >= 0.94

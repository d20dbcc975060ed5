"""AdamW with moments in 8 bits: near AdamW, a quarter of its memory, and resumed to the bit."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from wan_dit.lora import load_lora
from wan_train.config import OptimiserConfig, TrainConfig
from wan_train.optim import Optimiser
from wan_train.planning.job import MOMENTS
from wan_train.store.shards import read_whole
from wan_train.trainer import Trainer

LORA = {"init": "pretrained", "architecture": "{}", "text_architecture": "{}", "train_text_encoder": "false", "train": "lora"}


@pytest.fixture
def eager() -> Iterator[None]:
    """torchao compiles its step, which takes longer than these tests."""
    with torch.compiler.set_stance("force_eager"):
        yield


def stepped(name: Any, steps: int = 20) -> tuple[torch.Tensor, Optimiser]:
    """A weight after some steps on gradients that are given."""
    weight = nn.Parameter(torch.randn(64, 128, generator=torch.Generator().manual_seed(0)))
    optimiser = Optimiser(OptimiserConfig(name=name, lr=1e-2, warmup=5, clip=0.0), [{"params": [weight]}], steps)
    for step in range(steps):
        weight.grad = torch.randn(64, 128, generator=torch.Generator().manual_seed(step % 3))
        optimiser.step(step, 1.0)
    return weight.detach(), optimiser


@pytest.mark.usefixtures("eager")
def test_it_is_near_adamw_in_a_quarter_of_the_memory() -> None:
    start = torch.randn(64, 128, generator=torch.Generator().manual_seed(0))
    (found, optimiser), (expected, _) = stepped("adamw8bit"), stepped("adamw")
    assert (found - expected).norm() < 0.02 * (expected - start).norm()
    (state,) = optimiser.parts[0][0].state.values()
    parts = [state[moment] for moment in ("exp_avg", "exp_avg_sq")]
    size = sum(part.codes.nbytes + part.scale.nbytes for part in parts)
    assert size == MOMENTS["adamw8bit"] * found.numel()


@pytest.mark.usefixtures("eager")
def test_a_run_resumes_to_the_bit(flow_recipe: Callable[..., TrainConfig], nonzero: Path, tmp_path: Path) -> None:
    own = [f"objective.settings.{name}={value}" for name, value in {**LORA, "backbone": nonzero, "lora.rank": 96}.items()]
    own += ["optimiser.name=adamw8bit", "steps=4", "save_every=2"]
    whole, parts = (flow_recipe(*own, f"output={tmp_path / name}") for name in ("whole", "parts"))
    Trainer(whole).run()
    Trainer(parts).run(until=2)
    Trainer(parts).run(resume=True)
    first, second = (load_lora(tmp_path / name / "export" / "lora.safetensors") for name in ("whole", "parts"))
    for one, two in zip(first.deltas, second.deltas, strict=True):
        assert all(torch.equal(one.parts[part], two.parts[part]) for part in one.parts)
    kept = [read_whole(tmp_path / name / "checkpoints" / "step-00000004", "optimisers/") for name in ("whole", "parts")]
    codes = [name for name in kept[0] if name.endswith("exp_avg/codes")]
    assert len(codes) == 40
    assert all(kept[0][name].dtype == torch.uint8 and kept[0][name].any() for name in codes)
    assert all(torch.equal(value, kept[1][name]) for name, value in kept[0].items())


def test_without_torchao_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchao.optim", None)
    with pytest.raises(ValueError, match=r"adamw8bit is torchao's, which is not installed: pip install wan-train\[torchao\]"):
        stepped("adamw8bit")

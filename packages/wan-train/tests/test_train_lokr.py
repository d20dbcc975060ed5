"""LoKr beside a frozen backbone: gradients by the chain rule, shapes as LyCORIS has them, and a file that gives the trained velocity."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from adapted import frozen_state, tokens, trained, velocity
from safetensors import safe_open
from torch import nn
from wan_dit import load_backbone
from wan_dit.lora import LoraSpec, apply, load_lora
from wan_train.config import TrainConfig
from wan_train.objectives.adapters import Adapter, LoraSettings
from wan_train.objectives.flow import RectifiedFlow
from wan_train.planning.measured import Saved
from wan_train.randomness import generator
from wan_train.trainer import Trainer
from wan_vae.footprint import Meter

Make = Callable[..., RectifiedFlow]


@pytest.mark.parametrize(
    ("out", "given", "rank", "factor", "shapes"),
    [
        (5120, 13824, 16, 8, {"lokr_w1": (8, 8), "lokr_w2_a": (640, 16), "lokr_w2_b": (16, 1728)}),
        (1536, 8960, 4, 7, {"lokr_w1": (6, 7), "lokr_w2_a": (256, 4), "lokr_w2_b": (4, 1280)}),
        (48, 64, 4, 8, {"lokr_w1": (6, 8), "lokr_w2": (8, 8)}),  # rank 4 is half of 8
        (48, 64, 3, 8, {"lokr_w1": (6, 8), "lokr_w2_a": (8, 3), "lokr_w2_b": (3, 8)}),
        (12, 12, 1, 100, {"lokr_w1": (3, 3), "lokr_w2_a": (4, 1), "lokr_w2_b": (1, 4)}),  # w1 is the smaller one
    ],
)
def test_factors_have_the_shapes_of_lycoris(out: int, given: int, rank: int, factor: int, shapes: dict[str, Any]) -> None:
    adapter = Adapter(nn.Linear(given, out, device="meta"), LoraSettings(kind="lokr", rank=rank, factor=factor, alpha=2.0 * rank))
    assert {name: tuple(part.shape) for name, part in adapter.named_parameters()} == shapes
    assert adapter.scale == (2.0 if "lokr_w2_b" in shapes else 1.0), "alpha has no say of whole factors"


def test_it_starts_from_the_base_and_trains_alone(objective_of: Make, nonzero: Path) -> None:
    objective = objective_of(train="lora", lora={"kind": "lokr", "rank": 2, "factor": 4})
    assert torch.equal(velocity(objective.backbone, tokens()), velocity(load_backbone(str(nonzero)), tokens()))
    before = frozen_state(objective)
    losses = trained(objective, 8)
    assert losses[-1] < losses[0]
    assert all(torch.equal(value, before[name]) for name, value in frozen_state(objective).items())
    assert all(bool(adapter.lokr_w2_b.any()) for adapter in objective.modules["lora"].named().values()), "every layer learnt"


def test_gradients_are_those_of_the_merged_weight_by_the_chain_rule(objective_of: Make) -> None:
    """W' = W + s kron(w1, w2): the gradient of w1 is s times the sum of each block of G times w2, that of w2 of w1 times the blocks."""
    objective = objective_of(train="lora", lora={"kind": "lokr", "rank": 2, "factor": 4, "alpha": 3.0})
    adapters = objective.modules["lora"].named()
    for adapter in adapters.values():
        nn.init.normal_(adapter.lokr_w2_b, std=0.3)
    batch = objective.batch([0, 1], lambda sample, stream: generator(0, 0, sample, stream), 0.0)
    objective.losses(batch)[0].mean().backward()
    merged = objective_of()
    for name, adapter in adapters.items():
        second = adapter.lokr_w2_a @ adapter.lokr_w2_b
        merged.backbone.get_submodule(name).weight.data += 1.5 * torch.kron(adapter.lokr_w1, second).detach()
    merged.losses(batch)[0].mean().backward()
    for name, adapter in adapters.items():
        first, second = adapter.lokr_w1.detach(), (adapter.lokr_w2_a @ adapter.lokr_w2_b).detach()
        whole = merged.backbone.get_submodule(name).weight.grad
        blocks = whole.view(first.shape[0], second.shape[0], first.shape[1], second.shape[1])
        of_second = 1.5 * torch.einsum("aibj,ab->ij", blocks, first)
        expected = {
            "lokr_w1": 1.5 * torch.einsum("aibj,ij->ab", blocks, second),
            "lokr_w2_a": of_second @ adapter.lokr_w2_b.detach().T,
            "lokr_w2_b": adapter.lokr_w2_a.detach().T @ of_second,
        }
        for part, gradient in expected.items():
            torch.testing.assert_close(getattr(adapter, part).grad, gradient, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_no_matrix_is_made_of_the_factors_and_no_more_is_kept_than_of_a_lora(precision: str) -> None:
    layer, x = nn.Linear(768, 768).requires_grad_(False), torch.randn(1, 64, 768, requires_grad=True)
    kept, most = {}, {}
    for kind in ("lora", "lokr"):
        adapter = Adapter(layer, LoraSettings.model_validate({"kind": kind, "rank": 4}))
        held = [x, *adapter.parameters()]
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"), Saved(held) as saved, Meter(held) as meter:
            change = adapter(x)
        change.sum().backward()
        kept[kind], most[kind] = saved.size, meter.peak
    assert kept["lokr"] <= kept["lora"]
    assert most["lokr"] < layer.weight.nbytes / 2


@pytest.mark.parametrize("rank", [2, 16])  # two factors of w2, and one
@pytest.mark.parametrize("format", [None, "comfy", "kohya"])
def test_the_file_reproduces_the_trained_velocity(objective_of: Make, nonzero: Path, tmp_path: Path, format: Any, rank: int) -> None:
    objective = objective_of(train="lora", lora={"kind": "lokr", "rank": rank, "factor": 4, "alpha": 1.0, "format": format})
    trained(objective)
    expected, plain = velocity(objective.backbone, tokens()), velocity(load_backbone(str(nonzero)), tokens())
    assert (expected - plain).abs().max() > 1e-2
    objective.export(objective.modules, str(tmp_path / "out"))
    path = tmp_path / "out" / "lora.safetensors"
    assert {delta.kind for delta in load_lora(path).deltas} == {"lokr"}
    for mode in ("merge", "live"):
        backbone = load_backbone(str(nonzero))
        assert not apply(backbone, [LoraSpec(str(path))], mode=mode).ledger.unmatched
        torch.testing.assert_close(velocity(backbone, tokens()), expected, atol=1e-5, rtol=1e-5)


def test_keys_are_those_of_lycoris(objective_of: Make, tmp_path: Path) -> None:
    objective = objective_of(train="lora", lora={"kind": "lokr", "rank": 2, "targets": r"blocks\.1\.ffn\.2$"})
    objective.export(objective.modules, str(tmp_path))
    with safe_open(tmp_path / "lora.safetensors", "pt") as file:
        assert set(file.keys()) == {f"lora_unet_blocks_1_ffn_2.{part}" for part in ("lokr_w1", "lokr_w2_a", "lokr_w2_b", "alpha")}


def test_a_run_resumes_to_the_bit(flow_recipe: Callable[..., TrainConfig], nonzero: Path, tmp_path: Path) -> None:
    own = (f"objective.settings.backbone={nonzero}", "objective.settings.init=pretrained", "objective.settings.architecture={}")
    own += ("objective.settings.text_architecture={}", "objective.settings.train_text_encoder=false", "objective.settings.train=lora")
    own += ("objective.settings.lora.kind=lokr", "objective.settings.lora.rank=2", "optimiser.name=adamw", "steps=2", "save_every=1")
    whole, parts = (flow_recipe(*own, f"output={tmp_path / name}") for name in ("whole", "parts"))
    Trainer(whole).run()
    Trainer(parts).run(until=1)
    Trainer(parts).run(resume=True)
    first, second = (load_lora(tmp_path / name / "export" / "lora.safetensors") for name in ("whole", "parts"))
    for one, two in zip(first.deltas, second.deltas, strict=True):
        assert all(torch.equal(one.parts[part], two.parts[part]) for part in one.parts)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kind": "lokr", "format": "peft"}, "format = 'peft' has no names for a LoKr: use comfy or kohya"),
        ({"factor": 8}, "factor is of a LoKr: set kind = 'lokr', or leave it out"),
        ({"kind": "lokr", "factor": 0}, r"lora\.factor"),
        ({"kind": "loha"}, r"lora\.kind: .*'lora' or 'lokr'"),
    ],
)
def test_wrong_settings_are_told_in_one_line(objective_of: Make, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        objective_of(train="lora", lora=settings)
    assert "\n" not in str(caught.value)

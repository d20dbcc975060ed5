"""What of a backbone is trained: a LoRA beside it, or its context embedder for another text encoder; the rest stays, to the bit."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from adapted import frozen_state, tokens, trained, velocity
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import ActivationWrapper
from wan_dit import load_backbone
from wan_dit.cli import main
from wan_dit.context_embedder import read_facts, with_context_embedder
from wan_dit.lora import LoraSpec, apply, load_lora
from wan_train.config import TrainConfig
from wan_train.objectives.adapters import LoraSettings, TrainedLora, target_layers
from wan_train.objectives.flow import RectifiedFlow
from wan_train.randomness import generator
from wan_train.store.shards import read_whole
from wan_train.trainer import Trainer

Make = Callable[..., RectifiedFlow]
ACME = Path(__file__).parents[2] / "wan-dit" / "tests" / "thirdparty"


def test_a_lora_starts_from_the_base_and_trains_alone(objective_of: Make, nonzero: Path) -> None:
    objective = objective_of(train="lora", lora={"rank": 4})
    assert torch.equal(velocity(objective.backbone, tokens()), velocity(load_backbone(str(nonzero)), tokens())), "up is zero at first"
    before = frozen_state(objective)
    names = {name for name, _ in objective.modules["lora"].named_parameters()}
    layers = [*(f"{attn}.{x}" for attn in ("self_attn", "cross_attn") for x in "qkvo"), "ffn.0", "ffn.2"]
    assert names == {f"layers.trunk.blocks.{i}.{layer}.{part}" for i in range(2) for layer in layers for part in ("down", "up")}
    assert set(objective.modules) == {"lora"}
    losses = trained(objective, 8)
    assert losses[-1] < losses[0]
    assert all(torch.equal(value, before[name]) for name, value in frozen_state(objective).items())
    assert all(bool(adapter.up.any()) for adapter in objective.modules["lora"].named().values()), "every layer learnt"


def test_frozen_weights_that_change_are_found(objective_of: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """The planted bug: a backbone that is handed to the optimiser with the adapters."""
    groups = TrainedLora.parameter_groups
    monkeypatch.setattr(
        TrainedLora, "parameter_groups", lambda self: [*groups(self), {"params": list(self.backbone.requires_grad_(True).parameters())}]
    )
    objective = objective_of(train="lora", lora={"rank": 4})
    before = frozen_state(objective)
    trained(objective, 1)
    assert not all(torch.equal(value, before[name]) for name, value in frozen_state(objective).items())


def test_gradients_of_a_lora_are_those_of_the_merged_weight_by_the_chain_rule(objective_of: Make) -> None:
    """W' = W + s B A: the gradient of B is s G A^T and that of A s B^T G, where G is that of W'."""
    objective = objective_of(train="lora", lora={"rank": 3, "alpha": 6.0})
    adapters = objective.modules["lora"].named()
    for adapter in adapters.values():
        nn.init.normal_(adapter.up, std=0.1)
    batch = objective.batch([0, 1], lambda sample, stream: generator(0, 0, sample, stream), 0.0)
    loss = objective.losses(batch)[0].mean()
    loss.backward()
    merged = objective_of()
    for name, adapter in adapters.items():
        merged.backbone.get_submodule(name).weight.data += 2.0 * (adapter.up @ adapter.down).detach()
    expected = merged.losses(batch)[0].mean()
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    for name, adapter in adapters.items():
        gradient = merged.backbone.get_submodule(name).weight.grad
        torch.testing.assert_close(adapter.up.grad, 2.0 * gradient @ adapter.down.detach().T, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(adapter.down.grad, 2.0 * adapter.up.detach().T @ gradient, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("format", ["peft", "comfy", "kohya"])
@pytest.mark.parametrize("mode", ["merge", "live"])
def test_the_file_reproduces_the_trained_velocity(objective_of: Make, nonzero: Path, tmp_path: Path, format: str, mode: Any) -> None:
    objective = objective_of(train="lora", lora={"rank": 4, "alpha": 2.0, "format": format})
    trained(objective)
    expected, plain = velocity(objective.backbone, tokens()), velocity(load_backbone(str(nonzero)), tokens())
    assert (expected - plain).abs().max() > 1e-2
    objective.export(objective.modules, str(tmp_path / "out"))
    backbone = load_backbone(str(nonzero))
    applied = apply(backbone, [LoraSpec(str(tmp_path / "out" / "lora.safetensors"))], mode=mode)
    assert not applied.ledger.unmatched
    torch.testing.assert_close(velocity(backbone, tokens()), expected, atol=1e-5, rtol=1e-5)


def test_a_lora_of_an_expert_says_so(objective_of: Make, nonzero: Path, tmp_path: Path) -> None:
    objective = objective_of(train="lora", lora={"rank": 2}, expert="low", boundary=0.875)
    trained(objective, 1)
    objective.export(objective.modules, str(tmp_path / "out"))
    assert load_lora(tmp_path / "out" / "lora.safetensors").experts == ("low",)


def test_averaged_adapters_are_previewed_and_the_live_ones_come_back(objective_of: Make) -> None:
    objective = objective_of(train="lora", lora={"rank": 4})
    trained(objective)
    live = velocity(objective.backbone, tokens())
    other = objective_of(train="lora", lora={"rank": 4}).modules
    with objective.trained.inserted(other) as backbone:
        assert not torch.equal(velocity(backbone, tokens()), live)
    assert torch.equal(velocity(objective.backbone, tokens()), live)
    assert objective.preview(other, [0, 1]).shape == (2, 3, 5, 16, 16)


def test_a_run_keeps_the_adapters_alone_and_resumes_to_the_bit(
    flow_recipe: Callable[..., TrainConfig], nonzero: Path, tmp_path: Path
) -> None:
    own = (f"objective.settings.backbone={nonzero}", "objective.settings.init=pretrained", "objective.settings.architecture={}")
    own += ("objective.settings.text_architecture={}", "objective.settings.train_text_encoder=false", "objective.settings.train=lora")
    own += ("objective.settings.lora.rank=2", "optimiser.name=adamw", "steps=4", "save_every=2")
    whole, parts = (flow_recipe(*own, f"output={tmp_path / name}") for name in ("whole", "parts"))
    Trainer(whole).run()
    Trainer(parts).run(until=2)
    Trainer(parts).run(resume=True)
    first, second = (load_lora(tmp_path / name / "export" / "lora.safetensors") for name in ("whole", "parts"))
    for one, two in zip(first.deltas, second.deltas, strict=True):
        assert all(torch.equal(one.parts[part], two.parts[part]) for part in ("down", "up"))
    checkpoint = tmp_path / "whole" / "checkpoints" / "step-00000004"
    kept = {
        f"layers.{name}.{part}" for name in target_layers(load_backbone(str(nonzero)), LoraSettings().targets) for part in ("down", "up")
    }
    assert all(set(read_whole(checkpoint, f"{kind}/lora/")) == kept for kind in ("modules", "ema"))
    assert set(read_whole(checkpoint, "modules/")) == {f"lora/{name}" for name in kept}, "and nothing of the base"


@pytest.mark.parametrize("train", ["lora", "context_embedder"])
def test_activations_of_a_frozen_base_are_computed_again_to_the_same_bits(
    flow_recipe: Callable[..., TrainConfig], nonzero: Path, tmp_path: Path, train: str
) -> None:
    found = {}
    for policy in ("keep", "recompute"):
        own = (f"objective.settings.backbone={nonzero}", "objective.settings.init=pretrained", "objective.settings.architecture={}")
        own += ("objective.settings.text_architecture={}", "objective.settings.train_text_encoder=false", "preview_every=2")
        trainer = Trainer(
            flow_recipe(*own, f"objective.settings.train={train}", "steps=2", f"memory.policy={policy}", f"output={tmp_path / policy}")
        )
        wrapped = [isinstance(block, ActivationWrapper) for block in trainer.objective.frozen["backbone"].trunk.blocks]
        assert wrapped == 2 * [policy == "recompute"]
        trainer.run()
        found[policy] = {name: value.clone() for name, value in trainer.objective.modules[train].state_dict().items()}
    assert all(torch.equal(value, found["keep"][name]) for name, value in found["recompute"].items())


def test_the_context_embedder_alone_is_trained_for_an_encoder_of_another_width(
    objective_of: Make, tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.syspath_prepend(str(ACME))
    objective = objective_of(train="context_embedder", text_encoder="acme-wide")
    assert objective.backbone.context_embedder[0].weight.shape == (48, 40)
    assert {id(p) for group in objective.parameter_groups() for p in group["params"]} == {
        id(p) for p in objective.backbone.context_embedder.parameters()
    }
    before = frozen_state(objective)
    losses = trained(objective, 6)
    assert losses[-1] < losses[0]
    assert all(torch.equal(value, before[name]) for name, value in frozen_state(objective).items())
    objective.export(objective.modules, str(tmp_path / "out"))
    path = tmp_path / "out" / "context_embedder.safetensors"
    assert read_facts(path) == {"embedding_space": "acme-wide-1", "text_dim": 40, "text_len": 16}
    assert objective.preview(objective.modules, [0, 1]).shape == (2, 3, 5, 16, 16)
    swapped = with_context_embedder(load_backbone(objective.settings.backbone), path)
    torch.testing.assert_close(velocity(swapped, tokens(40)), velocity(objective.backbone, tokens(40)), atol=1e-5, rtol=1e-5)


def test_the_same_encoder_keeps_the_embedder_it_has(objective_of: Make, nonzero: Path) -> None:
    objective = objective_of(train="context_embedder")
    assert torch.equal(velocity(objective.backbone, tokens()), velocity(load_backbone(str(nonzero)), tokens()))


@pytest.mark.parametrize("train", ["context_embedder", "lora"])
def test_what_a_run_exports_is_used_by_a_generation(
    flow_recipe: Callable[..., TrainConfig], tmp_path: Path, monkeypatch: Any, train: str
) -> None:
    """With the built-in backbone, by the commands that a person would type."""
    monkeypatch.syspath_prepend(str(ACME))
    monkeypatch.chdir(tmp_path)
    encoder = "acme-wide" if train == "context_embedder" else "tiny"
    settings = {"vae": "tiny", "init": "pretrained", "architecture": "{}", "text_architecture": "{}", "train_text_encoder": "false"}
    settings |= {"train": train, "text_encoder": encoder, "clips": "2", "preview_prompts": "1", "preview_steps": "1"}
    config = flow_recipe("steps=1", "ema=0", "save_every=0", *(f"objective.settings.{name}={value}" for name, value in settings.items()))
    folder = Trainer(config).run()
    words = ["generate", "a red circle", "--steps", "1", "--frames", "1", "--size", "16x16", "--device", "cpu", "--text-encoder", encoder]
    given = (
        ["--context-embedder", str(folder / "context_embedder.safetensors")]
        if train != "lora"
        else ["--lora", str(folder / "lora.safetensors")]
    )
    assert main([*words, *given, "--output", "a.mp4"]) == 0
    assert (tmp_path / "a.mp4").exists()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"train": "lora", "init": "random"}, r"it needs init = 'pretrained', got 'random'"),
        ({"train": "lora", "lora": {"targets": "nothing"}}, r"lora.targets 'nothing' finds no linear layer .*trunk\.blocks\.0"),
        ({"train": "lora", "lora": {"targets": "("}}, r"is no regular expression"),
        ({"train": "lora", "lora": {"rank": 0}}, r"lora\.rank"),
        ({"train": "context_embedder", "train_text_encoder": True}, r"for a text encoder as it is"),
        ({"train": "some"}, r"train: .*'all', 'lora' or 'context_embedder'"),
    ],
)
def test_wrong_settings_are_told_in_one_line(objective_of: Make, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        objective_of(**settings)
    assert "\n" not in str(caught.value)

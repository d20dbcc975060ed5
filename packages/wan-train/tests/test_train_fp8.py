"""Blocks in float8: which layers, how near bf16 they are, and that all that a run keeps is that of a run without it; emulated on a CPU."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from layout_tasks import train
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torchao.float8.float8_linear import Float8Linear
from wan_dit.config import DiTConfig
from wan_dit.layers import Fp32Linear
from wan_dit.model import WanDiT
from wan_dit.plugins import load_backbone
from wan_train.cli import main
from wan_train.config import TrainConfig
from wan_train.float8 import check_float8, compute_in_float8
from wan_train.objectives.flow import RectifiedFlow
from wan_train.randomness import generator
from wan_train.store.shards import read_whole
from wan_train.trainer import Trainer

Group = Callable[..., list[Any]]
ATTENTION = [f"{kind}.{name}" for kind in ("self_attn", "cross_attn") for name in "qkvo"]
KINDS = DiTConfig(  # of every layer that blocks have; the feed-forward ones have a size that is no multiple of 16
    dim=32, ffn_dim=40, freq_dim=32, text_dim=32, text_len=16, num_heads=2, num_layers=2, in_dim=16, out_dim=16,
    image_dim=32, vace_layers=(0, 1), vace_in_dim=32,
)  # fmt: skip


@pytest.fixture
def own(nonzero: Path) -> list[str]:
    """What makes the recipe `flow_toml` one of a backbone in which no tensor is zero, with a frozen text encoder and 36 tokens a batch."""
    settings = {"backbone": nonzero, "init": "pretrained", "architecture": "{}", "text_architecture": "{}", "train_text_encoder": "false"}
    data = {"frames": 9, "size": "[32, 48]", "length": 8}
    fields = {f"objective.settings.{name}": value for name, value in settings.items()} | {
        f"data.settings.{name}": data[name] for name in data
    }
    return [*(f"{name}={value}" for name, value in fields.items()), "optimiser.name=adamw", "save_every=0"]


def converted(module: nn.Module) -> set[str]:
    return {name for name, layer in module.named_modules() if isinstance(layer, Float8Linear)}


def apart(found: dict[str, Any], expected: dict[str, Any]) -> float:
    """Norm of the difference over that of what is expected, of all gradients together."""
    assert found.keys() == expected.keys()
    one, other = (np.concatenate([np.asarray(given[name]).ravel() for name in expected]) for given in (found, expected))
    return float(np.linalg.norm(one - other) / np.linalg.norm(other))


def test_layers_of_the_blocks_are_converted_and_no_others() -> None:
    model = WanDiT(KINDS)
    model.trunk.modulation = nn.Linear(32, 192)  # as another backbone may have them
    model.trunk.blocks[0].island = Fp32Linear(32, 32)
    before, others = dict(model.named_parameters()), {name: type(layer) for name, layer in model.named_modules()}
    compute_in_float8({"backbone": model, "other": nn.Linear(32, 32)}, emulate=True)
    blocks = {f"trunk.blocks.{i}.{name}" for i in range(2) for name in [*ATTENTION, "cross_attn.k_img", "cross_attn.v_img"]}
    vace = {f"trunk.vace_blocks.{i}.{name}" for i in range(2) for name in [*ATTENTION, "after_proj"]}
    assert converted(model) == blocks | vace | {"trunk.vace_blocks.0.before_proj"}
    assert {name: type(layer) for name, layer in model.named_modules() if name not in converted(model)} == {
        name: kind for name, kind in others.items() if name not in converted(model)
    }
    after = dict(model.named_parameters())
    assert list(after) == list(before), "the order of the optimiser's state"
    assert all(after[name] is value for name, value in before.items())


def test_a_text_encoder_that_is_trained_too_stays(flow_toml: Path) -> None:
    modules = Trainer(TrainConfig.from_toml(flow_toml, ["precision=fp8"])).objective.modules
    assert converted(modules["backbone"]) == {f"trunk.blocks.0.{name}" for name in [*ATTENTION, "ffn.0", "ffn.2"]}
    assert not converted(modules["text_encoder"])


def test_all_else_is_that_of_autocast(flow_toml: Path, own: list[str]) -> None:
    trainer = Trainer(TrainConfig.from_toml(flow_toml, [*own, "precision=fp8"]))
    trainer._prepare()
    backbone, seen = trainer.objective.modules["backbone"], dict[str, torch.dtype]()
    for name in ("context_embedder", "trunk.blocks.0.self_attn.q", "trunk.blocks.1.ffn", "trunk.blocks.1", "head.proj", "time_projection"):
        backbone.get_submodule(name).register_forward_hook(lambda layer, given, out, name=name: seen.update({name: out.dtype}))
    trainer._train_step()
    half = {"context_embedder", "trunk.blocks.0.self_attn.q", "trunk.blocks.1.ffn"}
    assert seen == {name: torch.bfloat16 if name in half else torch.float32 for name in seen}
    assert len(seen) == 6
    assert {value.dtype for value in backbone.state_dict().values()} == {torch.float32}


def test_gradients_are_near_those_of_bf16(flow_toml: Path, own: list[str]) -> None:
    found, half, exact = (train(str(flow_toml), [*own, f"precision={name}"], 1) for name in ("fp8", "bf16", "fp32"))
    for other in (half, exact):
        assert 0.02 < apart(found["gradients"][0], other["gradients"][0]) < 0.1, "8 bits have 3 or 2 of the mantissa"
        assert found["losses"] == pytest.approx(other["losses"], rel=0.02)
        assert found["losses"] != other["losses"]
    assert apart(half["gradients"][0], exact["gradients"][0]) < 0.01


def batch_loss(objective: RectifiedFlow) -> Tensor:
    """Of one batch, the same one at every call."""
    batch = objective.batch([0, 1], lambda sample, stream: generator(0, 0, sample, stream), 0.0)
    with torch.autocast("cpu", torch.bfloat16):
        loss: Tensor = objective.losses(batch)[0].mean()
    return loss


def test_twenty_steps_lower_the_loss_as_those_in_bf16_do(objective_of: Callable[..., RectifiedFlow]) -> None:
    losses = {}
    for precision in ("bf16", "fp8"):
        objective = objective_of(train="all")
        if precision == "fp8":
            compute_in_float8(objective.modules, emulate=True)
        optimiser = torch.optim.AdamW(objective.modules["backbone"].parameters(), lr=3e-3)
        losses[precision] = found = list[float]()
        for _ in range(20):
            loss = batch_loss(objective)
            loss.backward()
            optimiser.step()
            optimiser.zero_grad()
            found.append(loss.item())
    found, expected = losses["fp8"], losses["bf16"]
    assert expected[-1] < 0.5 * expected[0]
    assert found[0] - found[-1] == pytest.approx(expected[0] - expected[-1], rel=0.02)


class Products(TorchDispatchMode):
    """Operands of every product that a GPU would compute in float8: their shapes and types."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[tuple[int, ...], tuple[int, ...], torch.dtype, torch.dtype]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(hasattr(kind, "to_original_precision") for kind in types):
            return NotImplemented  # first torchao makes operands of its tensors
        if func is torch.ops.aten._scaled_mm.default:
            one, other = args[:2]
            self.seen.append((tuple(one.shape), tuple(other.shape), one.dtype, other.dtype))
        return func(*args, **(kwargs or {}))


def test_operands_are_those_that_a_gpu_takes(objective_of: Callable[..., RectifiedFlow]) -> None:
    """Both sizes of the second one, and so the tokens in the gradient of a weight, are multiples of 16; a CPU has the product too."""
    gradients = []
    for emulate in (False, True):
        objective = objective_of(train="all")
        compute_in_float8(objective.modules, emulate=emulate)
        with Products() as products:
            batch_loss(objective).backward()
        found = {name: value.grad for name, value in objective.modules["backbone"].named_parameters() if value.grad is not None}
        gradients.append({name: value.numpy() for name, value in found.items()})
        layers = len(converted(objective.modules["backbone"]))
        assert len(products.seen) == (0 if emulate else 3 * layers)
        if not emulate:
            kinds = [(one, other) for _, _, one, other in products.seen]
            assert kinds.count((torch.float8_e4m3fn, torch.float8_e4m3fn)) == layers, "the forward"
            assert kinds.count((torch.float8_e5m2, torch.float8_e4m3fn)) == 2 * layers, "the gradients"
            assert all(one[1] == other[0] for one, other, *_ in products.seen)
            assert all(size % 16 == 0 for _, other, *_ in products.seen for size in other)
            assert any(one[0] % 16 for one, *_ in products.seen), "tokens are no multiple of 16 here"
    assert apart(*gradients) < 1e-3


@pytest.mark.parametrize("policy", ["recompute", "offload"])
def test_a_policy_of_memory_changes_no_bit(flow_toml: Path, own: list[str], policy: str) -> None:
    kept, other = (train(str(flow_toml), [*own, "precision=fp8", f"memory.policy={name}"], 2) for name in ("keep", policy))
    assert kept["losses"] == other["losses"]
    assert all(np.array_equal(value, other["weights"][name]) for name, value in kept["weights"].items())


@pytest.mark.xdist_group("distributed")
def test_processes_that_split_the_weights_compute_what_copies_do(group: Group, flow_toml: Path, own: list[str]) -> None:
    own = [*own, "precision=fp8", "batch_size=4", "objective.settings.clips=4"]
    copies, split = (group(2, train, str(flow_toml), [*own, *layout], 3) for layout in ([], ["parallel.fsdp=2", "memory.policy=recompute"]))
    alone = train(str(flow_toml), own, 3)
    for found, expected in zip(split, copies, strict=True):
        assert found["losses"] == pytest.approx(expected["losses"], rel=1e-5)
        assert apart(found["gradients"][0], expected["gradients"][0]) < 1e-5
        assert apart(found["weights"], expected["weights"]) < 1e-5
        assert 1e-3 < apart(found["gradients"][0], alone["gradients"][0]) < 0.1, "scales are of the samples of a process"


@pytest.mark.xdist_group("distributed")
def test_processes_that_share_samples_are_near_one(group: Group, flow_toml: Path, own: list[str]) -> None:
    alone = train(str(flow_toml), [*own, "precision=fp8"], 1)
    for found in group(2, train, str(flow_toml), [*own, "precision=fp8", "parallel.ulysses=2"], 1):
        assert found["losses"] == pytest.approx(alone["losses"], rel=0.02)
        assert apart(found["gradients"][0], alone["gradients"][0]) < 0.1


def checkpoint(run: Path, step: int) -> dict[str, Tensor]:
    return read_whole(run / "checkpoints" / f"step-{step:08}", "")


def test_a_run_resumes_to_the_bit_and_keeps_and_exports_what_others_do(flow_toml: Path, own: list[str], tmp_path: Path) -> None:
    def recipe(name: str, precision: str) -> TrainConfig:
        return TrainConfig.from_toml(flow_toml, [*own, "steps=4", "save_every=2", f"precision={precision}", f"output={tmp_path / name}"])

    for name, precision in (("whole", "fp8"), ("plain", "bf16")):
        Trainer(recipe(name, precision)).run()
    Trainer(recipe("parts", "fp8")).run(until=2)
    Trainer(recipe("parts", "fp8")).run(resume=True)
    whole, parts, plain = (checkpoint(tmp_path / name, 4) for name in ("whole", "parts", "plain"))
    assert whole.keys() == parts.keys() == plain.keys()
    assert all(torch.equal(value, parts[name]) for name, value in whole.items())
    assert all(value.dtype == plain[name].dtype and value.shape == plain[name].shape for name, value in whole.items())
    assert not all(torch.equal(value, plain[name]) for name, value in whole.items())
    exports = [tmp_path / name / "export" / "backbone" for name in ("whole", "plain")]
    one, other = (load_backbone(str(folder)) for folder in exports)
    assert one.config == other.config
    assert sorted(file.name for file in exports[0].iterdir()) == sorted(file.name for file in exports[1].iterdir())
    assert list(one.state_dict()) == list(other.state_dict())
    assert not converted(one)
    assert all(torch.equal(value, whole[f"ema/backbone/{name}"].half().float()) for name, value in one.state_dict().items())
    assert main(["export", str(tmp_path / "whole"), str(tmp_path / "live"), "--to", "own", "--part", "backbone"]) == 0
    live = load_backbone(str(tmp_path / "live"), dtype=torch.float32).state_dict()
    assert all(torch.equal(value, whole[f"modules/backbone/{name}"]) for name, value in live.items())


def test_averages_are_of_plain_layers_and_a_run_may_change_its_precision(flow_toml: Path, own: list[str]) -> None:
    own = [*own, "steps=2", "save_every=1"]
    Trainer(TrainConfig.from_toml(flow_toml, [*own, "precision=bf16"])).run(until=1)
    trainer = Trainer(TrainConfig.from_toml(flow_toml, [*own, "precision=fp8"]))
    trainer.run(resume=True)
    backbone = trainer.averaged()["backbone"]
    assert not converted(backbone)
    assert converted(trainer.objective.modules["backbone"])
    kept = checkpoint(trainer.config.output, 2)
    assert all(torch.equal(value, kept[f"ema/backbone/{name}"]) for name, value in backbone.state_dict().items())


@pytest.mark.parametrize("part", ["lora", "context_embedder"])
@pytest.mark.parametrize("command", [["run"], ["plan", "--config"]])
def test_a_backbone_that_stays_as_it_is_is_refused(
    flow_toml: Path, own: list[str], part: str, command: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*command, str(flow_toml), *own, f"objective.settings.train={part}", "precision=fp8"]) == 2
    told = capsys.readouterr().err
    assert f"train = '{part}' leaves it as it is: use precision = 'bf16', and objective.settings.base = 'fp8'" in told
    assert told.count("\n") == 1


def test_a_vae_is_refused(vae_toml: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", str(vae_toml), "precision=fp8"]) == 2
    told = capsys.readouterr().err
    assert "precision = 'fp8' is of the blocks of a backbone, and this run trains vae alone: use precision = 'bf16'" in told
    assert told.count("\n") == 1


def test_blocks_without_a_fitting_layer_are_refused() -> None:
    model = WanDiT(KINDS.model_copy(update={"dim": 24}))
    with pytest.raises(ValueError, match=r"no linear layer in the blocks of 'backbone' has multiples of 16 for sizes: use precision"):
        compute_in_float8({"backbone": model}, emulate=True)


def test_a_device_without_float8_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for capability in ((8, 9), (9, 0), (10, 0)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, found=capability: found)
        check_float8("cuda")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 6))
    with pytest.raises(ValueError, match=r"needs a GPU of compute capability 8\.9 or above, 'cuda:1' has 8\.6: use precision = 'bf16'"):
        check_float8("cuda:1")
    with pytest.raises(ValueError, match=r"on device 'mps': float8 is computed on CUDA, and emulated on a CPU: use precision = 'bf16'"):
        check_float8("mps")


def test_without_torchao_it_says_what_to_install(flow_toml: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchao", None)
    with pytest.raises(ValueError, match=r"'fp8' is torchao's, which is not installed: pip install wan-train\[torchao\]"):
        Trainer(TrainConfig.from_toml(flow_toml, ["precision=fp8"]))


def test_a_plan_is_that_of_bf16(flow_toml: Path, own: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    told = {}
    for precision in ("fp8", "bf16", "fp32"):
        assert main(["plan", "--config", str(flow_toml), *own, f"precision={precision}", "--json"]) == 0
        told[precision] = capsys.readouterr().out
    assert told["fp8"] == told["bf16"] != told["fp32"]

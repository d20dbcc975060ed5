"""A frozen base in 8 bits, and blocks of it that wait on the host: the same gradients, and the memory that is planned."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from adapted import tokens, trained, velocity
from layout_tasks import preview, train
from torch import Tensor, nn
from wan_dit import load_backbone
from wan_dit.config import DiTConfig
from wan_dit.contracts import Conditioning
from wan_dit.model import WanDiT
from wan_dit.plugins import BackboneSpec
from wan_train.config import MemoryConfig, TrainConfig
from wan_train.frozen import BlockSwap, FrozenLinear, freeze_linears
from wan_train.memory import apply_policy
from wan_train.objectives.flow import RectifiedFlow
from wan_train.objectives.frozen_base import load_base
from wan_train.planning.degrees import Degrees
from wan_train.planning.gpus import gpu_named
from wan_train.planning.job import Bucket, Job
from wan_train.planning.measured import Saved
from wan_train.planning.memory import Memory, memory
from wan_train.planning.plan import Plan
from wan_train.planning.recipe import read
from wan_train.planning.timing import default_rates
from wan_train.randomness import generator
from wan_train.trainer import Trainer

Make = Callable[..., RectifiedFlow]
Group = Callable[..., list[Any]]
FROZEN = {"init": "pretrained", "architecture": "{}", "text_architecture": "{}", "train_text_encoder": "false", "train": "lora"}
SIX = DiTConfig(dim=128, ffn_dim=384, num_heads=2, num_layers=6, text_dim=64, text_len=64)


def lora(objective: RectifiedFlow) -> dict[str, Tensor]:
    """Gradients of the adapters after one loss; both factors of each have one."""
    for adapter in objective.modules["lora"].named().values():
        nn.init.normal_(adapter.up, std=0.1, generator=torch.Generator().manual_seed(1))
    batch = objective.batch([0, 1], lambda sample, stream: generator(0, 0, sample, stream), 0.0)
    objective.losses(batch)[0].mean().backward()
    return {name: weight.grad for name, weight in objective.modules["lora"].named_parameters() if weight.grad is not None}


def unpacked(objective: RectifiedFlow) -> dict[str, Tensor]:
    """The numbers that the layers of the trunk stand for."""
    return {name: layer.matrix(torch.float32) for name, layer in objective.backbone.named_modules() if isinstance(layer, FrozenLinear)}


@pytest.mark.parametrize("swap", [0, 1])
@pytest.mark.parametrize("base", ["int8", "fp8"])
def test_gradients_are_those_on_the_unpacked_weights(objective_of: Make, base: str, swap: int) -> None:
    packed = objective_of(train="lora", lora={"rank": 3}, base=base, swap=swap)
    plain = objective_of(train="lora", lora={"rank": 3})
    weights, moved = unpacked(packed), 0.0
    assert set(weights) == {name for name, layer in plain.backbone.trunk.named_modules(prefix="trunk") if isinstance(layer, nn.Linear)}
    for name, weight in weights.items():
        moved = max(moved, float((plain.backbone.get_submodule(name).weight - weight).abs().max()))
        plain.backbone.get_submodule(name).weight.data.copy_(weight)
    assert moved > 1e-4, "8 bits are not the numbers of the file"
    found, expected = lora(packed), lora(plain)
    assert len(found) == len(expected) == 40
    for name, gradient in expected.items():
        assert gradient.any()
        torch.testing.assert_close(found[name], gradient, atol=1e-5, rtol=1e-5)


def test_a_context_embedder_is_trained_in_fp32_under_a_base_in_8_bits(objective_of: Make, nonzero: Path) -> None:
    objective = objective_of(train="context_embedder", base="int8", swap=2)
    found = trained(objective, 6)
    assert found[-1] < found[0]
    half = objective_of(train="context_embedder", base="bf16")
    assert {weight.dtype for weight in half.modules["context_embedder"].parameters()} == {torch.float32}
    assert {weight.dtype for weight in half.backbone.trunk.parameters()} == {torch.bfloat16}
    close = velocity(load_backbone(str(nonzero)), tokens())
    assert (velocity(half.backbone, tokens()) - close).abs().max() < 0.05 * close.abs().max()
    losses = trained(half, 6)
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("base", ["int8", "fp8"])
def test_autograd_keeps_no_unpacked_weight(objective_of: Make, base: str) -> None:
    """The same activations as over fp32, and no weight."""

    def kept(objective: RectifiedFlow) -> int:
        batch = objective.batch([0, 1], lambda sample, stream: generator(0, 0, sample, stream), 0.0)
        held = [*objective.backbone.state_dict().values(), *objective.modules["lora"].parameters()]
        with Saved([weight.detach() for weight in held]) as saved:
            loss = objective.losses(batch)[0].mean()
        assert loss.requires_grad
        return saved.size

    packed, plain = (kept(objective_of(train="lora", lora={"rank": 3}, base=each)) for each in (base, "fp32"))
    assert packed == plain


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("policy", ["keep", "recompute", "offload"])
@pytest.mark.parametrize("base", ["fp32", "bf16", "int8"])
def test_blocks_that_wait_change_no_bit(
    flow_recipe: Callable[..., TrainConfig], nonzero: Path, tmp_path: Path, base: str, policy: str, precision: str
) -> None:
    found = []
    for swap in (0, 1, 2):
        own = [f"objective.settings.{name}={value}" for name, value in {**FROZEN, "backbone": nonzero, "base": base, "swap": swap}.items()]
        own += ["objective.settings.lora.rank=2", f"memory.policy={policy}", f"precision={precision}", "micro_batch=1"]
        trainer = Trainer(flow_recipe(*own, "steps=2", "save_every=0", "optimiser.name=adamw", f"output={tmp_path / str(swap)}"))
        trainer.run()
        found.append({name: value.clone() for name, value in trainer.objective.modules["lora"].state_dict().items()})
    for other in found[1:]:
        assert all(torch.equal(value, other[name]) for name, value in found[0].items())


class Arrived:
    """Bytes of weights that were brought to the device: what is fetched is copied, so that it can be told apart from what waits."""

    def __init__(self, swap: BlockSwap) -> None:
        self.now = self.most = 0
        self._lock, self._fetch, loader = threading.Lock(), swap._loader._fetch, swap._loader
        loader._fetch = self._copied

    def _copied(self, name: str) -> dict[str, Tensor]:
        copies = {field: weight.clone() for field, weight in self._fetch(name).items()}
        for weight in copies.values():
            self._add(weight.nbytes)
            weakref.finalize(weight.untyped_storage(), self._add, -weight.nbytes)
        return copies

    def _add(self, size: int) -> None:
        with self._lock:
            self.now += size
            self.most = max(self.most, self.now)


def swap_of(backbone: WanDiT) -> BlockSwap:
    sources = [layer._source for layer in backbone.modules() if isinstance(layer, FrozenLinear) and layer._source]
    (swap,) = {source.func.__self__ for source in sources}  # type: ignore[attr-defined]
    return swap


def step(backbone: WanDiT) -> None:
    latents = torch.randn(1, 16, 2, 8, 8, requires_grad=True)
    text = [torch.randn(64, backbone.config.text_dim)]
    backbone(latents, torch.tensor([500.0]), backbone.encode_context(text)).square().mean().backward()
    assert latents.grad is not None


@pytest.mark.parametrize("policy", ["keep", "recompute"])
@pytest.mark.parametrize("base", ["bf16", "int8", "fp8"])
def test_the_device_holds_what_is_planned_for_each_block_that_waits(tmp_path: Path, base: Any, policy: Any) -> None:
    """The law: the blocks that stay, one that runs and one that arrives; what waits is on the host."""
    torch.manual_seed(0)
    WanDiT(SIX).save_pretrained(tmp_path)
    for swap in range(1, 7):
        packed = None if base == "bf16" else base
        backbone = load_backbone(str(tmp_path), dtype=torch.bfloat16, quantise=packed).requires_grad_(False)
        freeze_linears(backbone, "cpu", swap)
        apply_policy(backbone, MemoryConfig(policy=policy))
        here = sum(value.nbytes for value in backbone.state_dict().values())
        waiting = sum(weight.nbytes for name in swap_of(backbone)._places for weight in swap_of(backbone)._loader._fetch(name).values())
        arrived = Arrived(swap_of(backbone))
        step(backbone)
        device, host, brought = Job(SIX, (Bucket((64, 64), 5),), lora=4, base=base, swapped=swap).frozen()
        assert here + arrived.most == pytest.approx(device if swap > 1 else device - brought, rel=0.02)
        assert waiting == pytest.approx(host, rel=0.02)


@pytest.mark.parametrize("policy", ["keep", "recompute"])
def test_each_block_comes_once_for_the_forward_and_once_for_the_backward(tmp_path: Path, policy: Any) -> None:
    WanDiT(SIX).save_pretrained(tmp_path)
    backbone = load_backbone(str(tmp_path)).requires_grad_(False)
    freeze_linears(backbone, "cpu", 4)
    apply_policy(backbone, MemoryConfig(policy=policy))
    swap, asked = swap_of(backbone), list[str]()
    load = swap._loader.load

    def told(piece: Any) -> Any:
        asked.append(piece.owner)
        return load(piece)

    swap._loader.load = told  # type: ignore[method-assign]
    step(backbone)
    context = [f"trunk.blocks.{i}.cross_attn.{layer}" for i in range(6) for layer in "vk"]
    blocks = [name for name in dict.fromkeys(asked) if name not in context]
    assert len(blocks) == 4
    assert asked == [*context, *blocks, *blocks[-2::-1], context[-1]]


def test_blocks_in_any_order_are_right_and_never_three(tmp_path: Path) -> None:
    """What comes next is a guess: samplers and caches run forwards one after the other, or a part of the blocks."""
    WanDiT(SIX).save_pretrained(tmp_path)
    backbone = load_backbone(str(tmp_path)).requires_grad_(False)
    freeze_linears(backbone, "cpu", 6)
    swap = swap_of(backbone)
    arrived = Arrived(swap)
    whole = load_backbone(str(tmp_path))
    text, latents = [torch.randn(64, 64)], torch.randn(1, 16, 2, 8, 8)
    with torch.no_grad():
        for _ in range(3):
            made, expected = (each(latents, torch.tensor([5.0]), each.encode_context(text)) for each in (backbone, whole))
            assert torch.equal(made, expected)
    for block in torch.randint(6, (30,), generator=torch.Generator().manual_seed(0)).tolist():
        name = f"trunk.blocks.{block}.ffn.0"
        assert torch.equal(swap.weights(name)["weight"], whole.get_submodule(name).weight)
    size = sum(weight.nbytes for weight in whole.trunk.blocks[0].parameters() if weight.ndim == 2) - 2 * 4 * 128**2
    assert arrived.most == 2 * size


def test_vace_blocks_wait_too(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = WanDiT(SIX.model_copy(update={"num_layers": 3, "vace_layers": (0, 2), "vace_in_dim": 96}))
    for weight in model.parameters():
        nn.init.normal_(weight, std=0.05)
    model.save_pretrained(tmp_path)
    latents, text = torch.randn(1, 16, 2, 8, 8), [torch.randn(64, 64)]
    given, found = Conditioning(vace=torch.randn(1, 96, 2, 8, 8)), []
    for swapped in (0, 2, 5):
        backbone = load_backbone(str(tmp_path)).requires_grad_(False)
        freeze_linears(backbone, "cpu", swapped)
        x = latents.clone().requires_grad_()
        backbone(x, torch.tensor([500.0]), backbone.encode_context(text), given).square().mean().backward()
        found.append(x.grad)
    assert found[0].any()
    assert all(torch.equal(found[0], gradient) for gradient in found[1:])
    with pytest.raises(ValueError, match="swap = 6: the backbone has 5 blocks"):
        freeze_linears(load_backbone(str(tmp_path)), "cpu", 6)


@pytest.mark.xdist_group("distributed")
@pytest.mark.parametrize("degree", ["fsdp", "ulysses"])
def test_processes_hold_a_base_in_8_bits_each(group: Group, flow_toml: Path, nonzero: Path, degree: str) -> None:
    own = in_8_bits(nonzero)
    alone = train(str(flow_toml), own, 3)
    for answer in group(2, train, str(flow_toml), [*own, f"parallel.{degree}=2"], 3):
        assert answer["losses"] == pytest.approx(alone["losses"], abs=1e-5)
        for name, weight in alone["weights"].items():
            np.testing.assert_allclose(answer["weights"][name], weight, atol=1e-4)


@pytest.mark.xdist_group("distributed")
@pytest.mark.parametrize("degree", ["fsdp", "ulysses"])
def test_previews_of_several_processes_have_the_whole_base(
    group: Group, flow_toml: Path, nonzero: Path, tmp_path: Path, degree: str
) -> None:
    own = [*in_8_bits(nonzero), "preview_every=2"]
    shown = preview(str(flow_toml), [*own, f"output={tmp_path / 'alone'}"], 2)
    for clips in group(2, preview, str(flow_toml), [*own, f"parallel.{degree}=2", f"output={tmp_path / 'split'}"], 2):
        assert np.abs(clips - shown).max() < 1e-4


def in_8_bits(backbone: Path) -> list[str]:
    """A recipe's settings of a LoRA on a base in 8 bits, of which one block waits."""
    own = [f"objective.settings.{name}={value}" for name, value in {**FROZEN, "backbone": backbone, "base": "int8", "swap": 1}.items()]
    return [*own, "optimiser.name=adamw", "save_every=0", "objective.settings.preview_steps=1"]


@pytest.mark.parametrize("kind", ["lora", "lokr"])
def test_a_recipe_is_planned_with_its_base(flow_recipe: Callable[..., TrainConfig], kind: str) -> None:
    """A 14B model on one card of 24 GB: with the blocks of its base on the host it fits, and without that it does not."""
    fields = {**FROZEN, "backbone": "wan2.1-t2v-14b", "lora.kind": kind, "lora.rank": 32}

    def fits(**more: Any) -> bool:
        own = [f"objective.settings.{name}={value}" for name, value in {**fields, **more}.items()]
        asked = read(flow_recipe(*own, "batch_size=1", "optimiser.name=adamw", "memory.policy=recompute"), 1, (512, 512), 33)
        assert asked.job.precision == ("bf16" if "base" in more else "fp32")
        gpu = gpu_named("rtx4090")
        return Plan(asked.job, Degrees(), gpu, default_rates(gpu, asked.job.precision), asked.wanted).fits

    assert fits(base="fp8", swap=40)
    assert fits(base="int8", swap=40)
    assert fits(base="bf16", swap=40)
    assert not fits(base="fp8", swap=4)
    assert not fits(base="bf16")
    assert not fits()


def test_a_base_that_is_no_parameters_is_planned_whole_on_every_process() -> None:
    def of(base: Any, swapped: int, gpus: int) -> Memory:
        job = Job(SIX, (Bucket((64, 64), 5),), lora=4, base=base, swapped=swapped)
        return memory(job, Degrees(gpus, fsdp=gpus), ("recompute",) * 6)

    assert of("bf16", 0, 4).size("base") == of("bf16", 0, 1).size("base") // 4
    for base, swapped in (("int8", 0), ("bf16", 3)):
        one, four = of(base, swapped, 1), of(base, swapped, 4)
        assert (four.size("base"), four.host, four.size("window")) == (one.size("base"), one.host, 0)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("base", ["bf16", "int8", "fp8"])
def test_a_gpu_holds_what_is_planned_and_computes_the_same_bits(tmp_path: Path, base: Any) -> None:
    torch.manual_seed(0)
    config = SIX.model_copy(update={"dim": 1024, "ffn_dim": 4096, "num_heads": 8})
    WanDiT(config).save_pretrained(tmp_path)
    spec, found, taken = config.spec("wide", weights=str(tmp_path)), [], []
    for swap in (0, 6):
        torch.cuda.empty_cache()
        backbone = load_base(spec, base, swap, "cuda", "lora")
        torch.cuda.reset_peak_memory_stats()
        latents = torch.randn(1, 16, 2, 8, 8, generator=torch.Generator().manual_seed(0)).cuda().requires_grad_()
        text = [torch.ones(64, 64, device="cuda")]
        backbone(latents, torch.tensor([500.0], device="cuda"), backbone.encode_context(text)).square().mean().backward()
        found.append(latents.grad)
        taken.append(torch.cuda.max_memory_allocated())
        del backbone
    assert torch.equal(*found)
    planned = [Job(config, (Bucket((64, 64), 5),), lora=4, base=base, swapped=swap).frozen()[0] for swap in (0, 6)]
    assert taken[0] - taken[1] == pytest.approx(planned[0] - planned[1], rel=0.1)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"train": "all", "base": "int8"}, "base and swap are of a backbone that stays as it is"),
        ({"train": "all", "swap": 2}, "base and swap are of a backbone that stays as it is"),
        ({"train": "lora", "base": "int4"}, "base: .*'fp32', 'bf16', 'fp8' or 'int8'"),
        ({"train": "lora", "swap": 3}, "swap = 3: the backbone has 2 blocks"),
        ({"text_device": "nowhere"}, "device 'nowhere' cannot be used here"),
        ({"text_device": "cpu", "train_text_encoder": True}, "text_device is of a text encoder as it is"),
        ({"train": "lora", "architecture": {"in_dim": 36}}, "inputs that are added would stay zero: leave architecture out, got in_dim"),
    ],
)
def test_wrong_settings_are_told_in_one_line(objective_of: Make, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        objective_of(**settings)
    assert "\n" not in str(caught.value)


def test_a_base_of_another_package_is_refused() -> None:
    foreign = BackboneSpec("foreign", "collections:OrderedDict", "tiny-2", 16, (4, 8, 8), "tiny-2", 96, 32)
    with pytest.raises(ValueError, match="'foreign' is no Wan transformer with weights"):
        load_base(foreign, "int8", 0, "cpu", "lora")

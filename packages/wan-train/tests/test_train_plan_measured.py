"""Plans against what torch does: operations, activations, whole steps on fake process groups, and the law of a LoRA's memory."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode
from wan_dit import load_backbone
from wan_dit.config import I2V_14B, T2V_1_3B, T2V_14B, TI2V_5B, VACE_1_3B, DiTConfig
from wan_dit.contracts import Conditioning
from wan_dit.model import WanDiT
from wan_dit.rope import rope_table
from wan_train.cli import main
from wan_train.config import MemoryConfig
from wan_train.frozen import freeze_linears
from wan_train.memory import apply_policy
from wan_train.planning.degrees import Degrees
from wan_train.planning.job import Bucket, Job, Precision
from wan_train.planning.measured import Saved, block_bytes_per_token, gamma
from wan_train.planning.memory import memory
from wan_train.planning.saved import KEPT, PER_SAMPLE
from wan_train.planning.work import flops
from wan_vae.footprint import Meter

SMALL = DiTConfig(dim=256, ffn_dim=768, num_heads=4, num_layers=4, text_dim=64, text_len=64)
HEAVY = DiTConfig(dim=768, ffn_dim=1536, num_heads=6, num_layers=4, text_dim=64, text_len=64)
WIDE = DiTConfig(dim=128, ffn_dim=1024, num_heads=4, num_layers=3, text_dim=32, text_len=32)


def of_layers(config: DiTConfig, **fields: Any) -> DiTConfig:
    return DiTConfig(**{**config.model_dump(), **fields})


@pytest.mark.parametrize("recomputed", [0, 2])
@pytest.mark.parametrize(
    "config",
    [of_layers(T2V_1_3B, num_layers=3), of_layers(VACE_1_3B, num_layers=3, vace_layers=(0, 2)), of_layers(I2V_14B, num_layers=2)],
    ids=["t2v", "vace", "i2v"],
)
def test_operations_are_those_that_are_counted(config: DiTConfig, recomputed: int) -> None:
    frames, height, width = 5, 24, 40
    extra = config.in_dim - config.out_dim
    with torch.device("meta"):
        model = WanDiT(config).bfloat16()
        given = Conditioning(
            extra_latents=torch.randn(1, extra, frames, height, width) if extra else None,
            image_context=torch.randn(1, 257, config.image_dim) if config.image_dim else None,
            vace=torch.randn(1, config.vace_in_dim, frames, height, width) if config.vace_layers else None,
        )
        for block in list(model.trunk.blocks)[:recomputed]:
            block.forward = _recomputed(block.forward)  # type: ignore[method-assign]
        with FlopCounterMode(display=False) as counter:
            context = model.encode_context([torch.randn(config.text_len, config.text_dim)], given)
            out = model(torch.randn(1, config.out_dim, frames, height, width), torch.tensor([5.0]), context, given)
            forward = counter.get_total_flops()
            out.square().mean().backward()
    job = Job(config, (Bucket((8 * width, 8 * height), 1 + 4 * (frames - 1)),))
    found, plain = flops(job, job.largest, recomputed), flops(job, job.largest)
    assert found.forward == forward
    assert found.model + found.run - plain.run == counter.get_total_flops()  # meta counts the backward of attention as MFU does


def _recomputed(forward: Any) -> Any:
    return lambda *arguments: checkpoint(forward, *arguments, use_reentrant=False)


@pytest.mark.parametrize("precision", ["fp32", "bf16", "autocast"])
@pytest.mark.parametrize("config", [T2V_1_3B, T2V_14B, TI2V_5B])
def test_blocks_keep_what_is_counted(config: DiTConfig, precision: Precision) -> None:
    counts, statistics = KEPT[precision], 8 * config.num_heads + 36
    counted = counts.width * config.dim + counts.hidden * config.ffn_dim
    assert block_bytes_per_token(config, precision) == pytest.approx(counted + statistics, rel=2e-3)
    assert block_bytes_per_token(config, precision, per_sample=True) == pytest.approx(
        counted + statistics + PER_SAMPLE * config.dim, rel=2e-3
    )


def test_gamma_is_measured_by_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert gamma(T2V_14B, "bf16") == pytest.approx(72.9, abs=0.1)
    totals = []
    for extra in ([], ["--gamma", "measure"]):
        assert main(["plan", "--model", "wan2.1-t2v-14b", "--gpus", "16", "--ulysses", "8", "--fsdp", "16", "--json", *extra]) == 0
        totals.append(json.loads(capsys.readouterr().out)["memory"]["total"])
    assert totals[1] == pytest.approx(totals[0], rel=0.02)


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("recomputed", [0, 2, 4])
def test_a_real_model_keeps_what_is_planned(recomputed: int, precision: torch.dtype) -> None:
    torch.manual_seed(0)
    model = WanDiT(SMALL).to(precision)
    for block in list(model.trunk.blocks)[:recomputed]:
        block.forward = _recomputed(block.forward)  # type: ignore[method-assign]
    latents, text = torch.randn(1, 16, 5, 32, 48), [torch.randn(64, 64)]
    known = [*model.parameters(), latents, *text]
    with Saved(known) as saved:
        out = model(latents, torch.tensor([500.0]), model.encode_context(text))
    job = Job(SMALL, (Bucket((384, 256), 17),), precision="fp32" if precision == torch.float32 else "bf16")
    # the gathered weights are bf16 where there are shards
    degrees = Degrees(2, fsdp=2) if precision == torch.bfloat16 else Degrees()
    policy = ("recompute",) * recomputed + ("keep",) * (4 - recomputed)
    found = memory(job, degrees, policy)  # type: ignore[arg-type]
    head = 8 * SMALL.dim * job.count(job.largest)  # what the head keeps is planned with the backward
    loss = 2 * 4 * 4 * SMALL.out_dim * job.count(job.largest)  # of the velocity and its error, which are planned too
    planned = found.size("blocks") + found.size("context") + found.size("around") + head - loss
    assert out.requires_grad
    assert planned == pytest.approx(saved.size, rel=0.1)


FAST = [
    # gpus, ulysses, ring, fsdp, policy, samples, config, precision
    (1, 1, 1, 1, ("keep",) * 4, 1, SMALL, "fp32"),
    (4, 2, 2, 4, ("recompute", "recompute", "keep", "keep"), 1, SMALL, "fp32"),
]
SLOW = [
    (1, 1, 1, 1, ("recompute",) * 4, 1, SMALL, "fp32"),
    (1, 1, 1, 1, ("recompute", "recompute", "keep", "keep"), 1, SMALL, "fp32"),
    (1, 1, 1, 1, ("keep",) * 4, 2, SMALL, "fp32"),
    (1, 1, 1, 1, ("recompute",) * 3, 1, WIDE, "fp32"),
    (1, 1, 1, 1, ("keep",) * 3, 1, WIDE, "fp32"),
    (2, 2, 1, 1, ("keep",) * 4, 1, SMALL, "fp32"),
    (2, 1, 2, 1, ("keep",) * 4, 1, SMALL, "fp32"),
    (4, 2, 2, 1, ("recompute",) * 4, 1, SMALL, "fp32"),
    (4, 1, 1, 4, ("keep",) * 4, 1, SMALL, "fp32"),
    (4, 2, 2, 4, ("keep",) * 4, 1, SMALL, "fp32"),
    (8, 2, 2, 8, ("recompute",) * 4, 1, SMALL, "fp32"),
    (1, 1, 1, 1, ("keep",) * 4, 1, HEAVY, "autocast"),
    (1, 1, 1, 1, ("recompute",) * 4, 1, HEAVY, "autocast"),
    (4, 1, 1, 4, ("recompute",) * 4, 1, HEAVY, "autocast"),
    (4, 2, 1, 4, ("recompute",) * 2 + ("keep",) * 2, 1, HEAVY, "autocast"),
    (4, 1, 1, 4, ("recompute",) * 4, 1, HEAVY, "bf16"),
    (4, 1, 1, 4, ("keep",) * 4, 1, HEAVY, "bf16"),
    (4, 2, 1, 4, ("recompute",) * 2 + ("keep",) * 2, 1, HEAVY, "bf16"),
]


@pytest.mark.parametrize("chosen", [FAST, pytest.param(SLOW, marks=pytest.mark.slow)], ids=["few", "many"])
def test_whole_steps_take_what_is_planned(chosen: list[Any]) -> None:
    """The real model in the layouts of the trainer, on fake process groups; gradients, which come as blocks go, are on either side."""
    grid = 9, 14, 14
    cases = [
        {
            "gpus": gpus, "parallel": {"ulysses": ulysses, "ring": ring, "fsdp": fsdp}, "policy": policy, "samples": samples,
            "config": config.model_dump(mode="json"), "grid": grid, "precision": precision,
        }
        for gpus, ulysses, ring, fsdp, policy, samples, config, precision in chosen
    ]  # fmt: skip
    script = Path(__file__).parent / "processes" / "planned_step.py"
    done = subprocess.run(
        [sys.executable, str(script)], input=json.dumps(cases), env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    for (gpus, ulysses, ring, fsdp, policy, samples, config, precision), real in zip(
        chosen, json.loads(done.stdout.splitlines()[-1]), strict=True
    ):
        bucket = Bucket((16 * grid[2], 16 * grid[1]), 1 + 4 * (grid[0] - 1))
        job = Job(config, (bucket,), micro_batch=samples, precision=precision)
        found = memory(job, Degrees(gpus, ulysses, ring, fsdp), policy)  # type: ignore[arg-type]
        case = f"{gpus} GPUs, ulysses {ulysses}, ring {ring}, fsdp {fsdp}, {policy[0]}, {samples} samples, {precision}"
        worked = sum(found.size(name) for name in ("blocks", "backward", "context", "around", "window", "copies"))
        assert worked <= 1.1 * real["peak"], case
        assert worked + found.size("gradients") >= 0.9 * real["peak"], case
        assert found.size("parameters") == pytest.approx(real["parameters"], rel=0.02), case
        assert found.size("gradients") == pytest.approx(real["gradients"], rel=0.02), case
        assert found.size("optimiser") == pytest.approx(real["moments"], rel=0.02), case


@pytest.mark.parametrize(
    "arguments", ["--model tiny --gpus 8 --ulysses 2 --ring 2 --fsdp 4", "--model wan2.1-t2v-1.3b --gpus 16 --fsdp 16 --ulysses 4"]
)
def test_layouts_are_verified_on_a_fake_process_group(arguments: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", *arguments.split(), "--json", "--verify"]) == 0
    found = json.loads(capsys.readouterr().out)["verified"]
    assert found["ratio"] == pytest.approx(1, abs=0.02)


@pytest.mark.slow
def test_the_layout_of_the_report_is_verified(capsys: pytest.CaptureFixture[str]) -> None:
    """128 processes, a 14B model: about ten seconds."""
    assert main(["plan", *["--model", "wan2.1-t2v-14b", "--gpus", "128", "--ulysses", "8", "--ring", "2", "--fsdp", "32", "--verify"]]) == 0
    assert "built on 128 fake processes: rank 0 holds 1.79 GB of parameters, planned 1.79 GB" in capsys.readouterr().out


@pytest.mark.parametrize("choice", ["keep", "recompute"])
@pytest.mark.parametrize("base", ["int8", "fp32"])
def test_a_step_of_a_lora_takes_what_is_planned(base: Any, choice: Any, tmp_path: Path) -> None:
    """Adapters on a frozen model; in 8 bits with all blocks swapped, whose weights are unpacked for each product and kept by none."""
    torch.manual_seed(0)
    WanDiT(SMALL).save_pretrained(tmp_path)
    quantise, dtype = (None, torch.float32) if base == "fp32" else (base, torch.bfloat16)
    model = load_backbone(str(tmp_path), dtype=dtype, quantise=quantise).requires_grad_(False)
    held = list(model.state_dict().values())
    freeze_linears(model, "cpu", 4 * (base == "int8"))
    layers = [layer for block in model.trunk.blocks for layer in block.modules() if hasattr(layer, "in_features")]
    adapters = [weight for layer in layers for weight in _adapted(layer, 4)]
    apply_policy(model, MemoryConfig(policy=choice))
    grid, bucket = (9, 14, 14), Bucket((224, 224), 33)
    latents, text = torch.randn(1, 16, grid[0], 2 * grid[1], 2 * grid[2]), [torch.randn(64, 64)]
    rope_table.cache_clear()
    with Meter([*adapters, *held, latents, *text]) as meter:
        model(latents, torch.tensor([500.0]), model.encode_context(text)).square().mean().backward()
    job = Job(SMALL, (bucket,), lora=4, base=base, swapped=4 * (base == "int8"), precision="fp32" if base == "fp32" else "bf16")
    found = memory(job, Degrees(), (choice,) * 4)
    assert sum(weight.numel() for weight in adapters) == job.trained
    assert all(weight.grad is not None for weight in adapters)
    assert sum(found.size(name) for name in ("blocks", "backward", "context", "around")) == pytest.approx(meter.peak, rel=0.1)


def test_a_policy_covers_the_vace_blocks_too() -> None:
    """The same gradients with every block recomputed, and all that is kept between forward and backward is what goes between blocks."""
    torch.manual_seed(0)
    model = WanDiT(SMALL.model_copy(update={"vace_layers": (0, 2), "vace_in_dim": 96}))
    for weight in model.parameters():
        torch.nn.init.normal_(weight, std=0.05)
    latents, vace, text = torch.randn(1, 16, 3, 16, 16), torch.randn(1, 96, 3, 16, 16), [torch.randn(64, 64)]

    def step() -> int:
        rope_table.cache_clear()
        with Meter([*model.parameters(), latents, vace, *text]) as meter:
            velocity = model(latents, torch.tensor([500.0]), model.encode_context(text), conditioning=Conditioning(vace=vace))
            velocity.square().mean().backward()
        return meter.peak

    kept = step()
    expected = [weight.grad for weight in model.parameters()]
    model.zero_grad()
    with pytest.raises(ValueError, match=r"memory\.policy is for 4 blocks, the backbone has 6"):
        apply_policy(model, MemoryConfig(policy=("recompute",) * 4))
    apply_policy(model, MemoryConfig(policy=("recompute",) * 4 + ("keep",) * 2))
    some = step()
    model.zero_grad()
    apply_policy(model, MemoryConfig(policy=("keep",) * 4 + ("recompute",) * 2))
    fewest = step()
    for weight, gradient in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(weight.grad, gradient)
    assert fewest < some < kept


def _adapted(layer: Any, rank: int) -> tuple[torch.nn.Parameter, torch.nn.Parameter]:
    """A LoRA on a linear layer, by a hook."""
    down = torch.nn.Parameter(torch.randn(rank, layer.in_features))
    up = torch.nn.Parameter(torch.zeros(layer.out_features, rank))
    layer.register_forward_hook(lambda _, given, out: out + given[0] @ down.T.to(given[0].dtype) @ up.T.to(given[0].dtype))
    return down, up

"""Plans: parameters and operations are those of the model, memory is what a process takes, and every option changes what it should."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from dit_layouts import VARIANTS, model
from dit_wide import write_wide
from torch.utils.flop_counter import FlopCounterMode
from wan_dit import config as configs
from wan_dit.cli import main
from wan_dit.config import FLF2V_14B, I2V_14B, I2V_A14B, T2V_1_3B, T2V_14B, TI2V_5B, TINY, VACE_1_3B, VACE_14B, DiTConfig
from wan_dit.contracts import Conditioning
from wan_dit.model import WanDiT
from wan_dit.offload import load_offloaded
from wan_dit.plan import context_bytes, operations, parameters, tokens, weights, work_bytes
from wan_dit.rates import measure
from wan_dit.run_plan import Demand, RunPlan

ALL = {**VARIANTS, **{name: value for name, value in vars(configs).items() if isinstance(value, DiTConfig)}}
CHILD = """
import ctypes, json, sys, threading, time, torch
from wan_dit.offload import load_offloaded

ctypes.CDLL(None).mallopt(-3, 1 << 20)  # from 1 MB on tensors are mapped by themselves, as those of real sizes: no holes between them

def anonymous():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("RssAnon")) * 1024

path, mode, quantise, *shape = sys.argv[1:]
torch.nn.functional.linear(torch.randn(64, 64), torch.randn(64, 64))
before, most, done = anonymous(), 0, False

def watch():
    global most
    while not done:
        most = max(most, anonymous())
        time.sleep(0.002)

thread = threading.Thread(target=watch)
thread.start()
model = load_offloaded(path, mode, dtype=torch.float32, quantise=None if quantise == "none" else quantise)
with torch.no_grad():
    contexts = [model.encode_context([torch.randn(511, model.config.text_dim)]) for _ in range(2)]
    for context in contexts:
        model(torch.randn(1, 16, *map(int, shape)), torch.tensor([500.0]), context)
done = True
thread.join()
print(most - before)
"""


@pytest.mark.parametrize("name", ALL)
def test_parameters_are_those_of_the_model(name: str) -> None:
    with torch.device("meta"):
        made = WanDiT(ALL[name])
    found = parameters(ALL[name])
    assert found.total == sum(parameter.numel() for parameter in made.parameters())
    linear = [layer for layer in made.trunk.modules() if isinstance(layer, torch.nn.Linear)]
    assert found.running + found.context == sum(layer.weight.numel() for layer in linear)
    assert found.rows == sum(layer.out_features for layer in linear)


@pytest.mark.parametrize("name", ALL)
def test_operations_are_those_that_are_counted(name: str) -> None:
    config, (frames, height, width) = ALL[name], (5, 24, 40)
    with torch.device("meta"):
        made = WanDiT(config).bfloat16()
        extra = config.in_dim - config.out_dim
        given = Conditioning(
            extra_latents=torch.randn(1, extra, frames, height, width) if extra else None,
            image_context=torch.randn(1, config.pos_embed_seq_len or 257, config.image_dim) if config.image_dim else None,
            vace=torch.randn(1, config.vace_in_dim, frames, height, width) if config.vace_layers else None,
            camera=torch.randn(1, config.camera_dim, frames, 8 * height, 8 * width) if config.camera_dim else None,
        )
        with FlopCounterMode(display=False) as encoding:
            context = made.encode_context([torch.randn(9, config.text_dim)], given)
        with FlopCounterMode(display=False) as forward:
            made(torch.randn(1, config.out_dim, frames, height, width), torch.tensor([5.0]), context, given)
    size = width * config.stride[2], height * config.stride[1]
    found = operations(config, tokens(config, size, 1 + config.stride[0] * (frames - 1)))
    assert found.context == encoding.get_total_flops()
    assert found.products + found.attention == forward.get_total_flops()


@pytest.mark.parametrize(
    ("config", "size", "frames", "count", "tera"),
    [
        (T2V_1_3B, (832, 480), 81, 32_760, 283.0),
        (T2V_1_3B, (1280, 720), 81, 75_600, 1249.8),
        (T2V_14B, (832, 480), 81, 32_760, 1678.3),
        (T2V_14B, (1280, 720), 81, 75_600, 6523.4),
        (I2V_14B, (832, 480), 81, 32_760, 1686.4),
        (TI2V_5B, (1280, 704), 121, 27_280, 517.0),
    ],
)
def test_operations_of_the_released_models(config: DiTConfig, size: tuple[int, int], frames: int, count: int, tera: float) -> None:
    assert tokens(config, size, frames) == count
    found = operations(config, count)
    assert (found.products + found.attention + found.context) / 1e12 == pytest.approx(tera, rel=2e-4)


def test_sizes_off_the_grid_are_told() -> None:
    with pytest.raises(ValueError, match="size 833x480 is not of multiples of 16x16"):
        tokens(T2V_1_3B, (833, 480), 81)
    with pytest.raises(ValueError, match=r"80 frames are not 1 \+ 4 k, such as 81"):
        tokens(T2V_1_3B, (832, 480), 80)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("config", [T2V_1_3B, T2V_14B, VACE_1_3B, VACE_14B, I2V_A14B, TI2V_5B])
def test_work_is_what_is_alive_at_the_peak(config: DiTConfig, dtype: str) -> None:
    """Counted on meta by wan-vae's meter, at the real widths and half the resolution of 480p."""
    from wan_dit.rope import rope_table
    from wan_vae.footprint import FusedAttention, Meter

    with torch.device("meta"), torch.no_grad():
        made = WanDiT(config).to(getattr(torch, {"fp32": "float32", "bf16": "bfloat16"}[dtype]))
        extra = config.in_dim - config.out_dim
        shape = (21, 30, 52)
        given = Conditioning(
            extra_latents=torch.randn(1, extra, *shape) if extra else None,
            vace=torch.randn(1, config.vace_in_dim, *shape) if config.vace_layers else None,
        )
        context = made.encode_context([torch.randn(511, config.text_dim)], given)
        kept = [value for block in (*context.blocks, *context.vace_blocks) for value in vars(block).values() if value is not None]
        latents, time = torch.randn(1, config.out_dim, *shape), torch.tensor([5.0])
        rope_table.cache_clear()
        with FusedAttention(), Meter([*made.parameters(), *kept, latents, time]) as meter:
            made(latents, time, context, given)
    assert sum(value.nbytes for value in kept) == context_bytes(config, dtype, guided=False)
    assert work_bytes(config, dtype, 21 * 15 * 26) == pytest.approx(meter.peak, rel=0.02)


@pytest.mark.parametrize("name", ["i2v", "vace"])
@pytest.mark.parametrize("quantise", [None, "int8"])
@pytest.mark.parametrize("offload", ["none", "blocks", "stream"])
def test_weights_are_those_that_are_loaded(name: str, quantise: Any, offload: Any, tmp_path: Path) -> None:
    model(VARIANTS[name]).save_pretrained(tmp_path)
    made = load_offloaded(tmp_path, offload, quantise=quantise)
    here = sum(value.nbytes for value in made.state_dict().values() if not value.is_meta)
    found = weights(made.config, "fp32", offload=offload, quantise=quantise)
    if offload == "none":
        assert found.device == here
    else:  # what is there between forwards, and two blocks while they run
        scales = sum(value.nbytes for key, value in made.state_dict().items() if key.endswith("weight_scale"))
        assert found.device - here == pytest.approx(2 * (1 if quantise else 4) * parameters(made.config).piece, abs=scales)
    assert bool(found.host) == (offload == "blocks")


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize(
    ("offload", "quantise"),
    [("none", None), pytest.param("stream", None, marks=pytest.mark.slow), pytest.param("none", "int8", marks=pytest.mark.slow)],
)
def test_memory_is_what_a_process_takes(offload: str, quantise: str | None, tmp_path: Path) -> None:
    """Measured: 0.96 to 1.02 of it."""
    config = DiTConfig(dim=1024, ffn_dim=4096, num_heads=8, num_layers=3, text_dim=256)
    write_wide(tmp_path, config)
    command = [sys.executable, "-c", CHILD, str(tmp_path), offload, quantise or "none", "9", "16", "32"]
    done = subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, check=True)
    predicted = weights(config, "fp32", offload=offload, quantise=quantise, on_cpu=True).device
    predicted += context_bytes(config, "fp32", guided=True) + work_bytes(config, "fp32", 9 * 8 * 16, quantise=quantise)
    assert 0.85 < predicted / int(done.stdout) < 1.15


def test_parts_go_where_offload_lets_them() -> None:
    others = {"text_encoder": Demand(1000, 10), "vae": Demand(100, 1)}
    run = RunPlan((TINY, TINY), others, 80, "fp32", guided=True, on_cpu=False)
    one = 4 * parameters(TINY).total
    phases = {choice.offload: {phase.name: phase.weights for phase in choice.phases()} for choice in run.choices() if not choice.quantise}
    assert phases["none"] == {"text": 1000, "denoising": 1100 + 2 * one, "decoding": 1100 + 2 * one}
    assert phases["model"] == {"text": 1000, "denoising": 100 + one, "decoding": 100}
    assert (
        phases["blocks"]
        == phases["stream"]
        == {"text": 1000, "denoising": 100 + weights(TINY, "fp32", offload="stream").device, "decoding": 100}
    )
    assert run.memory == max(phase.memory for phase in run.phases())
    assert run.operations().products == 2 * operations(TINY, 80).products


def plan(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    assert main(["plan", "--device", "cpu", "--memory", "24GB", "--tflops", "0.1", "--json", *arguments]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


@pytest.mark.parametrize(
    ("name", "config", "count"),
    [("tiny", TINY, 1), ("wan2.1-t2v-1.3b", T2V_1_3B, 1), ("wan2.1-flf2v-14b", FLF2V_14B, 1), ("wan2.2-i2v-a14b", I2V_A14B, 2)],
)
def test_models_are_planned_by_name_without_their_weights(
    name: str, config: DiTConfig, count: int, capsys: pytest.CaptureFixture[str]
) -> None:
    found = plan(capsys, "--model", name)
    assert found["parameters"] == count * parameters(config).total
    assert found["unknown"] == []
    assert len(found["choices"]) == 12
    assert found["seconds"] == pytest.approx(
        found["steps"] * found["operations_per_step"] / 1e11 + found["operations_of_context"] / 1e11, rel=1e-6
    )


def test_every_setting_counts(capsys: pytest.CaptureFixture[str]) -> None:
    base = plan(capsys, "--model", "wan2.1-t2v-14b")
    for arguments, field, factor in (
        (["--guidance", "1"], "operations_per_step", 0.5),
        (["--steps", "25"], "steps", 0.5),
        (["--dtype", "bf16"], "memory", 0.55),
        (["--offload", "stream"], "memory", 0.4),
        (["--quantise", "int8"], "memory", 0.7),
        (["--size", "832x480"], "tokens", 32_760 / 75_600),
    ):
        assert plan(capsys, "--model", "wan2.1-t2v-14b", *arguments)[field] <= factor * base[field] * 1.001
    assert not base["fits"]


def test_a_backbone_on_disk_is_planned(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = DiTConfig(dim=256, ffn_dim=512, num_heads=2, num_layers=3)
    write_wide(tmp_path, config)
    found = plan(capsys, "--model", "wan2.1-t2v-1.3b", "--backbone", str(tmp_path), "--size", "64x64", "--frames", "5")
    assert found["parameters"] == parameters(config).total
    assert found["tokens"] == 32


def test_the_table_says_whether_it_fits(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--device", "cpu", "--memory", "30MB", "--offload", "blocks"]) == 0
    shown = capsys.readouterr().out
    assert "80 tokens; 1,564,352 parameters" in shown
    assert "of 30 MB that are free: does not fit" in shown
    assert "(too much)" in shown
    assert "TFLOP/s in products" in shown


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--size", "60x64"], "size 60x64 is not of multiples of 16x16"),
        (["--frames", "16"], "16 frames are not"),
        (["--steps", "0"], "steps is 0"),
        (["--tflops", "-1"], "tflops is -1"),
        (["--model", "tini"], "did you mean 'tiny'"),
        (["--device", "nowhere"], "there is no device 'nowhere', expected cpu, cuda, cuda:1"),
        (["--guidance", "high"], "guidance 'high' is not a number"),
    ],
)
def test_what_cannot_be_planned_is_one_line(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_rates_are_measured() -> None:
    found = measure(torch.device("cpu"), torch.float32)
    assert 1e8 < found.products < 1e14
    assert 1e7 < found.attention < 1e14

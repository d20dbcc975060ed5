"""Blocks swapped in and streamed from the file: the bits of the whole model, in less memory, and damage that is told."""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from dit_layouts import VARIANTS, comfy_file, diffusers_file, model, official_sharded
from dit_velocity import given_by, velocity
from dit_wide import write_wide
from safetensors.torch import load_file, save_file
from wan_dit import load_backbone
from wan_dit.config import T2V_14B, DiTConfig
from wan_dit.lora import apply
from wan_dit.model import WanDiT
from wan_dit.offload import load_offloaded
from wan_dit.plugins import BackboneSpec

MB = 1 << 20
CHILD = """
import ctypes, json, sys, threading, time, torch
from wan_dit.offload import load_offloaded

ctypes.CDLL(None).mallopt(-3, 1 << 20)  # from 1 MB on tensors are mapped by themselves, as those of real sizes: no holes between them

def anonymous():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("RssAnon")) * 1024

most, done, before = 0, False, anonymous()

def watch():
    global most
    while not done:
        most = max(most, anonymous())
        time.sleep(0.002)

thread, start = threading.Thread(target=watch), time.perf_counter()
thread.start()
try:
    path, mode, dtype = sys.argv[1:]
    model = load_offloaded(path, mode, dtype=getattr(torch, dtype))
    with torch.no_grad():
        context = model.encode_context([torch.randn(6, model.config.text_dim)])
        encoded = time.perf_counter() - start
        made = model(torch.randn(1, 16, 2, 8, 8), torch.tensor([500.0]), context)
finally:
    done = True
    thread.join()
seconds = time.perf_counter() - start
print(json.dumps({"before": before, "most": most, "encoded": encoded, "seconds": seconds, "finite": bool(made.isfinite().all())}))
"""


def saved(folder: Path, name: str) -> str:
    model(VARIANTS[name]).save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("name", ["tiny", "i2v", "flf2v", "vace", "fun-control"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("quantise", [None, "int8", "fp8"])
def test_the_bits_are_those_of_the_whole_model(name: str, dtype: torch.dtype, quantise: Any, tmp_path: Path) -> None:
    path = saved(tmp_path, name)
    whole = load_backbone(path, dtype=dtype, quantise=quantise)
    expected = velocity(whole)
    for mode in ("none", "blocks", "stream"):
        for stay in (0, 1, 100) if quantise is None else (1,):
            made = load_offloaded(path, mode, blocks_on_device=stay, dtype=dtype, quantise=quantise)
            for _ in range(2):
                assert torch.equal(velocity(made), expected), (mode, stay)
            assert made.fingerprint() == whole.fingerprint()
            assert made.spec == whole.spec


@pytest.mark.parametrize("make", [comfy_file, diffusers_file, official_sharded])
def test_every_layout_streams(make: Callable[[Path, WanDiT], Path], tmp_path: Path) -> None:
    path = make(tmp_path / "x", model(VARIANTS["i2v"]))
    assert torch.equal(velocity(load_offloaded(path, "stream")), velocity(load_backbone(str(path))))


def test_by_name_and_by_spec() -> None:
    expected = velocity(load_backbone("tiny"))
    made = load_offloaded("tiny", "stream")
    assert (made.name, made.spec.name) == ("tiny", "tiny")
    assert torch.equal(velocity(made), expected)
    assert torch.equal(
        velocity(load_offloaded(load_backbone("tiny").config.spec("own", weights="pkg:wan_dit/weights/tiny"), "blocks")), expected
    )


def here(made: WanDiT) -> set[str]:
    return {name for name, value in made.named_parameters() if name.startswith("trunk.") and value.ndim == 2 and not value.is_meta}


@pytest.mark.parametrize("mode", ["blocks", "stream"])
def test_two_blocks_are_there_at_a_time(mode: Any, tmp_path: Path) -> None:
    made, seen = load_offloaded(saved(tmp_path, "vace"), mode), []
    for block in (*made.trunk.vace_blocks, *made.trunk.blocks):
        block.ffn[0].register_forward_hook(lambda *_: seen.append({".".join(name.split(".")[:3]) for name in here(made)}))
    velocity(made)
    runs = ["trunk.vace_blocks.0", "trunk.vace_blocks.1", "trunk.blocks.0", "trunk.blocks.1"]
    assert seen == [{block} for block in 2 * runs]  # and the next one, which no module has yet
    assert here(made) == set()


def test_blocks_that_stay_are_spread_evenly() -> None:
    made = load_offloaded("tiny", "stream", blocks_on_device=2)
    assert {name.split(".")[2] for name in here(made)} == {"2", "5"}


def test_a_thread_reads_the_next_block_meanwhile(monkeypatch: pytest.MonkeyPatch) -> None:
    made, events = load_offloaded("tiny", "stream"), []
    (hook,) = made.trunk.blocks[0]._forward_pre_hooks.values()
    swap = hook.func.__self__
    read = swap._fetch
    started = [threading.Event() for _ in range(7)]

    def reading(name: str) -> Any:
        block = int(name.split(".")[2])
        if name.endswith("self_attn.q"):
            events.append(("read", block, threading.current_thread() is threading.main_thread()))
            started[block].set()
        return read(name)

    monkeypatch.setattr(swap, "_fetch", reading)

    def wait(i: int) -> None:
        assert started[i].wait(20), "nothing was read ahead"

    for i, block in enumerate(made.trunk.blocks[:5]):  # a block runs only once the next one is being read
        block.self_attn.register_forward_pre_hook(lambda *_, i=i: wait(i + 1))
    velocity(made)
    assert [block for _, block, _ in events] == 2 * list(range(6))
    assert not any(main for *_, main in events)


def test_a_cache_may_run_some_blocks_alone() -> None:
    whole, made = load_backbone("tiny"), load_offloaded("tiny", "stream")
    generator = torch.Generator().manual_seed(0)
    text = [torch.randn(4, 96, generator=generator)]
    x, modulation = torch.randn(1, 4, 128, generator=generator), torch.randn(1, 6, 128, generator=generator)
    rope, rows = torch.ones(4, 16, dtype=torch.complex64), torch.zeros(1, 1, dtype=torch.long)
    with torch.no_grad():
        for blocks in (slice(1), slice(1, None), slice(3, 5), slice(1)):
            results = [each.trunk(x, rope, modulation, rows, each.encode_context(text), blocks=blocks) for each in (whole, made)]
            assert torch.equal(*results)


@pytest.mark.parametrize("mode", ["blocks", "stream"])
def test_loras_go_on_live(mode: Any, tmp_path: Path) -> None:
    whole, made, state = load_backbone("tiny"), load_offloaded("tiny", mode), {}
    for layer in ("self_attn.q", "cross_attn.k", "ffn.0"):
        rows, columns = whole.get_submodule(f"trunk.blocks.2.{layer}").weight.shape
        added = {"lora_A.weight": torch.randn(4, columns), "lora_B.weight": torch.randn(rows, 4), "diff_b": torch.randn(rows)}
        state |= {f"diffusion_model.blocks.2.{layer}.{end}": value for end, value in added.items()}
    save_file(state, tmp_path / "style.safetensors")
    before = velocity(whole)
    with pytest.raises(ValueError, match="mode='live' where it is offloaded"):
        apply(made, [tmp_path / "style.safetensors"])
    applied = apply(made, [tmp_path / "style.safetensors"], mode="live")
    apply(whole, [tmp_path / "style.safetensors"], mode="live")
    assert torch.equal(velocity(made), velocity(whole))
    assert not torch.allclose(velocity(made), before)
    applied.remove()
    assert torch.equal(velocity(made), before)


def test_a_model_that_is_dropped_is_freed_at_once() -> None:
    gc.collect()
    gc.disable()
    try:
        made = load_offloaded("tiny", "stream")
        velocity(made)
        gone = weakref.ref(made)
        del made
        assert gone() is None
    finally:
        gc.enable()


def test_what_cannot_be_offloaded_is_told(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="offload mode 'disk' is not one of none, blocks, stream"):
        load_offloaded("tiny", "disk")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="blocks_on_device is -1"):
        load_offloaded("tiny", "blocks", blocks_on_device=-1)
    foreign = BackboneSpec("foreign", "collections:OrderedDict", "tiny-2", 16, (4, 8, 8), "tiny-2", 96, 32)
    with pytest.raises(ValueError, match="'foreign' is no Wan transformer with weights"):
        load_offloaded(foreign, "stream")
    with pytest.raises(ValueError, match=r"cannot write .* the weights are offloaded"):
        load_offloaded("tiny", "stream").save_pretrained(tmp_path / "x")


def cut(file: Path) -> None:
    os.truncate(file, file.stat().st_size - 1000)


def delete(file: Path) -> None:
    file.unlink()


def rewrite(file: Path) -> None:
    file.write_bytes(file.read_bytes())


@pytest.mark.parametrize("damage", [cut, delete, rewrite])
def test_a_file_that_changes_meanwhile_is_named(damage: Callable[[Path], None], tmp_path: Path) -> None:
    path = official_sharded(tmp_path / "x", model(VARIANTS["i2v-2.2"]))
    made = load_offloaded(path, "stream")
    conditioning = given_by(made.config)
    with torch.no_grad():
        context = made.encode_context([torch.randn(3, made.config.text_dim)], conditioning)
        damage(next(path.glob("*-00002-of*.safetensors")))
        with pytest.raises(ValueError, match=r"-00002-of-00002\.safetensors' was changed, moved or deleted while the model was read"):
            made(torch.randn(1, made.config.out_dim, 3, 8, 8), torch.tensor([5.0]), context, conditioning)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_damaged_numbers_are_told_by_name(value: float, tmp_path: Path) -> None:
    file = comfy_file(tmp_path / "x", model(VARIANTS["i2v-2.2"]))
    state = load_file(file)
    key = next(key for key in state if key.endswith("blocks.1.ffn.2.weight"))
    state[key][3, 4] = value
    save_file(state, file)
    made = load_offloaded(file, "stream")
    with pytest.raises(ValueError, match=r"the weights of 'trunk\.blocks\.1\.ffn\.2' hold NaN or infinite numbers: the file is damaged"):
        velocity(made)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("mode", ["blocks", "stream"])
@pytest.mark.parametrize("quantise", [None, "int8"])
def test_a_gpu_computes_the_same_bits(mode: Any, quantise: Any, tmp_path: Path) -> None:
    path = saved(tmp_path, "vace")
    whole = load_backbone(path, device="cuda", quantise=quantise)
    made = load_offloaded(path, mode, blocks_on_device=1, device="cuda", quantise=quantise)
    for _ in range(3):
        assert torch.equal(velocity(made), velocity(whole))


def peak(folder: Path, mode: str, dtype: str = "float32") -> dict[str, Any]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", CHILD, str(folder), mode, dtype], env=environment, capture_output=True, text=True, check=True
    )
    found: dict[str, Any] = json.loads(done.stdout)
    assert found["finite"]
    return found


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_streamed_model_takes_two_blocks_of_memory(tmp_path: Path) -> None:
    config = DiTConfig(dim=1024, ffn_dim=4096, num_heads=8, num_layers=10, text_dim=64)
    numbers = write_wide(tmp_path, config) // 2
    block = 6 * 1024**2 + 2 * 1024 * 4096  # without keys and values of the context
    outside = numbers - 10 * (block + 2 * 1024**2)
    row = peak(tmp_path, "stream")
    assert row["most"] - row["before"] < 4 * (2 * block + outside) + 100 * MB < 4 * numbers / 1.5


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_the_width_of_t2v_14b_streams_in_less_than_6_gb_however_many_blocks(tmp_path: Path) -> None:
    """2 of its 40 blocks, in float32 from bf16; `WAN_BLOCKS=40` takes all of them, which writes 28.6 GB."""
    blocks = int(os.environ.get("WAN_BLOCKS", "2"))
    try:
        size = write_wide(tmp_path, T2V_14B.model_copy(update={"num_layers": blocks}))
        row = peak(tmp_path, "stream")
    finally:  # pytest keeps folders of earlier runs
        for file in tmp_path.glob("*.safetensors"):
            file.unlink()
    print(f"{blocks} blocks: {size / 1e9:.2f} GB of weights, {row['most'] / 1e9:.2f} GB of memory ({row['before'] / 1e9:.2f} before)")
    print(f"{row['encoded']:.1f} s to the context, {row['seconds']:.1f} s in all")
    assert row["most"] < 6e9

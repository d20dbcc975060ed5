"""Packed layouts of one model (fp8 in every spelling, GGUF) give their dequantised reference; modules, damage, host memory."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from dit_layouts import SMALL, VARIANTS, State, comfy_file, diffusers_file, model, state_in, write
from safetensors.torch import save_file
from wan_dit import load_backbone
from wan_dit._shared.mapped import read_mapped
from wan_dit.checkpoint import describe, read_checkpoint
from wan_dit.layouts import BLOCK, BLOCK_IMAGE, Layout
from wan_dit.model import WanDiT

KINDS = ("t2v", "i2v", "flf2v", "vace", "ti2v")
WIDE = {"dim": 256, "ffn_dim": 256, "freq_dim": 256, "text_dim": 256, "num_heads": 2}  # rows of K-quants are of 256 numbers
PRODUCTS = [f".{row.official}.weight" for row in (*BLOCK, *BLOCK_IMAGE) if row.own != "modulation"]
FP8 = torch.float8_e4m3fn


def variant(name: str, **changes: Any) -> WanDiT:
    return model(VARIANTS.get(name, SMALL).model_copy(update=changes))


def is_product(key: str) -> bool:
    return "blocks." in key and any(key.endswith(end) for end in PRODUCTS)


def numbers(made: WanDiT, layout: Layout) -> State:
    return state_in(made, layout)


def assert_same(loaded: WanDiT, reference: State) -> None:
    found = numbers(loaded, "official")
    assert found.keys() == reference.keys()
    assert [key for key, value in reference.items() if not torch.equal(found[key], value.float())] == []


SPELLINGS = {  # scale's name, its shape, further tensors a weight, further tensors of the file
    "older ComfyUI, musubi": (".scale_weight", "one", (".scale_input",), {"scaled_fp8": torch.empty(0, dtype=FP8)}),
    "newer ComfyUI": (".weight_scale", "one", (".input_scale",), {}),
    "lightx2v": (".weight_scale", "rows", (), {}),
    "a row, older": (".scale_weight", "rows", (), {"scaled_fp8": torch.empty(2, dtype=FP8)}),
}


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("spelling", SPELLINGS)
def test_scaled_fp8_is_its_dequantised_reference(name: str, spelling: str, tmp_path: Path) -> None:
    end, shape, ignored, extra = SPELLINGS[spelling]
    made, stored, reference = variant(name), dict(extra), {}
    for key, value in numbers(made, "official").items():
        if not is_product(key):
            stored[key] = reference[key] = value.half() if value.ndim == 1 else value
            continue
        scale = value.abs().amax(1, keepdim=True) / 448 if shape == "rows" else (value.abs().amax() / 448).reshape(1)
        stored[key] = (value / scale).to(FP8)
        stored[key.removesuffix(".weight") + end] = scale
        stored |= {key.removesuffix(".weight") + other: torch.ones(1) for other in ignored}
        reference[key] = stored[key].float() * scale
    save_file({f"model.diffusion_model.{key}": value for key, value in stored.items()}, tmp_path / "fp8.safetensors")
    loaded = WanDiT.from_pretrained(tmp_path / "fp8.safetensors")
    assert loaded.config == made.config
    assert_same(loaded, reference)
    spec = describe(tmp_path / "fp8.safetensors")
    assert spec == made.config.spec(spec.name, weights=spec.weights)


@pytest.mark.parametrize("kind", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_unscaled_fp8_is_taken_with_a_warning(kind: torch.dtype, tmp_path: Path) -> None:
    made = variant("i2v")
    stored = {key: value.to(kind) if is_product(key) else value.bfloat16() for key, value in numbers(made, "official").items()}
    save_file(stored, tmp_path / "cast.safetensors")
    with pytest.warns(UserWarning, match="in fp8 without scales, a plain cast"):
        loaded = WanDiT.from_pretrained(tmp_path / "cast.safetensors")
    assert_same(loaded, {key: value.float() for key, value in stored.items()})


def write_gguf(file: Path, state: State, kind: gguf.GGMLQuantizationType) -> State:
    """As city96's converter: products quantised, the rest F32 or F16, axes beyond four flattened; returns what it stands for."""
    writer, reference = gguf.GGUFWriter(file, "wan"), {}
    for key, value in state.items():
        array = value.numpy()
        if array.ndim > 4:
            writer.add_array(f"comfy.gguf.orig_shape.{key}", list(array.shape))
            array = array.reshape(array.shape[0], -1)
        if kind != gguf.GGMLQuantizationType.F16 and is_product(key):
            packed = gguf.quants.quantize(array, kind)
            writer.add_tensor(key, packed, raw_dtype=kind)
            reference[key] = torch.from_numpy(gguf.quants.dequantize(packed, kind)).reshape(value.shape)
        else:
            array = array.astype(np.float16 if value.ndim > 1 else np.float32)
            writer.add_tensor(key, array)
            reference[key] = torch.from_numpy(array.astype(np.float32)).reshape(value.shape)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return reference


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("kind", ["Q8_0", "Q5_1", "F16"])
def test_gguf_is_its_dequantised_reference(name: str, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = variant(name, **WIDE)
    reference = write_gguf(tmp_path / "wan.gguf", numbers(made, "official"), gguf.GGMLQuantizationType[kind])
    loaded = WanDiT.from_pretrained(tmp_path / "wan.gguf")
    assert loaded.config == made.config
    assert_same(loaded, reference)
    monkeypatch.setattr(gguf.quants, "dequantize", lambda *_: pytest.fail("a description needs no numbers"))
    spec = describe(tmp_path / "wan.gguf")
    assert spec == made.config.spec(spec.name, weights=spec.weights)


def test_gguf_k_quants_are_their_dequantised_reference(tmp_path: Path) -> None:
    """The package cannot make K-quants, only read them: the blocks are random bytes with scales that are small numbers."""
    made, kind = variant("t2v", **WIDE), gguf.GGMLQuantizationType.Q4_K
    block, size = gguf.GGML_QUANT_SIZES[kind]
    chance, writer, reference = np.random.default_rng(0), gguf.GGUFWriter(tmp_path / "wan.gguf", "wan"), {}
    for key, value in numbers(made, "official").items():
        reference[key] = value
        if is_product(key):
            blocks = chance.integers(0, 256, (value.shape[0], value.shape[1] // block, size), np.uint8)
            blocks[..., :4] = np.full((*blocks.shape[:2], 2), 0.01, np.float16).view(np.uint8).reshape(*blocks.shape[:2], 4)
            packed = blocks.reshape(value.shape[0], -1)
            writer.add_tensor(key, packed, raw_dtype=kind)
            reference[key] = torch.from_numpy(gguf.quants.dequantize(packed, kind))
        elif value.ndim > 4:
            writer.add_array(f"comfy.gguf.orig_shape.{key}", list(value.shape))
            writer.add_tensor(key, value.numpy().reshape(len(value), -1))
        else:
            writer.add_tensor(key, value.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    assert_same(WanDiT.from_pretrained(tmp_path / "wan.gguf"), reference)


def test_types_may_differ_from_tensor_to_tensor(tmp_path: Path) -> None:
    kinds = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
    stored = {key: value.to(kinds[i % 4]) for i, (key, value) in enumerate(numbers(variant("flf2v"), "official").items())}
    save_file(stored, tmp_path / "mixed.safetensors")
    loaded = WanDiT.from_pretrained(tmp_path / "mixed.safetensors")
    assert_same(loaded, {key: value.float() for key, value in stored.items()})
    assert {
        value.dtype for value in WanDiT.from_pretrained(tmp_path / "mixed.safetensors", dtype=torch.bfloat16).state_dict().values()
    } == {torch.bfloat16}


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model.", "diffusion_model.", "module.", "net."])
@pytest.mark.parametrize("name", ["i2v", "vace"])
def test_every_prefix_is_taken_off(prefix: str, name: str, tmp_path: Path) -> None:
    made = variant(name)
    save_file({prefix + key: value for key, value in numbers(made, "official").items()}, tmp_path / "wan.safetensors")
    loaded = WanDiT.from_pretrained(tmp_path / "wan.safetensors")
    assert (loaded.config, loaded.fingerprint()) == (made.config, made.fingerprint())


def vace_halves(folder: Path) -> tuple[WanDiT, Path, Path]:
    made = variant("vace")
    state = numbers(made, "official")
    base = {f"diffusion_model.{key}": value for key, value in state.items() if not key.startswith("vace_")}
    module = {key: value for key, value in state.items() if key.startswith("vace_")}
    return (
        made,
        write(folder, base, name="t2v.safetensors") / "t2v.safetensors",
        write(folder, module, name="vace.safetensors") / "vace.safetensors",
    )


def test_a_vace_module_is_read_over_its_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made, base, module = vace_halves(tmp_path)
    loaded = load_backbone(f"{base}+{module}")
    assert (loaded.config, loaded.fingerprint()) == (made.config, made.fingerprint())
    assert describe(f"{base}+{module}").vace
    monkeypatch.chdir(tmp_path)
    assert load_backbone("t2v.safetensors+vace.safetensors").fingerprint() == made.fingerprint()
    with pytest.raises(ValueError, match=rf"holds VACE blocks alone: .* as MODEL\+{module}"):
        load_backbone(str(module))
    with pytest.raises(ValueError, match="is in several of these files"):
        load_backbone(f"{base}+{base}")
    with pytest.raises(LookupError, match="no backbone named"):
        load_backbone(f"{base}+{tmp_path}/nothing.safetensors")


def test_a_model_with_vace_in_its_config_takes_a_module_too(tmp_path: Path) -> None:
    """The base may be a folder whose config.json knows of no VACE."""
    made, _, module = vace_halves(tmp_path)
    state = {key: value for key, value in numbers(made, "official").items() if not key.startswith("vace_")}
    fields = made.config.model_copy(update={"vace_layers": ()}).model_dump(mode="json")
    base = write(tmp_path / "base", state, {"format": "wan-dit/1", **fields})
    assert load_backbone(f"{base}+{module}").fingerprint() == made.fingerprint()


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-1000])


def pointer(file: Path) -> None:
    file.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 5\n")


def garbage(file: Path) -> None:
    file.write_bytes(b"\x00" * 100)


@pytest.mark.parametrize("end", ["safetensors", "gguf", "pth"])
@pytest.mark.parametrize(
    ("damage", "message"),
    [(truncate, "not a readable|which takes"), (pointer, "pointer of Git LFS|does not begin with GGUF"), (garbage, "not a readable")],
)
def test_a_damaged_file_is_named(damage: Any, message: str, end: str, tmp_path: Path) -> None:
    made = variant("t2v", **WIDE)
    file = tmp_path / f"wan.{end}"
    if end == "gguf":
        write_gguf(file, numbers(made, "official"), gguf.GGMLQuantizationType.Q8_0)
    elif end == "pth":
        torch.save(numbers(made, "official"), file)
    else:
        save_file(numbers(made, "official"), file)
    damage(file)
    for read in (describe, WanDiT.from_pretrained):
        with pytest.raises(ValueError, match=message) as caught:
            read(file)
        assert str(file) in str(caught.value)
        assert "\n" not in str(caught.value)


def test_a_shard_that_is_missing_is_named(tmp_path: Path) -> None:
    state = numbers(variant("t2v"), "official")
    shards = [f"diffusion_pytorch_model-{i:05d}-of-00002.safetensors" for i in (1, 2)]
    write(tmp_path, state, name=shards[0])
    index = {"weight_map": {key: shards[i % 2] for i, key in enumerate(state)}}
    (tmp_path / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(FileNotFoundError, match=rf"incomplete: 1 of its 2 files are missing \({shards[1]}\); fetch it again"):
        WanDiT.from_pretrained(tmp_path)


def test_an_unfinished_download_is_told(tmp_path: Path) -> None:
    (tmp_path / "wan.safetensors.incomplete").write_bytes(b"half")
    with pytest.raises(ValueError, match="is a download that did not end"):
        WanDiT.from_pretrained(tmp_path / "wan.safetensors.incomplete")


@pytest.mark.parametrize("make", [comfy_file, diffusers_file])
def test_a_mapping_without_reserved_memory_holds_the_same_tensors(make: Any, tmp_path: Path) -> None:
    from wan_dit._shared.weights import read_state

    file = make(tmp_path / "x", variant("vace"))
    ours, theirs = read_mapped(file), read_state(file)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], value) for key, value in theirs.items())
    before = file.read_bytes()
    next(iter(ours.values())).zero_()  # in memory, not in the file
    assert file.read_bytes() == before


PEAK = r"""
import re, sys, torch
from wan_dit.model import WanDiT
from wan_dit import checkpoint
def peak(): return int(re.search(r"VmHWM:\s+(\d+)", open("/proc/self/status").read())[1]) * 1024  # ru_maxrss has the parent's
torch.zeros(8).bfloat16().float()
before = peak()
made = WanDiT.from_pretrained(sys.argv[1], dtype=torch.bfloat16)
total = sum(float(value.sum()) for value in made.state_dict().values())
print(peak() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("layers", [pytest.param(2, id="small"), pytest.param(20, marks=pytest.mark.slow, id="large")])
@pytest.mark.parametrize("kind", ["safetensors", "fp8"])
def test_the_peak_of_memory_is_that_of_the_weights(layers: int, kind: str, tmp_path: Path) -> None:
    """Every page is touched, so that a mapped file counts: at most 1.1 times a file in bf16."""
    config = SMALL.model_copy(update={"dim": 1024, "ffn_dim": 4096, "num_heads": 8, "num_layers": layers})
    with torch.device("meta"):
        shapes = {key: value.shape for key, value in state_in(WanDiT(config), "official").items()}
    state: State = {}
    for key, shape in shapes.items():
        state[key] = torch.full(shape, 0.5, dtype=torch.bfloat16)
        if kind == "fp8" and is_product(key):
            state[key] = state[key].to(FP8)
            state[f"{key}_scale"] = torch.ones(1)
    save_file(state, tmp_path / "wan.safetensors")
    size = 2 * sum(shape.numel() for shape in shapes.values())
    result = subprocess.run([sys.executable, "-c", PEAK, str(tmp_path / "wan.safetensors")], capture_output=True, text=True, check=True)
    # of fp8 the pages of the file besides, which the system may drop, and 16 MB of float32 pieces that the allocator keeps
    unpacking = (tmp_path / "wan.safetensors").stat().st_size + (16 << 20) if kind == "fp8" else 0
    assert int(result.stdout) <= 1.1 * size + unpacking


def test_reading_a_checkpoint_unpacks_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_gguf(tmp_path / "wan.gguf", numbers(variant("t2v", **WIDE), "official"), gguf.GGMLQuantizationType.Q8_0)
    monkeypatch.setattr(gguf.quants, "dequantize", lambda *_: pytest.fail("unpacked"))
    assert len(read_checkpoint(tmp_path / "wan.gguf")[1]) == len(model(SMALL).state_dict())

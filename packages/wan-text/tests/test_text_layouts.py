"""Every layout of one encoder loads to the same tensors: exactly, or as near as its bits allow; what would be noise is refused."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import sentencepiece
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from wan_text import TextEncoder, UMT5Config, load_text_encoder
from wan_text._shared.gguf_file import read_gguf
from wan_text._shared.quantised import packed_state, quantise_rows
from wan_text.layouts import COMFY, GGUF, HUGGING_FACE, OFFICIAL, OWN, table
from wan_text.streaming import StreamingTextEncoder

State = dict[str, Tensor]
FP8 = torch.float8_e4m3fn
PROMPTS = ["a red circle", "", "a blue star moves up", "a red circle moves left, a blue star moves right", "été １２ 🐱"]


@pytest.fixture(scope="module")
def encoder(spiece: bytes) -> TextEncoder:
    """Widths that GGUF's blocks of 32 divide; q small as in real checkpoints."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 420, "dim": 64, "dim_attn": 64, "dim_ffn": 96, "num_heads": 4, "num_layers": 3}
    module = TextEncoder(UMT5Config(**sizes, embedding_space="umt5-64x3"), spiece).eval().requires_grad_(False)
    for name, parameter in module.named_parameters():
        if "norm" in name:
            parameter.normal_(1, 0.2)
    return module


def state_of(encoder: TextEncoder, layout: int) -> State:
    names = table(encoder.config.num_layers, OWN, layout)
    return {names[key]: value.clone() for key, value in encoder.umt5.state_dict().items()}


def is_linear(key: str, value: Tensor) -> bool:
    return value.ndim == 2 and not any(part in key for part in ("shared", "relative_attention_bias", "token_emb", "rel_b", "pos_embedding"))


def scaled(state: State, scale_name: str, dtype: torch.dtype = FP8, **more: Callable[[str], Tensor]) -> State:
    made: State = {}
    for key, value in state.items():
        stem = key.removesuffix(".weight")
        if is_linear(key, value):
            scale = value.abs().max() / torch.finfo(dtype).max
            made |= {key: (value / scale).to(dtype), f"{stem}.{scale_name}": scale}
            made |= {f"{stem}.{name}": make(stem) for name, make in more.items()}
        else:
            made[key] = value.to(torch.bfloat16)
    return made


def scaled_rows(state: State) -> State:
    made = dict(state)
    for key in [key for key, value in state.items() if is_linear(key, value)]:
        made[key], made[f"{key}_scale"] = quantise_rows(state[key])
    return made


def quant_json(stem: str) -> Tensor:
    return torch.tensor(list(json.dumps({"format": "float8_e4m3fn"}).encode()), dtype=torch.uint8)


def one(stem: str) -> Tensor:
    return torch.ones(())


def embedded(spiece: bytes) -> Tensor:
    return torch.frombuffer(bytearray(spiece), dtype=torch.uint8)


def fields(proto: bytes) -> Iterator[tuple[int, bytes]]:
    """Numbers and contents of a protocol buffer's length-delimited fields."""
    at = 0

    def varint() -> int:
        nonlocal at
        value = shift = 0
        while True:
            byte = proto[at]
            at, value, shift = at + 1, value | (byte & 127) << shift, shift + 7
            if byte < 128:
                return value

    while at < len(proto):
        number, wire = divmod(varint(), 8)
        if wire == 2:
            size = varint()
            at += size
            yield number, proto[at - size : at]
        elif wire == 0:
            varint()
        else:
            at += 4


def write_gguf(path: Path, encoder: TextEncoder, kind: str) -> None:
    writer = gguf.GGUFWriter(path, "t5encoder")
    pieces = sentencepiece.SentencePieceProcessor(model_proto=encoder.tokenizer.model)
    ids = range(pieces.get_piece_size())
    kinds = [2 if pieces.is_unknown(i) else 3 if pieces.is_control(i) else 6 if pieces.is_byte(i) else 1 for i in ids]
    writer.add_tokenizer_model("t5")
    writer.add_token_list([pieces.id_to_piece(i) for i in ids])
    writer.add_token_scores([pieces.get_score(i) for i in ids])
    writer.add_token_types(kinds)
    writer.add_pad_token_id(0)
    writer.add_eos_token_id(1)
    writer.add_bos_token_id(2)
    writer.add_unk_token_id(3)
    normalizer = dict(fields(dict(fields(encoder.tokenizer.model))[3]))
    writer.add_precompiled_charsmap(normalizer[2])
    for key, value in state_of(encoder, GGUF).items():
        quantised = gguf.GGMLQuantizationType[kind] if is_linear(key, value) or "token_embd" in key else gguf.GGMLQuantizationType.F32
        writer.add_tensor(key, gguf.quants.quantize(value.numpy(), quantised), raw_dtype=quantised)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def kijai(encoder: TextEncoder) -> State:
    state = {key.replace(".attn.", ".attention."): value for key, value in state_of(encoder, OFFICIAL).items()}
    return {"final_norm.weight": state.pop("norm.weight")} | state


def full_model(encoder: TextEncoder) -> State:
    return state_of(encoder, HUGGING_FACE) | {
        "decoder.block.0.layer.0.SelfAttention.q.weight": torch.ones(2),
        "lm_head.weight": torch.ones(2),
    }


STATES: dict[str, tuple[Callable[[TextEncoder], State], float]] = {
    "official": (lambda e: state_of(e, OFFICIAL), 0),
    "official, prefixed": (lambda e: {f"encoder.{key}": value for key, value in state_of(e, OFFICIAL).items()}, 0),
    "kijai": (kijai, 0),
    "hugging face, encoder and decoder": (full_model, 0),
    "comfy": (lambda e: {f"{COMFY}transformer." + key: value for key, value in state_of(e, HUGGING_FACE).items()}, 0),
    "comfy, within a file of a whole model": (
        lambda e: (
            {f"{COMFY}transformer." + key: value for key, value in state_of(e, HUGGING_FACE).items()}
            | {f"{COMFY}logit_scale": torch.ones(()), "model.diffusion_model.x.weight": torch.ones(2), "vae.conv1.weight": torch.ones(2)}
        ),
        0,
    ),
    "comfy, bf16": (lambda e: {key: value.bfloat16() for key, value in state_of(e, HUGGING_FACE).items()}, 5e-3),
    "comfy, fp8 scaled": (
        lambda e: scaled(state_of(e, HUGGING_FACE), "scale_weight", scale_input=one) | {"scaled_fp8": torch.empty(0, dtype=FP8)},
        0.07,
    ),
    "comfy, fp8 scaled, new": (lambda e: scaled(state_of(e, HUGGING_FACE), "weight_scale", comfy_quant=quant_json), 0.07),
    "fp8 e5m2 scaled": (lambda e: scaled(state_of(e, OFFICIAL), "scale_weight", torch.float8_e5m2), 0.14),
    "int8": (lambda e: scaled_rows(state_of(e, OFFICIAL)), 0.012),
    "fp8 cast": (lambda e: {k: v.to(FP8) if is_linear(k, v) else v for k, v in state_of(e, OFFICIAL).items()}, 0.07),
}


def write(layout: str, encoder: TextEncoder, folder: Path) -> Path:
    """The encoder as one file that holds its tokenizer or has it beside."""
    if layout.startswith("gguf"):
        write_gguf(folder / "umt5.gguf", encoder, layout.removeprefix("gguf "))
        return folder / "umt5.gguf"
    state = STATES[layout][0](encoder)
    if layout.startswith("comfy"):
        prefix = {"comfy": f"{COMFY}transformer.", "comfy, within a file of a whole model": COMFY}.get(layout, "")
        state[f"{prefix}spiece_model"] = embedded(encoder.tokenizer.model)
    else:
        (folder / "spiece.model").write_bytes(encoder.tokenizer.model)
    save_file(state, folder / "umt5.safetensors")
    return folder / "umt5.safetensors"


def relative(got: list[Tensor], expected: list[Tensor]) -> float:
    """Relative L2 distance of contexts."""
    return float((torch.cat(got) - torch.cat(expected)).norm() / torch.cat(expected).norm())


@pytest.mark.filterwarnings("ignore:.*plain cast")
@pytest.mark.parametrize("layout", [*STATES, "gguf F32", "gguf F16", "gguf Q8_0", "gguf Q4_0"])
def test_every_layout_is_the_same_encoder(encoder: TextEncoder, tmp_path: Path, layout: str) -> None:
    near = {"gguf F32": 0, "gguf F16": 5e-4, "gguf Q8_0": 1e-2, "gguf Q4_0": 0.2}
    bound = STATES[layout][1] if layout in STATES else near[layout]
    path = write(layout, encoder, tmp_path)
    loaded = TextEncoder.from_pretrained(path)
    assert loaded.tokenizer.tokenize(PROMPTS) == encoder.tokenizer.tokenize(PROMPTS)
    expected = encoder.umt5.state_dict()
    for key, packed in packed_state(loaded.umt5.state_dict()).items():
        value = packed.to("cpu", torch.float32)
        off = float((value - expected[key]).norm() / expected[key].norm())
        assert off <= bound, f"{key}: {off:.3g}"
    expected_contexts = encoder.encode(PROMPTS)
    assert relative(loaded.encode(PROMPTS), expected_contexts) <= 3 * bound
    for dtype in (torch.float32, torch.bfloat16):
        loaded, streamed = (kind.from_pretrained(path, dtype=dtype) for kind in (TextEncoder, StreamingTextEncoder))
        assert all(torch.equal(a, b) for a, b in zip(streamed.encode(PROMPTS), loaded.encode(PROMPTS), strict=True))
        assert streamed.fingerprint() == loaded.fingerprint()


def test_a_plain_cast_is_warned_of(encoder: TextEncoder, tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match=r"holds 21 tensors in fp8 without scales, a plain cast: several per cent off"):
        TextEncoder.from_pretrained(write("fp8 cast", encoder, tmp_path))


Q = "encoder.block.0.layer.0.SelfAttention.q"


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (lambda s: s.pop(f"{Q}.scale_weight"), rf"tensor '{Q}.weight' is torch.float8_e4m3fn and has no scale"),
        (lambda s: s.update({f"{Q}.scale_weight": torch.tensor(0.0)}), rf"'{Q}.scale_weight' holds a number that is no scale"),
        (lambda s: s.update({f"{Q}.scale_weight": torch.tensor(float("nan"))}), rf"'{Q}.scale_weight' holds a number that is no scale"),
        (lambda s: s.update({f"{Q}.scale_weight": torch.ones(3)}), rf"'{Q}.scale_weight' is \(3,\), expected one number or 64"),
        (lambda s: s.update({f"{Q}.weight": torch.zeros(64, 64)}), rf"'{Q}.scale_weight' is the scale of a weight in torch.float32"),
        (
            lambda s: s.update({"other.scale_weight": torch.ones(())}),
            "is the scale of 'other.weight', which is missing",
        ),
        (
            lambda s: s.update({f"{Q}.comfy_quant": torch.tensor(list(b'{"format": "nvfp4"}'), dtype=torch.uint8)}),
            "is 'nvfp4', expected one of",
        ),
        (lambda s: s.update({f"{Q}.comfy_quant": torch.zeros(4, dtype=torch.uint8)}), rf"'{Q}.comfy_quant' is not readable"),
        (
            lambda s: s.update({f"{Q}.comfy_quant": torch.tensor(list(b'{"format": "float8_e5m2"}'), dtype=torch.uint8)}),
            rf"'{Q}.comfy_quant' is 'float8_e5m2', but its weight is torch.float8_e4m3fn",
        ),
    ],
)
def test_fp8_that_would_be_noise_is_refused(encoder: TextEncoder, tmp_path: Path, break_it: Callable[[State], Any], message: str) -> None:
    path = write("comfy, fp8 scaled", encoder, tmp_path)
    state = load_file(path)
    break_it(state)
    save_file(state, path)
    with pytest.raises(ValueError, match=message):
        TextEncoder.from_pretrained(path)


@pytest.mark.filterwarnings("ignore:.*plain cast")
def test_a_scaled_file_that_lost_all_its_scales_is_refused(encoder: TextEncoder, tmp_path: Path) -> None:
    path = write("fp8 e5m2 scaled", encoder, tmp_path)
    save_file({key: value for key, value in load_file(path).items() if not key.endswith("scale_weight")}, path)
    for reader in (TextEncoder, StreamingTextEncoder):
        with pytest.raises(ValueError, match=r"uses the whole range of torch.float8_e5m2, so it was scaled, and its scale is missing"):
            reader.from_pretrained(path).encode(["a"])


def test_int8_by_rows(encoder: TextEncoder, tmp_path: Path) -> None:
    encoder.save_pretrained(tmp_path / "full")
    small = load_text_encoder(str(tmp_path / "full"), quantise="int8")
    exact = encoder.encode(PROMPTS)
    off = relative(small.encode(PROMPTS), exact)
    fp8 = TextEncoder.from_pretrained(write("comfy, fp8 scaled", encoder, tmp_path))
    assert 0 < off < 0.025
    assert off < relative(fp8.encode(PROMPTS), exact) / 2
    q = small.umt5.blocks[0].attn.q
    assert (q.weight.dtype, q.weight_scale.dtype, tuple(q.weight_scale.shape)) == (torch.int8, torch.float32, (64, 1))
    assert small.fingerprint() != encoder.fingerprint()
    small.save_pretrained(tmp_path / "small")
    again = load_text_encoder(str(tmp_path / "small"))
    assert again.fingerprint() == small.fingerprint()
    assert all(torch.equal(a, b) for a, b in zip(again.encode(PROMPTS), small.encode(PROMPTS), strict=True))
    streamed = load_text_encoder(str(tmp_path / "small"), stream=True)
    assert streamed.fingerprint() == small.fingerprint()
    assert all(torch.equal(a, b) for a, b in zip(streamed.encode(PROMPTS), small.encode(PROMPTS), strict=True))
    half = load_text_encoder(str(tmp_path / "small"), dtype=torch.bfloat16)
    assert half.umt5.blocks[0].attn.q.weight_scale.dtype == torch.float32
    assert relative([c.float() for c in half.encode(PROMPTS)], exact) < 0.05


def test_one_tensor_in_two_files_of_a_folder_is_refused(encoder: TextEncoder, tmp_path: Path) -> None:
    file = write("official", encoder, tmp_path)
    save_file(scaled(state_of(encoder, OFFICIAL), "scale_weight"), tmp_path / "umt5_fp8.safetensors")
    with pytest.raises(ValueError, match=r"tensor 'blocks.0.attn.k.weight' is in several files: give the one to read"):
        TextEncoder.from_pretrained(tmp_path)
    TextEncoder.from_pretrained(file)


def test_a_broken_gguf_file_is_refused_wherever_it_is_cut(tmp_path: Path, encoder: TextEncoder) -> None:
    write_gguf(tmp_path / "whole.gguf", encoder, "F32")
    data = (tmp_path / "whole.gguf").read_bytes()
    for size in (0, 3, 4, 23, 24, 60, 2000, len(data) // 2, len(data) - 100):
        (tmp_path / "cut.gguf").write_bytes(data[:size])
        with pytest.raises(ValueError, match="is not a readable GGUF file"):
            TextEncoder.from_pretrained(tmp_path / "cut.gguf")
    (tmp_path / "cut.gguf").write_bytes(b"GGUF" + bytes([9]) + data[5:])
    with pytest.raises(ValueError, match=r"does not begin with GGUF and one of the versions \(2, 3\)"):
        read_gguf(tmp_path / "cut.gguf")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("cases", [40, pytest.param(400, marks=pytest.mark.slow)])
@pytest.mark.parametrize("container", ["comfy, fp8 scaled", "pickle", "gguf Q8_0"])
def test_damaged_headers_are_one_kind_of_error(encoder: TextEncoder, tmp_path: Path, container: str, cases: int) -> None:
    if container == "pickle":
        torch.save(state_of(encoder, OFFICIAL), tmp_path / "umt5.pth")
        (tmp_path / "spiece.model").write_bytes(encoder.tokenizer.model)
        path = tmp_path / "umt5.pth"
    else:
        path = write(container, encoder, tmp_path)
    whole, rng, refused = path.read_bytes(), np.random.default_rng(0), 0
    sizes = {"comfy, fp8 scaled": 8 + int.from_bytes(whole[:8], "little"), "pickle": 6000, "gguf Q8_0": len(whole) // 3}
    for _ in range(cases):
        damaged = bytearray(whole)
        for at in rng.integers(0, sizes[container], rng.integers(1, 30)):
            damaged[at] = rng.integers(0, 256)
        path.write_bytes(damaged[: rng.integers(1, len(damaged)) if rng.random() < 0.3 else None])
        try:
            StreamingTextEncoder.from_pretrained(path).encode(["a red circle"])
        except ValueError:
            refused += 1
    assert refused > cases / 4  # bytes of the tokenizer or of numbers in a header change no structure


def test_quantised_gguf_takes_the_package_gguf(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, encoder: TextEncoder) -> None:
    write_gguf(tmp_path / "a.gguf", encoder, "F16")
    write_gguf(tmp_path / "b.gguf", encoder, "Q8_0")
    monkeypatch.setitem(sys.modules, "gguf", None)
    TextEncoder.from_pretrained(tmp_path / "a.gguf")
    with pytest.raises(ValueError, match="pip install gguf"):
        TextEncoder.from_pretrained(tmp_path / "b.gguf")

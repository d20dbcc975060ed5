"""The account of every key of a LoRA file, files that are damaged or of another model, and how LoRAs are named."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from wan_dit.config import DiTConfig
from wan_dit.lora import Lora, LoraSpec, apply, load_lora, match, parse_lora
from wan_dit.lora.ledger import Entry
from wan_dit.model import WanDiT

SMALL = DiTConfig(dim=32, ffn_dim=48, freq_dim=16, text_dim=12, num_heads=2, num_layers=2)
State = dict[str, torch.Tensor]


def model() -> WanDiT:
    made = WanDiT(SMALL)
    made.init_weights(torch.Generator().manual_seed(0))
    return made.eval()


def written(state: State, path: Path, name: str = "lora") -> Path:
    file = path / f"{name}.safetensors"
    save_file(state, file)
    return file


def pair(layer: str = "diffusion_model.blocks.0.self_attn.q", size: int = 32, rank: int = 2) -> State:
    return {f"{layer}.lora_A.weight": torch.ones(rank, size), f"{layer}.lora_B.weight": torch.ones(size, rank)}


def planted() -> State:
    good = pair() | {"diffusion_model.blocks.0.modulation.diff": torch.zeros(1, 6, 32)}
    bad = {
        **pair("diffusion_model.blocks.7.self_attn.q"),
        **pair("diffusion_model.blocks.1.self_attn.q", size=16),
        **pair("diffusion_model.blocks.1.cross_attn.k_img"),
        **pair("diffusion_model.img_emb.proj.1"),
        "diffusion_model.blocks.1.norm3.diff": torch.zeros(33),
        "diffusion_model.blocks.1.ffn.0.lora_A.weight": torch.zeros(2, 32),
        "diffusion_model.blocks.1.ffn.2.alpha": torch.tensor(1.0),
        "diffusion_model.blocks.1.self_attn.k.surprise": torch.zeros(1),
        "step": torch.zeros(1),
    }
    dora = pair("diffusion_model.blocks.1.self_attn.v") | {"diffusion_model.blocks.1.self_attn.v.dora_scale": torch.ones(32, 1)}
    twice = pair("blocks.0.attn1.to_q")
    return good | bad | dora | twice


PLANTED = {
    "applied": 3,
    "skipped": 4,
    "no such module": 2,
    "shape mismatch": 3,
    "not understood": 9,
}


def test_the_ledger_has_every_key_once_and_for_a_reason(tmp_path: Path) -> None:
    state = planted()
    ledger = match(model(), load_lora(written(state, tmp_path))).ledger
    assert sorted(entry.key for entry in ledger.entries) == sorted(state)
    assert ledger.counts() == PLANTED
    why = {entry.key.removeprefix("diffusion_model."): entry.why for entry in ledger.entries}
    assert why["blocks.1.self_attn.q.lora_A.weight"] == ("it changes [16, 16], the tensor is [32, 32] (down [2, 16], up [16, 2])")
    assert why["blocks.1.norm3.diff"] == "it changes [33], the tensor is [32] (diff [33])"
    assert why["blocks.1.cross_attn.k_img.lora_B.weight"] == why["img_emb.proj.1.lora_A.weight"] == "this model has no image branch"
    assert why["blocks.1.ffn.0.lora_A.weight"] == "incomplete, its layer has down alone"
    assert why["blocks.1.ffn.2.alpha"] == "incomplete, its layer has alpha alone"
    assert why["blocks.1.self_attn.v.lora_A.weight"] == "DoRA is not supported"
    assert why["blocks.0.self_attn.q.lora_A.weight"] == "a second change of one tensor, under another name"
    assert {entry.tensor for entry in ledger.of("applied")} == {"trunk.blocks.0.self_attn.q.weight", "trunk.blocks.0.modulation"}


def test_strict_refuses_before_anything_is_changed_and_warn_warns_once(tmp_path: Path) -> None:
    path = written(planted(), tmp_path)
    made = model()
    for mode in ("merge", "live"):
        with pytest.raises(
            ValueError, match=r"nothing was changed: lora\.safetensors: 3 of 21 keys applied; skipped 4 .*; no such module 2 "
        ):
            apply(made, [written(pair(), tmp_path, "good"), path], mode=mode)  # type: ignore[arg-type]
        assert made.fingerprint() == model().fingerprint()
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        apply(made, [path], on_unmatched="warn")
    assert len(told) == 1
    assert "not understood 9 (" in str(told[0].message)
    changed = [key for key, value in model().state_dict().items() if not torch.equal(value, made.state_dict()[key])]
    assert changed == ["trunk.blocks.0.self_attn.q.weight"]


@pytest.mark.parametrize("mode", ["strict", "warn"])
@pytest.mark.parametrize(
    ("state", "message"),
    [
        (pair("diffusion_model.blocks.39.self_attn.q", size=5120), "another architecture: it looks like width 5120 and at least 40 blocks"),
        (pair(size=5120), "it looks like width 5120 and at least 1 blocks; the model has width 32 and 2 blocks"),
        (pair("transformer.double_blocks.0.img_attn.qkv"), r"no Wan at all \(its layers are called double_blocks\.0\.img_attn\.qkv\)"),
        (pair("lora_unet_vace_blocks_0_self_attn_q"), "this model has no VACE blocks"),
    ],
    ids=["14B", "wide", "hunyuan", "vace"],
)
def test_nothing_that_fits_is_always_an_error(state: State, message: str, mode: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        apply(model(), [written(state, tmp_path)], on_unmatched=mode)


def test_a_partial_lora_is_whole(tmp_path: Path) -> None:
    path = written(pair("lora_unet_blocks_1_cross_attn_v") | pair("lora_unet_head_head"), tmp_path)
    with pytest.raises(ValueError, match=r"shape mismatch 2 \(lora_unet_head_head\.lora_A\.weight"):
        apply(model(), [path])
    assert apply(model(), [written(pair("lora_unet_blocks_1_cross_attn_v"), tmp_path)]).ledger.counts() == {"applied": 2}


DAMAGED = (
    ("nan", lambda s: s["up"].fill_(float("nan")), r"lora_B\.weight' holds numbers that are not finite"),
    ("inf alpha", lambda s: s.update(alpha=torch.tensor(float("inf"))), r"alpha' holds numbers that are not finite"),
    ("two alphas", lambda s: s.update(alpha=torch.ones(2)), r"alpha' is \[2\], expected one number"),
    ("A alone", lambda s: s.pop("up"), r"holds no LoRA that can be read: incomplete, its layer has down alone"),
    ("alpha alone", lambda s: (s.pop("up"), s.pop("down"), s.update(alpha=torch.ones(1))), "its layer has alpha alone"),
    ("ranks", lambda s: s.update(up=torch.ones(32, 3)), r"parts do not go together: down \[2, 32\], up \[32, 3\]"),
    ("transposed", lambda s: s.update(up=torch.ones(16, 2), down=torch.ones(2, 64)), r"it changes \[16, 64\], the tensor is \[32, 32\]"),
    ("scalar", lambda s: s.update(up=torch.tensor(1.0)), r"parts do not go together: down \[2, 32\], up \[\]"),
    ("nothing", lambda s: s.clear(), r"holds no LoRA that can be read \(it starts with nothing\)"),
)


@pytest.mark.parametrize(("damage", "message"), [row[1:] for row in DAMAGED], ids=[row[0] for row in DAMAGED])
def test_bad_files_are_named(damage: Any, message: str, tmp_path: Path) -> None:
    ends = {"down": "lora_A.weight", "up": "lora_B.weight", "alpha": "alpha"}
    state = dict(zip(("down", "up"), pair().values(), strict=True))
    damage(state)
    path = written({f"diffusion_model.blocks.0.self_attn.q.{ends[part]}": value for part, value in state.items()}, tmp_path)
    made = model()
    with pytest.raises(ValueError, match=message):
        apply(made, [path])
    assert made.fingerprint() == model().fingerprint()


def test_files_that_are_none_are_refused(tmp_path: Path) -> None:
    path = written(pair(), tmp_path)
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(ValueError, match="is not a readable checkpoint"):
        load_lora(path)
    model().save_pretrained(tmp_path / "model")
    with pytest.raises(ValueError, match="no kind of LoRA has a key that ends so"):
        load_lora(tmp_path / "model")
    written(pair(), tmp_path / "model", "second")
    with pytest.raises(ValueError, match=r"one LoRA file in it, found model\.safetensors, second\.safetensors"):
        load_lora(tmp_path / "model")
    with pytest.raises(FileNotFoundError, match="no checkpoint at"):
        load_lora(tmp_path / "missing.safetensors")
    same = pair() | {"diffusion_model.blocks.0.self_attn.q.lora_down.weight": torch.ones(2, 32)}
    with pytest.raises(ValueError, match="are the same part of one layer"):
        load_lora(written(same, tmp_path, "same"))


REFERENCES = (
    ("a.safetensors", LoraSpec("a.safetensors")),
    ("a.safetensors:0.8", LoraSpec("a.safetensors", 0.8)),
    ("a.safetensors:-1e-1:low", LoraSpec("a.safetensors", -0.1, "low")),
    ("a.safetensors:high", LoraSpec("a.safetensors", 1.0, "high")),
    ("hub:org/repo/a.safetensors:2:high", LoraSpec("hub:org/repo/a.safetensors", 2.0, "high")),
    (r"C:\loras\a.safetensors", LoraSpec(r"C:\loras\a.safetensors")),
    (r"C:\loras\a.safetensors:1:low", LoraSpec(r"C:\loras\a.safetensors", 1.0, "low")),
)


@pytest.mark.parametrize(("text", "expected"), REFERENCES)
def test_references_of_the_command_line(text: str, expected: LoraSpec) -> None:
    assert parse_lora(text) == expected


def test_a_path_that_exists_is_taken_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("odd:0.5", "odd:0.5:high"):
        (tmp_path / name).touch()
    assert parse_lora("odd:0.5") == LoraSpec("odd:0.5")
    assert parse_lora("odd:0.5:high") == LoraSpec("odd:0.5:high")
    assert parse_lora("odd:0.5:2:low") == LoraSpec("odd:0.5", 2.0, "low")


@pytest.mark.parametrize(
    ("text", "message"),
    [("a.safetensors:strong", "'strong' is no strength"), ("a.safetensors:nan", "strength of a LoRA is nan"), (":0.5", "names no file")],
)
def test_references_that_make_no_sense(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_lora(text)


def test_a_loaded_lora_says_what_it_is(tmp_path: Path) -> None:
    lora = load_lora(written(pair() | {"odd": torch.ones(1)}, tmp_path))
    assert isinstance(lora, Lora)
    assert (lora.name, lora.format, lora.experts) == ("lora.safetensors", "comfy", (None,))
    assert lora.rejected == (Entry("lora.safetensors", "odd", "not understood", why="no kind of LoRA has a key that ends so"),)

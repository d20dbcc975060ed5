"""`wan-text convert`: what is written is read again, by us and by whose layout it is; what cannot be is refused before it is begun."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from wan_text import TextEncoder, load_text_encoder
from wan_text.cli import main
from wan_text.config import TINY

PROMPTS = ["a red circle", "", "blue star moves up"]


@pytest.fixture
def folder(encoder: TextEncoder, tmp_path: Path) -> Path:
    encoder.save_pretrained(tmp_path / "source")
    return tmp_path


def convert(*arguments: object) -> int:
    return main(["convert", *map(str, arguments)])


@pytest.mark.parametrize(("to", "out"), [("wan", "a"), ("huggingface", "a"), ("official", "a"), ("comfy", "a.safetensors")])
def test_the_tensors_are_the_same_to_the_bit(
    encoder: TextEncoder, folder: Path, capsys: pytest.CaptureFixture[str], to: str, out: str
) -> None:
    assert convert(folder / "source", folder / out, "--to", to) == 0
    assert "22 tensors in float32" in capsys.readouterr().out
    loaded = load_text_encoder(str(folder / out))
    assert all(torch.equal(a, b) for a, b in zip(loaded.encode(PROMPTS), encoder.encode(PROMPTS), strict=True))
    assert loaded.tokenizer.model == encoder.tokenizer.model
    if to == "wan":
        assert (loaded.config, loaded.fingerprint()) == (encoder.config, encoder.fingerprint())
    names = {path.relative_to(folder / out).as_posix() for path in (folder / out).rglob("*") if path.is_file()}
    official = {"models_t5_test-1-enc-fp32.pth", "google/umt5-xxl/spiece.model"}
    assert names == {"wan": {"config.json", "model.safetensors", "spiece.model"}, "official": official, "comfy": set()}.get(to, names)


def test_transformers_reads_what_is_written_for_it(encoder: TextEncoder, folder: Path) -> None:
    from transformers import UMT5EncoderModel

    assert convert(folder / "source", folder / "hf", "--to", "huggingface") == 0
    theirs = UMT5EncoderModel.from_pretrained(folder / "hf", attn_implementation="eager")
    for prompt, tokens in zip(PROMPTS, encoder.tokenize(PROMPTS), strict=True):
        ids = torch.tensor([tokens.ids])
        with torch.no_grad():
            assert torch.equal(theirs(ids).last_hidden_state, encoder.umt5(ids, exact=True)), prompt


def test_int8_is_that_of_loading_it_so(folder: Path) -> None:
    assert convert(folder / "source", folder / "small", "--to", "wan", "--quantise", "int8", "--dtype", "bf16") == 0
    small = load_text_encoder(str(folder / "small"), dtype=torch.bfloat16)
    asked = load_text_encoder(str(folder / "source"), dtype=torch.bfloat16, quantise="int8")
    assert small.fingerprint() == asked.fingerprint()
    state = load_file(folder / "small" / "model.safetensors")
    assert (state["blocks.0.attn.q.weight"].dtype, state["norm.weight"].dtype) == (torch.int8, torch.bfloat16)
    assert convert(folder / "small", folder / "back", "--to", "comfy", "--overwrite") == 2
    assert convert(folder / "small", folder / "back.safetensors", "--to", "comfy") == 0
    assert load_file(folder / "back.safetensors")["shared.weight"].dtype == torch.bfloat16


def test_facts_that_get_lost_are_told(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert convert("tiny", folder / "tiny.safetensors", "--to", "comfy") == 0
    assert "does not say cleaning, embedding_space, max_tokens, which its layout has no room for" in capsys.readouterr().err
    assert convert("tiny", folder / "tiny", "--to", "wan") == 0
    assert load_text_encoder(str(folder / "tiny")).config == TINY


def test_outputs_that_would_be_a_mistake(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "other").mkdir()
    save_file({"x": torch.zeros(1)}, folder / "other" / "mine.safetensors")
    before = {path: path.read_bytes() for path in folder.rglob("*.*")}
    for arguments, message in (
        ((folder / "a", "--to", "comfy"), "makes a file, give a name that ends in .safetensors"),
        ((folder / "a.pth", "--to", "official"), "makes a folder"),
        ((folder / "source", "--to", "wan", "--overwrite"), "is the input"),
        ((folder / "other", "--to", "wan", "--overwrite"), "holds other weights ('mine.safetensors')"),
        ((folder / "a.safetensors", "--to", "comfy", "--quantise", "int8"), "--quantise int8 takes --to wan"),
    ):
        assert convert(folder / "source", *arguments) == 2
        assert message in capsys.readouterr().err
    assert convert(folder / "source", folder / "a", "--to", "wan") == 0
    assert convert(folder / "source", folder / "a", "--to", "wan") == 2
    assert "exists; name another output or pass --overwrite" in capsys.readouterr().err
    assert convert(folder / "source", folder / "a", "--to", "huggingface", "--overwrite") == 0
    assert json.loads((folder / "a" / "config.json").read_text())["model_type"] == "umt5"
    assert {path: path.read_bytes() for path in before} == before


def test_nothing_is_left_of_a_failure(encoder: TextEncoder, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with torch.no_grad():
        encoder.umt5.norm.weight[3] = 1e30
    encoder.save_pretrained(folder / "large")
    assert convert(folder / "large", folder / "a.safetensors", "--to", "comfy", "--dtype", "fp16") == 2
    assert "tensor 'encoder.final_layer_norm.weight' holds NaN or infinite numbers in fp16" in capsys.readouterr().err
    assert convert(folder / "large", folder / "a", "--to", "wan", "--dtype", "fp16") == 2
    assert not [path for path in folder.rglob("*") if path.is_file() and path.parent.name not in ("source", "large")]

"""`wan-dit convert`: every layout it writes is read again, by us and by whose layout it is; what cannot be is refused first."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from dit_layouts import SMALL, VARIANTS, model, state_in
from safetensors.torch import load_file, save_file
from wan_dit.cli import main
from wan_dit.model import WanDiT

OUT = {"own": "a", "official": "a", "diffusers": "a", "comfy": "a.safetensors"}
KINDS = ("i2v", "i2v-2.2", "flf2v", "vace", "ti2v")


def convert(*arguments: object) -> int:
    return main(["convert", *map(str, arguments)])


@pytest.fixture
def source(tmp_path: Path) -> Path:
    model().save_pretrained(tmp_path / "source")
    return tmp_path / "source"


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("to", OUT)
def test_the_tensors_are_the_same_to_the_bit(name: str, to: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = model(VARIANTS[name])
    made.save_pretrained(tmp_path / "source")
    assert convert(tmp_path / "source", tmp_path / OUT[to], "--to", to) == 0
    assert f"{len(made.state_dict())} tensors in float32" in capsys.readouterr().out
    again = WanDiT.from_pretrained(tmp_path / OUT[to])
    assert (again.config, again.fingerprint()) == (made.config, made.fingerprint())


@pytest.mark.parametrize("name", ["i2v", "flf2v", "vace", "ti2v"])
def test_diffusers_reads_what_is_written_for_it(name: str, tmp_path: Path) -> None:
    import diffusers

    made = model(VARIANTS[name])
    made.save_pretrained(tmp_path / "source")
    assert convert(tmp_path / "source", tmp_path / "out", "--to", "diffusers") == 0
    kind = diffusers.WanVACETransformer3DModel if made.config.vace_layers else diffusers.WanTransformer3DModel
    theirs = kind.from_config(kind.load_config(tmp_path / "out"))
    theirs.load_state_dict(load_file(tmp_path / "out" / "diffusion_pytorch_model.safetensors"))
    ours = state_in(made, "diffusers")
    assert all(torch.equal(value, ours[key]) for key, value in theirs.state_dict().items())


@pytest.mark.parametrize(("to", "dtype"), [("own", "fp8"), ("comfy", "fp8"), ("own", "int8")])
def test_eight_bits_are_near_and_leave_the_rest_alone(source: Path, tmp_path: Path, to: str, dtype: str) -> None:
    assert convert(source, tmp_path / OUT[to], "--to", to, "--dtype", dtype) == 0
    before, after = model().state_dict(), WanDiT.from_pretrained(tmp_path / OUT[to]).state_dict()
    limit = 0.04 if dtype == "fp8" else 0.01  # half a step of 3 bits of mantissa; of 127 levels of the largest in a row
    for key, value in before.items():
        error = (after[key] - value).norm() / value.norm().clamp_min(1e-9)
        packed = ".blocks." in key and value.ndim == 2
        assert (0 < error < limit) if packed else torch.equal(after[key], value.bfloat16().float()), (key, error)
    stored = load_file(tmp_path / OUT[to] / "model.safetensors" if to == "own" else tmp_path / OUT[to])
    assert stored["blocks.0.ffn.0.weight"].dtype == (torch.float8_e4m3fn if dtype == "fp8" else torch.int8)
    assert ("scaled_fp8" in stored) == (dtype == "fp8")


def test_a_vace_module_is_joined_with_its_model(tmp_path: Path) -> None:
    state = state_in(model(VARIANTS["vace"]), "official")
    base, module = tmp_path / "base.safetensors", tmp_path / "vace.safetensors"
    save_file({key: value for key, value in state.items() if not key.startswith("vace_")}, base)
    save_file({key: value for key, value in state.items() if key.startswith("vace_")}, module)
    assert convert(f"{base}+{module}", tmp_path / "whole", "--to", "official") == 0
    assert WanDiT.from_pretrained(tmp_path / "whole").fingerprint() == model(VARIANTS["vace"]).fingerprint()


REFUSED = (
    (("out.safetensors", "--to", "own"), "--to own makes a folder"),
    (("out", "--to", "comfy"), "--to comfy makes a file"),
    (("out", "--to", "diffusers", "--dtype", "fp8"), "--dtype fp8 takes --to own or comfy"),
    (("out.safetensors", "--to", "comfy", "--dtype", "int8"), "--dtype int8 takes --to own"),
    (("source", "--to", "own", "--overwrite"), "is the input"),
    (("full", "--to", "own"), "exists; name another output or pass --overwrite"),
    (("other", "--to", "own", "--overwrite"), "holds other weights ('x.gguf')"),
)


@pytest.mark.parametrize(("arguments", "message"), REFUSED)
def test_what_cannot_be_written_is_refused(
    source: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], message: str
) -> None:
    monkeypatch.chdir(source.parent)
    for name in ("full/model.safetensors", "other/x.gguf"):
        Path(name).parent.mkdir()
        Path(name).touch()
    before = sorted(Path.cwd().rglob("*"))
    assert convert("source", *arguments) == 2
    assert message in capsys.readouterr().err
    assert sorted(Path.cwd().rglob("*")) == before


@pytest.mark.parametrize("options", [(), ("--dtype", "int8")])
def test_nan_stops_the_conversion_and_nothing_is_left(tmp_path: Path, capsys: pytest.CaptureFixture[str], options: tuple[str, ...]) -> None:
    state = state_in(model(), "official")
    state["blocks.1.ffn.0.weight"][3, 5] = torch.nan
    save_file(state, tmp_path / "bad.safetensors")
    assert convert(tmp_path / "bad.safetensors", tmp_path / "out", "--to", "own", *options) == 2
    assert "tensor 'blocks.1.ffn.0.weight' holds NaN" in capsys.readouterr().err
    assert not list((tmp_path / "out").iterdir())


def test_what_a_layout_has_no_room_for_is_warned_of(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model(SMALL.model_copy(update={"latent_space": "mine"})).save_pretrained(tmp_path / "source")
    assert convert(tmp_path / "source", tmp_path / "out", "--to", "official") == 0
    assert "does not say latent_space" in capsys.readouterr().err
    assert json.loads((tmp_path / "out" / "config.json").read_text())["model_type"] == "t2v"

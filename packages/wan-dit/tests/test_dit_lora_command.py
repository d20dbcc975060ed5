"""`wan-dit lora info | convert | merge`."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from wan_dit.cli import main
from wan_dit.config import TINY
from wan_dit.lora import apply, load_lora
from wan_dit.model import WanDiT


@pytest.fixture
def lora(tmp_path: Path) -> Path:
    """A LoRA of the built-in model in kohya's names, with one key that fits nothing."""
    torch.manual_seed(0)
    layer = "lora_unet_blocks_5_self_attn_o"
    state = {f"{layer}.lora_down.weight": torch.randn(2, TINY.dim), f"{layer}.lora_up.weight": torch.randn(TINY.dim, 2)}
    state |= {f"{layer}.alpha": torch.tensor(1.0), "lora_unet_blocks_0.diff_m": torch.randn(1, 6, TINY.dim).half()}
    save_file(state, tmp_path / "lora.safetensors")
    save_file(state | {"lora_unet_blocks_9_ffn_0.diff_b": torch.ones(3)}, tmp_path / "odd.safetensors")
    return tmp_path / "lora.safetensors"


def test_info_says_what_a_file_holds(lora: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["lora", "info", str(lora), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    expected = {"name": "lora.safetensors", "format": "kohya", "keys": 4, "layers": 2, "rank": {"2": 1}, "alpha": {"1": 1}, "ledger": []}
    assert {key: found[key] for key in expected} == expected
    assert found["kinds"] == {"diff of modulation": 1, "lora of weight": 1}
    assert found["dtype"] == {"float16": 1, "float32": 2}
    assert found["made_for"] == f"width {TINY.dim} and at least 6 blocks"


def test_info_accounts_for_every_key_on_a_model_without_its_weights(
    lora: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(WanDiT, "from_pretrained", None)
    assert main(["lora", "info", str(lora.with_name("odd.safetensors")), "--model", "tiny"]) == 0
    out = capsys.readouterr().out
    assert "applied (4), no such module (1)" in out
    assert "lora_unet_blocks_9_ffn_0.diff_b  no such module" in out
    assert main(["lora", "info", str(lora), "--model", "tiny", "--keys", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["ledger"]
    assert sorted(row["key"] for row in rows) == sorted(load_file(lora))
    assert {row["tensor"] for row in rows} == {"trunk.blocks.5.self_attn.o.weight", "trunk.blocks.0.modulation"}


def test_convert_there_and_back(lora: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    comfy, back = tmp_path / "new" / "comfy.safetensors", tmp_path / "back.safetensors"
    assert main(["lora", "convert", str(lora), str(comfy), "--to", "comfy"]) == 0
    assert "kohya to comfy, 2 changes of 2 layers" in capsys.readouterr().out
    assert main(["lora", "convert", str(comfy), str(back), "--to", "kohya"]) == 0
    first, last = load_file(lora), load_file(back)
    assert first.keys() == last.keys()
    assert all(torch.equal(value, last[key]) for key, value in first.items())


def test_merge_writes_a_backbone_that_loads(lora: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "merged"
    assert main(["lora", "merge", f"{lora}:0.5", "--model", "tiny", "--output", str(folder)]) == 0
    out = capsys.readouterr().out
    assert "lora.safetensors: 4 of 4 keys applied" in out
    expected = WanDiT.from_pretrained("pkg:wan_dit/weights/tiny")
    apply(expected, [f"{lora}:0.5"])
    assert WanDiT.from_pretrained(folder).fingerprint() == expected.fingerprint()


REFUSED = (
    (["convert", "lora.safetensors", "lora.safetensors", "--to", "comfy"], "exists: add --overwrite to replace it"),
    (["convert", "lora.safetensors", "out.gguf", "--to", "comfy"], "must end in .safetensors"),
    (["convert", "lora.safetensors", "out.safetensors", "--to", "peft"], "PEFT has no name for 1 changes"),
    (["convert", "missing.safetensors", "out.safetensors", "--to", "peft"], "no checkpoint at 'missing.safetensors'"),
    (["convert", "odd.safetensors", ".", "--to", "comfy"], "must end in .safetensors"),
    (["info", "lora.safetensors", "--model", "huge"], "huge"),
    (["merge", "odd.safetensors", "--model", "tiny", "--output", "out"], "no such module 1 (lora_unet_blocks_9_ffn_0.diff_b)"),
    (["merge", "lora.safetensors:x", "--model", "tiny", "--output", "out"], "'x' is no strength"),
    (["merge", "lora.safetensors:1:high", "--model", "tiny", "--output", "out"], "give expert='high' or 'low'"),
    (["merge", "lora.safetensors", "--model", "tiny", "--output", "."], "give a new or an empty folder"),
)


@pytest.mark.parametrize(("arguments", "message"), REFUSED)
def test_bad_input_is_one_line_and_leaves_nothing(
    arguments: list[str], message: str, lora: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(lora.parent)
    before = {path.name: path.stat().st_mtime_ns for path in lora.parent.iterdir()}
    assert main(["lora", *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert {path.name: path.stat().st_mtime_ns for path in lora.parent.iterdir()} == before


def test_help_and_references_import_no_torch() -> None:
    code = """
import sys
from wan_dit.cli import main
from wan_dit.lora import LoraSpec, parse_lora
assert parse_lora("a.safetensors:0.5") == LoraSpec("a.safetensors", 0.5)
try:
    main(["lora", "merge", "--help"])
except SystemExit:
    pass
assert "torch" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_the_package_offers_what_it_lists() -> None:
    import wan_dit.lora as package

    assert dir(package) == package.__all__
    assert all(getattr(package, name) for name in package.__all__)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        package.nothing  # noqa: B018
    assert load_lora is package.load_lora

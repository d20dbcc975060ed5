"""`wan-train export`: what is in a checkpoint, read back by the packages whose parts they are, and by diffusers."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from wan_dit.config import DiTConfig
from wan_dit.model import WanDiT
from wan_dit.plugins import load_backbone
from wan_text import load_text_encoder
from wan_train.cli import main
from wan_train.store import Store, training_state
from wan_train.store.manifest import folder_name
from wan_vae import load_vae

Captured = pytest.CaptureFixture[str]
CONFIG = DiTConfig(
    dim=64, ffn_dim=48, freq_dim=16, text_dim=12, num_heads=1, num_layers=2, in_dim=16, out_dim=16,
    latent_space="wan2.1", embedding_space="unknown",
)  # fmt: skip
LAYOUTS = ("own", "official", "diffusers", "comfy")


@pytest.fixture
def modules(micro_vae: Path) -> dict[str, Any]:
    """A backbone in which no tensor is zero, a VAE and a text encoder."""
    torch.manual_seed(0)
    backbone = WanDiT(CONFIG)
    for weight in backbone.parameters():
        nn.init.normal_(weight)
    return {"backbone": backbone, "vae": load_vae(str(micro_vae)), "text_encoder": load_text_encoder("tiny"), "other": nn.Linear(2, 2)}


@pytest.fixture
def run(tmp_path: Path, modules: dict[str, Any]) -> Path:
    """A run with checkpoints of the steps 1 and 2; the backbone's weights are the step larger, its averages 10 more."""
    folder = tmp_path / "run"
    original = {name: value.clone() for name, value in modules["backbone"].state_dict().items()}
    with Store(folder / "checkpoints") as store:
        for step in (1, 2):
            modules["backbone"].load_state_dict({name: value + step for name, value in original.items()})
            ema = {"backbone": {name: value + 10 for name, value in modules["backbone"].state_dict().items()}}
            store.save(step, training_state(modules, ema=ema), wait=True)
    return folder


def equal(one: nn.Module, other: nn.Module) -> bool:
    mine, theirs = one.state_dict(), other.state_dict()
    return mine.keys() == theirs.keys() and all(torch.equal(mine[key], theirs[key].to(mine[key].dtype)) for key in mine)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_part_in_every_layout_is_read_back_to_the_bit(run: Path, modules: dict[str, Any], layout: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert main(["export", str(run), str(out), "--to", layout]) == 0
    suffix = ".safetensors" if layout == "comfy" else ""
    assert equal(modules["backbone"], load_backbone(f"{out}/backbone{suffix}", dtype=torch.float32))
    assert equal(modules["vae"], load_vae(f"{out}/vae{'.safetensors' if layout == 'official' else suffix}", dtype=torch.float32))
    text = load_text_encoder(f"{out}/text_encoder{suffix}", dtype=torch.float32)
    assert equal(modules["text_encoder"], text)
    assert text.tokenizer.model == modules["text_encoder"].tokenizer.model


def test_diffusers_reads_the_backbone(run: Path, tmp_path: Path) -> None:
    diffusers = pytest.importorskip("diffusers")
    assert main(["export", str(run), str(tmp_path / "out"), "--to", "diffusers", "--part", "backbone"]) == 0
    _, info = diffusers.WanTransformer3DModel.from_pretrained(str(tmp_path / "out"), output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))


def test_steps_averages_and_types(run: Path, modules: dict[str, Any], tmp_path: Path, capsys: Captured) -> None:
    def exported(*words: str) -> torch.Tensor:
        file = tmp_path / "out.safetensors"
        assert main(["export", str(run), str(file), "--to", "comfy", "--part", "backbone", "--overwrite", *words]) == 0
        return load_file(file)["blocks.0.self_attn.q.bias"]

    last = modules["backbone"].trunk.blocks[0].self_attn.q.bias.detach()
    assert torch.equal(exported(), last)
    assert torch.allclose(exported("--step", "1"), last - 1, rtol=0, atol=1e-6)
    assert torch.equal(exported("--ema"), last + 10)
    assert torch.equal(exported("--dtype", "bf16"), last.bfloat16())
    (run / "checkpoints" / folder_name(2) / "manifest.json").unlink()
    capsys.readouterr()
    assert torch.allclose(exported(), last - 1, rtol=0, atol=1e-6)
    assert "has no manifest.json: it was not finished: this checkpoint is not used" in capsys.readouterr().err
    checkpoint = run / "checkpoints" / folder_name(1)
    assert main(["export", str(checkpoint), str(tmp_path / "one"), "--to", "own", "--part", "backbone"]) == 0
    assert equal(load_backbone(f"{tmp_path}/one", dtype=torch.float32), load_backbone(f"{tmp_path}/out.safetensors", dtype=torch.float32))


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["run", "out", "--to", "own", "--part", "head"], "has no part 'head' that can be exported: it has backbone, text_encoder, vae"),
        (["run", "out", "--to", "own", "--step", "3"], "has no checkpoint of step 3: it has 2, 1"),
        (
            ["run/checkpoints/step-00000001", "out", "--to", "own", "--step", "1"],
            "is one checkpoint: give the folder of the run with --step",
        ),
        (["nowhere", "out", "--to", "own"], "no checkpoint in 'nowhere': give the output folder of a run"),
        (["run", "out", "--to", "own", "--ema", "--part", "vae"], "holds no averaged weights of 'vae': export without --ema"),
        (
            ["run", "out", "--to", "comfy", "--part", "vae"],
            "cannot write 'out': --to comfy makes a file, give a name that ends in .safetensors",
        ),
        (["run", "out.pth", "--to", "comfy", "--part", "backbone"], "cannot write 'out.pth': --to comfy makes a file"),
        (["run", "a.safetensors", "--to", "own", "--part", "vae"], "cannot write 'a.safetensors': --to own makes a folder"),
        (["run", "run", "--to", "own", "--part", "vae"], "'run' exists; name another output or pass --overwrite"),
    ],
)
def test_what_is_wrong_is_one_line_and_leaves_nothing(
    run: Path, words: list[str], told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Captured
) -> None:
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    assert main(["export", *words]) == 2
    _, err = capsys.readouterr()
    assert told in err
    assert err.count("\n") == 1
    assert sorted(tmp_path.rglob("*")) == before


def test_a_damaged_checkpoint_is_not_exported(run: Path, tmp_path: Path, capsys: Captured) -> None:
    shard = run / "checkpoints" / folder_name(2) / "__0_0.distcp"
    content = bytearray(shard.read_bytes())
    content[-100] ^= 1
    shard.write_bytes(content)
    assert main(["export", str(run), str(tmp_path / "out"), "--to", "own", "--step", "2"]) == 2
    assert "__0_0.distcp' is damaged" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_package_that_is_not_installed_is_named(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Captured) -> None:
    monkeypatch.setitem(sys.modules, "wan_text.config", None)
    assert main(["export", str(run), str(tmp_path / "out"), "--to", "own"]) == 2
    assert "part 'text_encoder' is of wan-text, which is not installed: pip install wan-text" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_live_run_is_exported_without_its_lock(run: Path, tmp_path: Path) -> None:
    with Store(run / "checkpoints") as store:
        assert main(["export", str(run), str(tmp_path / "out"), "--to", "own", "--part", "backbone"]) == 0
        assert store.latest() == 2


def test_a_checkpoint_of_other_modules_says_so(tmp_path: Path, capsys: Captured) -> None:
    with Store(tmp_path / "run") as store:
        store.save(1, training_state({"other": nn.Linear(2, 2)}), wait=True)
    assert main(["export", str(tmp_path / "run"), str(tmp_path / "out"), "--to", "own"]) == 2
    assert "has no part that can be exported: none of its modules is a backbone, VAE or text encoder of Wan" in capsys.readouterr().err

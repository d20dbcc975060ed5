"""What `wan-vae list` and `info` say of codecs and checkpoints: sizes, and where the weights are, without a look at torch or the net."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from wan_vae import VAESpec, WanVAE
from wan_vae.checkpoint import save_diffusers, save_official
from wan_vae.cli import main
from wan_vae.config import PRESETS
from wan_vae.plugins import hookimpl, plugin_manager
from wan_vae.weights_state import weights_state

FACTS = {"name", "distribution", "latent_space", "channels", "stride", "parameters", "state", "weights"}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.chdir(tmp_path)
    return tmp_path / "hub"


def cached(cache: Path, repo: str, *files: str, revision: str = "main") -> None:
    """What huggingface_hub leaves of `files` of a repository."""
    folder = cache / f"models--{repo.replace('/', '--')}"
    (folder / "refs").mkdir(parents=True, exist_ok=True)
    (folder / "refs" / revision).write_text("0123abc")
    for file in files:
        (folder / "snapshots" / "0123abc" / file).parent.mkdir(parents=True, exist_ok=True)
        (folder / "snapshots" / "0123abc" / file).touch()


def rows(capsys: pytest.CaptureFixture[str], *line: str) -> list[dict[str, Any]]:
    assert main([*line, "--json"]) == 0
    found: list[dict[str, Any]] = json.loads(capsys.readouterr().out)
    return found


def test_list_says_how_large_and_where(cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cached(cache, "Wan-AI/Wan2.1-T2V-1.3B", "Wan2.1_VAE.pth")
    found = {row["name"]: row for row in rows(capsys, "list")}
    assert all(row.keys() > FACTS for row in found.values())
    assert {name: (row["parameters"], row["state"]) for name, row in found.items()}.items() >= {
        "wan2.1": (126_892_531, "in the Hub cache"),
        "wan2.2": (704_688_668, "to be fetched"),
        "tiny": (698_252, "built in"),
        "taew2_1": (11_315_539, "to be fetched"),
        "taew2_2": (11_418_108, "to be fetched"),
        "dc-ae-f32c32-in-1.0": (323_356_460, "to be fetched"),
        "ltx-video-0.9": (419_193_649, "to be fetched"),
        "ltx-video-0.9.1": (934_976_434, "to be fetched"),
    }.items()
    assert main(["list"]) == 0
    assert "126,892,531" in capsys.readouterr().out


@pytest.mark.parametrize("name", PRESETS)
def test_the_listed_sizes_are_true(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with torch.device("meta"):
        parameters = sum(parameter.numel() for parameter in WanVAE(PRESETS[name]).parameters())
    (facts,) = rows(capsys, "info", "--codec", name)
    assert facts["parameters"] == parameters


def test_info_of_a_name_is_that_of_the_codec_where_no_file_hides_it(capsys: pytest.CaptureFixture[str]) -> None:
    assert rows(capsys, "info", "tiny") == rows(capsys, "info", "--codec", "tiny")
    assert main(["info", "tinny"]) == 2
    assert capsys.readouterr().err == "wan-vae: error: no video file at 'tinny'\n"
    Path("tiny").write_text("no video")
    assert main(["info", "tiny"]) == 2
    assert "'tiny' is not a readable video" in capsys.readouterr().err


def test_a_third_party_that_gives_no_size_is_listed(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    class Plugin:
        @hookimpl
        def wan_vaes(self) -> list[VAESpec]:
            return [VAESpec("mine", "mine:VAE", latent_space="mine-1", latent_channels=4, stride=(1, 8, 8))]

    pm = plugin_manager()
    pm.register(Plugin(), name="wan-mine")
    monkeypatch.setattr("wan_vae.commands.listing.plugin_manager", lambda: pm)
    row = rows(capsys, "list")[-1]
    assert (row["name"], row["parameters"], row["state"], row["weights"]) == ("mine", None, "none", "none")


@pytest.mark.parametrize("layout", ["official", "diffusers", "ours"])
def test_info_of_a_checkpoint(layout: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    vae = WanVAE()
    path = {"official": "vae.pth"}.get(layout, layout)
    {"official": save_official, "diffusers": save_diffusers, "ours": WanVAE.save_pretrained}[layout](vae, path)
    (facts,) = rows(capsys, "info", path)
    space = "tiny-2" if layout == "ours" else "unknown"
    expected = {"kind": "checkpoint", "distribution": "wan-vae", "latent_space": space, "channels": 16, "stride": "4x8x8"}
    assert facts == facts | expected | {"name": path, "parameters": 698_252, "state": "on disk"}


def test_info_of_a_file_that_is_no_vae(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_file({"patch_embedding.weight": torch.zeros(1)}, tmp_path / "dit.safetensors")
    assert main(["info", "dit.safetensors"]) == 2
    message = capsys.readouterr().err
    assert message == "wan-vae: error: 'dit.safetensors' is not a Wan VAE: it holds a diffusion transformer; wan-dit reads it\n"


def test_states(cache: Path, tmp_path: Path) -> None:
    cached(cache, "org/files", "vae.pth")
    cached(cache, "org/config", "config.json")
    cached(cache, "org/pinned", "model.safetensors", revision="v1")
    (tmp_path / "here.pth").touch()
    states = {
        None: "none",
        "pkg:wan_vae/weights/tiny": "built in",
        "pkg:wan_vae/weights/none": "missing",
        "pkg:not_installed_here/x": "missing",
        "hub:org/files": "in the Hub cache",
        "hub:org/files/vae.pth": "in the Hub cache",
        "hub:org/files/other.pth": "to be fetched",
        "hub:org/config": "to be fetched",
        "hub:org/pinned": "to be fetched",
        "hub:org/pinned@v1": "in the Hub cache",
        "hub:org/pinned@0123abc/model.safetensors": "in the Hub cache",
        "hub:org/nothing": "to be fetched",
        str(tmp_path / "here.pth"): "on disk",
        str(tmp_path / "gone.pth"): "missing",
    }
    assert {weights: weights_state(weights) for weights in states} == states


@pytest.mark.parametrize("variable", ["HF_HUB_CACHE", "HF_HOME", "XDG_CACHE_HOME"])
def test_the_cache_is_where_huggingface_hub_keeps_it(variable: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "HF_HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv(variable, str(tmp_path / "elsewhere"))
    code = (
        "from huggingface_hub.constants import HF_HUB_CACHE; from wan_vae.weights_state import _cache; assert HF_HUB_CACHE == str(_cache())"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_listing_with_weights_states_imports_neither_torch_nor_the_hub() -> None:
    code = (
        "import sys; from wan_vae.cli import main; assert main(['list', '--json']) == 0\n"
        "assert not {'torch', 'huggingface_hub', 'pydantic', 'safetensors'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr

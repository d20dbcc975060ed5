"""A text encoder of another width, by way of a file that holds a context embedder alone."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from wan_dit import Pipeline, load_backbone
from wan_dit.cli import main
from wan_dit.compat import mismatch
from wan_dit.context_embedder import (
    FORMAT,
    load_context_embedder,
    make_context_embedder,
    read_facts,
    save_context_embedder,
    with_context_embedder,
)
from wan_dit.plugins import find
from wan_dit.setup import BackboneSetup

SMALL: dict[str, Any] = {"steps": 2, "frames": 5, "size": (32, 16)}
LATENTS, TIMESTEP = torch.ones(1, 16, 2, 4, 4), torch.tensor([500.0])


@pytest.fixture
def backbone() -> Any:
    return load_backbone("tiny")


def embedder(folder: Path, text_dim: int = 40, dim: int = 128, space: str = "acme-wide-1", most: int = 32, seed: int = 0) -> Path:
    torch.manual_seed(seed)
    save_context_embedder(folder / f"{seed}.safetensors", make_context_embedder(text_dim, dim), embedding_space=space, max_tokens=most)
    return folder / f"{seed}.safetensors"


def velocity(model: Any, tokens: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(LATENTS, TIMESTEP, model.encode_context([tokens]))


def test_tokens_of_another_width_that_mean_the_same_give_the_same_velocity(tmp_path: Path, backbone: Any) -> None:
    wider = torch.linalg.qr(torch.randn(120, 96, generator=torch.Generator().manual_seed(0)))[0].T  # [96, 120], rows orthonormal
    module = make_context_embedder(120, 128)
    module.load_state_dict({**backbone.context_embedder.state_dict(), "0.weight": backbone.context_embedder[0].weight.detach() @ wider})
    save_context_embedder(tmp_path / "wider.safetensors", module, embedding_space="wider-1", max_tokens=32)
    adapted = with_context_embedder(backbone, tmp_path / "wider.safetensors")
    tokens = torch.randn(5, 96)
    torch.testing.assert_close(velocity(adapted, tokens @ wider), velocity(backbone, tokens), atol=1e-5, rtol=1e-5)


def test_the_backbone_that_was_given_stays_as_it_is_and_its_weights_are_shared(tmp_path: Path, backbone: Any) -> None:
    before, tokens = backbone.fingerprint(), torch.randn(5, 96)
    expected = velocity(backbone, tokens)
    adapted = with_context_embedder(backbone, embedder(tmp_path))
    assert (adapted.spec.text_dim, adapted.spec.embedding_space, adapted.spec.text_len) == (40, "acme-wide-1", 32)
    assert (backbone.spec.text_dim, backbone.spec.embedding_space, backbone.fingerprint()) == (96, "tiny-2", before)
    assert torch.equal(velocity(backbone, tokens), expected)
    assert adapted.trunk is backbone.trunk
    assert adapted.fingerprint() != before
    assert not adapted.training
    with pytest.raises(ValueError, match=r"context is \(5, 96\), expected \[L, 40\].*embedding space 'acme-wide-1'"):
        adapted.encode_context([tokens])
    with pytest.raises(ValueError, match=r"expected \[L, 40\] with L <= 32"):
        adapted.encode_context([torch.randn(33, 40)])
    adapted.save_pretrained(tmp_path / "saved")
    again = load_backbone(str(tmp_path / "saved"))
    assert again.spec.embedding_space == "acme-wide-1"
    assert again.fingerprint() == adapted.fingerprint()
    torch.testing.assert_close(velocity(again, tokens[:, :40]), velocity(adapted, tokens[:, :40]))


def test_a_file_comes_back_to_the_bit(tmp_path: Path) -> None:
    path = embedder(tmp_path, most=300)
    assert read_facts(path) == {"embedding_space": "acme-wide-1", "text_dim": 40, "text_len": 300}
    torch.manual_seed(0)
    expected = make_context_embedder(40, 128).state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in load_context_embedder(path).state_dict().items())
    assert load_context_embedder(path, dtype=torch.bfloat16)[0].weight.dtype == torch.bfloat16
    assert set(load_file(path)) == {f"context_embedder.{i}.{kind}" for i in (0, 2) for kind in ("weight", "bias")}
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


def test_it_decides_which_text_encoders_fit(tmp_path: Path, acme: Path, backbone: Any) -> None:
    adapted = with_context_embedder(backbone, embedder(tmp_path)).spec
    wide, tiny = find("wan_text_encoders", "acme-wide"), find("wan_text_encoders", "tiny")
    assert mismatch("wan_text_encoders", wide, backbone.spec).startswith("its embedding_space is acme-wide-1, the backbone needs tiny-2")
    assert mismatch("wan_text_encoders", wide, adapted) == ""
    assert mismatch("wan_text_encoders", tiny, adapted).startswith("its embedding_space is tiny-2, the backbone needs acme-wide-1")
    short = with_context_embedder(backbone, embedder(tmp_path, most=8, seed=1)).spec
    assert mismatch("wan_text_encoders", wide, short) == "it makes up to 16 tokens, the backbone takes 8"


def test_another_authors_encoder_of_another_width_makes_a_video(tmp_path: Path, acme: Path) -> None:
    with pytest.raises(ValueError, match="text encoder 'acme-wide' does not fit backbone 'tiny': its embedding_space is acme-wide-1"):
        Pipeline("tiny", text_encoder="acme-wide")
    setups = [BackboneSetup(context_embedder=embedder(tmp_path, seed=seed)) for seed in (0, 1)]
    with pytest.raises(ValueError, match="text encoder 'tiny' does not fit"):
        Pipeline("tiny", setup=setups[0])
    results = [Pipeline("tiny", vae="acme", text_encoder="acme-wide", setup=setup)("a red circle", **SMALL) for setup in setups]
    assert results[0].video.shape == (1, 3, 5, 16, 32)
    assert (results[0].manifest["parts"]["text_encoder"]["name"], results[0].manifest["parts"]["vae"]["name"]) == ("acme-wide", "acme")
    assert not torch.equal(results[0].video, results[1].video), "the file decides"
    other = Pipeline("tiny", vae="acme", text_encoder="acme-wide", setup=setups[0])("a blue star on white", **SMALL)
    assert not torch.equal(results[0].video, other.video), "and so does the prompt"


def test_the_command_takes_the_file(
    tmp_path: Path, acme: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    path = embedder(tmp_path)
    line = [
        "generate",
        "a red circle",
        "--text-encoder",
        "acme-wide",
        "--steps",
        "1",
        "--frames",
        "1",
        "--size",
        "16x16",
        "--device",
        "cpu",
    ]
    assert main([*line, "--context-embedder", path.name, "--output", "a.mp4"]) == 0
    assert json.loads((tmp_path / "a.json").read_text())["options"]["context_embedder"]["path"] == str(path)
    capsys.readouterr()
    assert main([*line, "--context-embedder", "none.safetensors", "--output", "b.mp4"]) == 2
    assert capsys.readouterr().err == "wan-dit: error: no context embedder at 'none.safetensors'\n"
    narrow = embedder(tmp_path, dim=64, seed=1)
    assert main([*line, "--context-embedder", narrow.name, "--output", "b.mp4"]) == 2
    assert "makes tokens of width 64, backbone 'tiny' needs 128" in capsys.readouterr().err.splitlines()[-1]
    assert not list(tmp_path.glob("b.*"))


def test_what_is_no_context_embedder_is_told(tmp_path: Path, backbone: Any) -> None:
    good = {"format": FORMAT, "text_dim": "40", "dim": "128", "embedding_space": "acme-wide-1", "max_tokens": "16"}
    state = load_file(embedder(tmp_path))
    path = tmp_path / "bad.safetensors"

    def refused(message: str) -> None:
        with pytest.raises(ValueError, match=re.escape(message)) as error:
            with_context_embedder(backbone, path)
        assert str(path) in str(error.value)
        assert "\n" not in str(error.value)

    for metadata, message in (
        ({}, "its metadata say format None, expected 'wan-dit-context-embedder/1'"),
        ({**good, "format": "pt"}, "its metadata say format 'pt'"),
        ({**good, "text_dim": "many"}, "its text_dim is 'many', expected a positive whole number"),
        ({**good, "max_tokens": "0"}, "its max_tokens is '0'"),
        ({**good, "embedding_space": "unknown"}, "does not name its embedding_space"),
        ({**good, "dim": "64"}, "is damaged: it holds"),
    ):
        save_file(state, path, metadata=metadata)
        refused(message)
    save_file({**state, "context_embedder.0.bias": torch.full((128,), torch.nan)}, path, metadata=good)
    refused("'context_embedder.0.bias' holds numbers that are NaN or infinite")
    save_file({**state, "blocks.0.weight": torch.zeros(2)}, path, metadata=good)
    refused("is damaged: it holds")
    path.write_bytes(embedder(tmp_path).read_bytes()[:500])
    refused("is not a context embedder: SafetensorError")
    path.write_text("version https://git-lfs.github.com/spec/v1")
    refused("is a pointer of Git LFS")
    with pytest.raises(ValueError, match=r"is a folder: give the \.safetensors file"):
        read_facts(tmp_path)
    with pytest.raises(ValueError, match="backbone 'Linear' is no WanDiT: it takes no context embedder"):
        with_context_embedder(torch.nn.Linear(1, 1), embedder(tmp_path))


def test_what_cannot_be_saved_is_told(tmp_path: Path) -> None:
    module = make_context_embedder(4, 8)
    for name, given, message in (
        ("a.bin", {"embedding_space": "a", "max_tokens": 1}, r"ends in \.safetensors"),
        ("a.safetensors", {"embedding_space": "unknown", "max_tokens": 1}, "name the embedding space"),
        ("a.safetensors", {"embedding_space": "a", "max_tokens": 0}, "name the embedding space and the most tokens"),
    ):
        with pytest.raises(ValueError, match=message):
            save_context_embedder(tmp_path / name, module, **given)
    with pytest.raises(ValueError, match="a context embedder is Sequential"):
        save_context_embedder(tmp_path / "a.safetensors", torch.nn.Sequential(torch.nn.Linear(4, 8)), embedding_space="a", max_tokens=1)
    assert list(tmp_path.iterdir()) == []

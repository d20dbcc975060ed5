"""The recipe of the built-in backbone on another codec, by one line: other channels and another stride, in training and in generation."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from wan_dit.cli import main as generate
from wan_train.cli import main
from wan_vae.config import VAEConfig
from wan_vae.model import WanVAE

SHORT = ["steps=2", "batch_size=2", "stages=[]", "objective.settings.clips=4", "preview_every=0", "save_every=0"]


@pytest.fixture(scope="module")
def codec(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("codec") / "f16"
    torch.manual_seed(0)
    config = VAEConfig(
        base_dim=4, decoder_base_dim=4, z_dim=24, dim_mult=(1, 1, 1, 1), temporal_downsample=(False, True, True), num_res_blocks=1,
        residual=True, patch_size=2, latents_mean=(0.0,) * 24, latents_std=(0.5,) * 24, latent_space="f16",
    )  # fmt: skip
    WanVAE(config).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("precache", ["true", "false"])
def test_a_recipe_takes_another_codec_by_one_line(codec: Path, tmp_path: Path, precache: str, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    line = f"objective.settings.vae={codec}"
    assert main(["run", "tiny-t2v", line, f"output={run}", f"objective.settings.precache={precache}", *SHORT]) == 0
    parts = ["--backbone", str(run / "export" / "backbone"), "--text-encoder", str(run / "export" / "text_encoder")]
    video = tmp_path / "a.mp4"
    assert generate(["generate", "a red circle moves left", *parts, "--vae", str(codec), "--steps", "2", "--output", str(video)]) == 0
    assert video.stat().st_size > 0
    capsys.readouterr()
    assert generate(["generate", "a red circle moves left", *parts, "--output", str(tmp_path / "b.mp4")]) == 2
    assert "its latent_space is tiny-2, the backbone needs f16" in capsys.readouterr().err
    assert not (tmp_path / "b.mp4").exists()


def test_a_trained_backbone_refuses_it(codec: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = ["run", "tiny-t2v", f"objective.settings.vae={codec}", f"output={tmp_path / 'run'}", *SHORT, "objective.settings.tokenizer=0"]
    assert main([*given, "objective.settings.init=pretrained"]) == 2
    assert "its latent_space is f16, the backbone needs tiny-2" in capsys.readouterr().err

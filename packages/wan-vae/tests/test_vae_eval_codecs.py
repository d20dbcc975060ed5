"""`wan-vae eval` with a VAE of every class that is installed: one table, on real film."""

from __future__ import annotations

import json
from collections.abc import Callable
from math import ceil
from pathlib import Path
from typing import Any

import pytest
from dcae_pairs import DEEP, SANA
from shuffle_vae import ShuffleVAE
from small_residual import F16T4, F32T8, make
from wan_vae import load_vae
from wan_vae.codecs.dcae import DCAE
from wan_vae.codecs.ltx import LTXVAE
from wan_vae.codecs.ltx_config import LTXConfig
from wan_vae.codecs.taehv import TAEHV
from wan_vae.codecs.taehv_config import TAEHVConfig
from wan_vae.config import WAN22
from wan_vae.model import WanVAE
from wan_vae.plugins import find_vae, plugin_manager
from wan_vae.testing import randomise

Run = Callable[..., tuple[int, str, str]]
NARROW = {"base_dim": 4, "decoder_base_dim": 4, "num_res_blocks": 1, "latents_mean": (), "latents_std": ()}
LTX: dict[str, Any] = {
    "latent_channels": 16, "encoder_base_channels": 8, "decoder_base_channels": 8, "latent_space": "test",
    "encoder_blocks": [["compress_all", {}], ["res_x", 1]] * 3, "decoder_blocks": [["res_x", 1], ["compress_all", {"residual": True}]] * 3,
}  # fmt: skip
MADE: dict[str, Callable[[], Any]] = {
    "wan2.2": lambda: WanVAE(WAN22.model_copy(update=NARROW)),
    "residual": lambda: make(F16T4, chunk=2),
    "residual-f32t8": lambda: make(F32T8),
    "told the noise": lambda: load_vae().conditioned(),
    "dc-ae": lambda: DCAE(DEEP),
    "sana": lambda: DCAE(SANA),
    "ltx": lambda: LTXVAE(LTXConfig(**LTX)),
    "ltx, denoising": lambda: LTXVAE(LTXConfig(**LTX, timestep_conditioning=True)),
    "taehv": lambda: TAEHV(TAEHVConfig(z_dim=16, encoder_dim=8, decoder_dims=(12, 10, 8, 6), latent_space="wan2.1")),
}


def test_one_table_has_codecs_of_all_classes(run: Run, real_clips: Path, tmp_path: Path) -> None:
    made = {name: build().eval() for name, build in MADE.items()}
    for name, vae in made.items():
        if name != "told the noise":
            randomise(vae)
        vae.save_pretrained(tmp_path / name)
    installed = {kind for name in names() if isinstance(kind := find_vae(name).resolve(), type)}
    assert installed <= {type(vae) for vae in made.values()}, "a codec that is installed and not measured here"
    given = [part for name in ["tiny", *(str(tmp_path / name) for name in made), "shuffle_vae:ShuffleVAE"] for part in ("--codec", name)]
    clips = [str(real_clips / f"{name}.mp4") for name in ("bikes", "carphone_pristine")]
    code, out, err = run("eval", *clips, "--frames", "9", "--size", "48x80", "--device", "cpu", *given)
    assert (code, err) == (0, ""), err
    heads, *lines = out.splitlines()
    assert {"values", "PSNR", "SSIM", "enc/s", "dec/s", "memory"} <= set(heads.split())
    assert sum(line.startswith("mean") for line in lines) == len(made) + 2
    rows = json.loads(run("eval", *clips, "--frames", "9", "--size", "48x80", "--device", "cpu", "--json", *given)[1])["means"]
    assert len(rows) == len(made) + 2
    for row, vae in zip(rows, [load_vae(), *made.values(), ShuffleVAE()], strict=True):
        time, height, width = vae.spec.stride
        stored = vae.spec.latent_channels * (1 + ceil(8 / time)) * ceil(48 / height) * ceil(80 / width)
        assert row["compression_values"] == pytest.approx(3 * 9 * 48 * 80 / stored), row["codec"]
        assert row["frames"] == 18
        assert row["encode_fps"] > 0
        assert row["decode_fps"] > 0
        assert row["peak_memory"] >= 0
        assert row["psnr"] == "inf" or 0 < row["psnr"] < 40


def names() -> list[str]:
    return [spec.name for found in plugin_manager().hook.wan_vaes() for spec in found]

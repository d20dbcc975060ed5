"""Parity with diffusers' WanTransformer3DModel on random small configurations, loaded from folders it writes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import WanTransformer3DModel, WanVACETransformer3DModel
from wan_dit.contracts import Conditioning
from wan_dit.layouts import names
from wan_dit.model import WanDiT

CONFIGS: tuple[dict[str, Any], ...] = (
    {"num_attention_heads": 3, "attention_head_dim": 12, "ffn_dim": 60, "freq_dim": 256, "text_dim": 12, "num_layers": 2},
    {"num_attention_heads": 2, "attention_head_dim": 32, "ffn_dim": 96, "freq_dim": 64, "text_dim": 24, "num_layers": 4},
    {"num_attention_heads": 1, "attention_head_dim": 128, "ffn_dim": 64, "freq_dim": 32, "text_dim": 8, "num_layers": 1},
    {"num_attention_heads": 2, "attention_head_dim": 22, "ffn_dim": 40, "freq_dim": 16, "text_dim": 8, "num_layers": 2, "qk_norm": None},
    {"num_attention_heads": 2, "attention_head_dim": 16, "ffn_dim": 40, "freq_dim": 16, "text_dim": 8, "num_layers": 2, "in_channels": 36},
)
SMALL = {"num_attention_heads": 2, "attention_head_dim": 16, "ffn_dim": 40, "freq_dim": 16, "text_dim": 8, "num_layers": 4}
IMAGE = {**SMALL, "in_channels": 36, "image_dim": 20, "added_kv_proj_dim": 32}


def reference(config: dict[str, Any], seed: int) -> WanTransformer3DModel:
    """A diffusers model in which no tensor is zero or one."""
    made, generator = WanTransformer3DModel(**config), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in made.parameters():
            scale = 0.4 if parameter.ndim == 1 else parameter[0].numel() ** -0.5
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)
    return made.eval()


def padded(text: list[torch.Tensor], rows: int) -> torch.Tensor:
    return torch.stack([torch.nn.functional.pad(tokens, (0, 0, 0, rows - len(tokens))) for tokens in text])


def apart(got: torch.Tensor, expected: torch.Tensor) -> float:
    """Relative L2 distance."""
    return float((got - expected).norm() / expected.norm())


@pytest.mark.parametrize("seed", range(len(CONFIGS)))
@torch.no_grad()
def test_velocity_equals_diffusers(seed: int, tmp_path: Path) -> None:
    theirs = reference(CONFIGS[seed], seed)
    theirs.save_pretrained(tmp_path, max_shard_size="60KB")
    ours = WanDiT.from_pretrained(tmp_path)
    latents = torch.randn(2, ours.config.in_dim, 3, 4, 6)
    timestep = torch.tensor([999.0, 271.0])
    text = [torch.randn(length, ours.config.text_dim) for length in (7, 30)]
    expected = theirs(latents, timestep, padded(text, ours.config.text_len), return_dict=False)[0]
    assert apart(ours(latents, timestep, ours.encode_context(text)), expected) <= 1e-5


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_names_are_those_of_diffusers(config: dict[str, Any], tmp_path: Path) -> None:
    theirs = reference(config, 0)
    theirs.save_pretrained(tmp_path)
    ours = WanDiT.from_pretrained(tmp_path)
    table, state = names(ours.config, "diffusers"), theirs.state_dict()
    assert set(table.values()) == set(state)
    for own, value in ours.state_dict().items():
        assert torch.equal(value, state[table[own]])


@pytest.mark.parametrize(("positions", "tokens"), [(None, 257), (514, 514)], ids=["i2v", "flf2v"])
@torch.no_grad()
def test_image_tokens_equal_diffusers(positions: int | None, tokens: int, tmp_path: Path) -> None:
    theirs = reference({**IMAGE, "pos_embed_seq_len": positions}, 3)
    theirs.save_pretrained(tmp_path)
    ours = WanDiT.from_pretrained(tmp_path)
    latents, extra, images = torch.randn(2, 16, 3, 4, 6), torch.randn(2, 20, 3, 4, 6), torch.randn(2, tokens, 20)
    timestep, text = torch.tensor([999.0, 271.0]), [torch.randn(length, 8) for length in (7, 30)]
    # diffusers takes the two images of a sample as two rows of its batch
    given = images.unflatten(1, (2, -1)).flatten(0, 1) if positions else images
    expected = theirs(torch.cat([latents, extra], 1), timestep, padded(text, 512), given, return_dict=False)[0]
    conditioning = Conditioning(extra, image_context=images)
    assert apart(ours(latents, timestep, ours.encode_context(text, conditioning), conditioning), expected) <= 1e-5


@torch.no_grad()
def test_a_time_of_each_token_equals_diffusers(tmp_path: Path) -> None:
    theirs = reference({**SMALL, "in_channels": 48, "out_channels": 48}, 4)
    theirs.save_pretrained(tmp_path)
    ours = WanDiT.from_pretrained(tmp_path)
    latents, text = torch.randn(1, 48, 3, 4, 6), [torch.randn(9, 8)]
    timestep = torch.tensor([[0.0, 875.0, 875.0]])
    expected = theirs(latents, timestep.repeat_interleave(6, 1), padded(text, 512), return_dict=False)[0]
    assert apart(ours(latents, timestep, ours.encode_context(text)), expected) <= 1e-5


@pytest.mark.parametrize("scales", [(1.0, 1.0), (0.7, 0.2)])
@torch.no_grad()
def test_vace_equals_diffusers(scales: tuple[float, float], tmp_path: Path) -> None:
    theirs = WanVACETransformer3DModel(**SMALL, vace_layers=[0, 2], vace_in_channels=96)
    generator = torch.Generator().manual_seed(5)
    for parameter in theirs.parameters():
        scale = 0.4 if parameter.ndim == 1 else parameter[0].numel() ** -0.5
        parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)
    theirs.eval().save_pretrained(tmp_path)
    ours = WanDiT.from_pretrained(tmp_path)
    assert ours.config.vace_layers == (0, 2)
    latents, control, text = torch.randn(1, 16, 3, 4, 6), torch.randn(1, 96, 3, 4, 6), [torch.randn(9, 8)]
    timestep = torch.tensor([999.0])
    expected = theirs(latents, timestep, padded(text, 512), None, control, torch.tensor(scales), return_dict=False)[0]
    given = Conditioning(vace=control, vace_scale=scales)
    assert apart(ours(latents, timestep, ours.encode_context(text), given), expected) <= 1e-5

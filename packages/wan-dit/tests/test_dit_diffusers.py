"""Parity with diffusers' WanTransformer3DModel on random small configurations, loaded from folders it writes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import WanTransformer3DModel
from wan_dit.checkpoint import names
from wan_dit.model import WanDiT

CONFIGS: tuple[dict[str, Any], ...] = (
    {"num_attention_heads": 3, "attention_head_dim": 12, "ffn_dim": 60, "freq_dim": 256, "text_dim": 12, "num_layers": 2},
    {"num_attention_heads": 2, "attention_head_dim": 32, "ffn_dim": 96, "freq_dim": 64, "text_dim": 24, "num_layers": 4},
    {"num_attention_heads": 1, "attention_head_dim": 128, "ffn_dim": 64, "freq_dim": 32, "text_dim": 8, "num_layers": 1},
    {"num_attention_heads": 2, "attention_head_dim": 22, "ffn_dim": 40, "freq_dim": 16, "text_dim": 8, "num_layers": 2, "qk_norm": None},
    {"num_attention_heads": 2, "attention_head_dim": 16, "ffn_dim": 40, "freq_dim": 16, "text_dim": 8, "num_layers": 2, "in_channels": 36},
)


def reference(config: dict[str, Any], seed: int) -> WanTransformer3DModel:
    """A diffusers model in which no tensor is zero or one."""
    made, generator = WanTransformer3DModel(**config), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in made.parameters():
            scale = 0.4 if parameter.ndim == 1 else parameter[0].numel() ** -0.5
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)
    return made.eval()


@pytest.mark.parametrize("seed", range(len(CONFIGS)))
@torch.no_grad()
def test_velocity_equals_diffusers(seed: int, tmp_path: Path) -> None:
    theirs = reference(CONFIGS[seed], seed)
    theirs.save_pretrained(tmp_path, max_shard_size="60KB")
    ours = WanDiT.from_pretrained(tmp_path)
    latents = torch.randn(2, ours.config.in_dim, 3, 4, 6)
    timestep = torch.tensor([999.0, 271.0])
    text = [torch.randn(length, ours.config.text_dim) for length in (7, 30)]
    padded = torch.stack([torch.nn.functional.pad(tokens, (0, 0, 0, ours.config.text_len - len(tokens))) for tokens in text])
    expected = theirs(latents, timestep, padded, return_dict=False)[0]
    got = ours(latents, timestep, ours.encode_context(text))
    assert float((got - expected).norm() / expected.norm()) <= 1e-5


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_names_are_those_of_diffusers(config: dict[str, Any], tmp_path: Path) -> None:
    theirs = reference(config, 0)
    theirs.save_pretrained(tmp_path)
    ours = WanDiT.from_pretrained(tmp_path)
    table, state = names(ours.config, "diffusers"), theirs.state_dict()
    assert set(table.values()) == set(state)
    for own, value in ours.state_dict().items():
        assert torch.equal(value, state[table[own]])

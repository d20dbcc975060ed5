"""Residual VAEs at tiny width with statistics, and clips for them."""

from __future__ import annotations

import torch
from torch import Tensor
from wan_vae.config import RESIDUAL_F16T4, RESIDUAL_F32T8, VAEConfig
from wan_vae.model import WanVAE
from wan_vae.testing import randomise

SMALL = {"base_dim": 4, "decoder_base_dim": 4, "z_dim": 4, "num_res_blocks": 1}
F16T4, F32T8 = (preset.model_copy(update=SMALL) for preset in (RESIDUAL_F16T4, RESIDUAL_F32T8))


def make(config: VAEConfig, **changes: object) -> WanVAE:
    vae = WanVAE(config.model_copy(update=changes)).eval()
    randomise(vae)
    statistics = {"latents_mean": (0.3, -0.2, 0.0, 1.0), "latents_std": (2.0, 0.5, 1.0, 3.0)}
    vae.config = vae.config.model_copy(update=statistics)
    return vae


def clip(vae: WanVAE, latents: int, cells: tuple[int, int] = (2, 1), seed: int = 0) -> Tensor:
    """A clip of so many latent frames in fp64, so that rounding does not hide a wrong frame."""
    time, height, width = vae.spec.stride
    shape = (1, 3, 1 + (latents - 1) * time, cells[0] * height, cells[1] * width)
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)).double() * 2 - 1

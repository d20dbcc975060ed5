"""One velocity of any backbone, from inputs that are always the same: what tests compare loaded models by."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from wan_dit.config import DiTConfig
from wan_dit.contracts import Conditioning


def velocity(made: Any) -> Tensor:
    """Velocities at two times, on the CPU."""
    config, generator = made.config, torch.Generator().manual_seed(1)
    weight = made.patch_embedding.weight
    latents = torch.randn(1, config.out_dim, 3, 8, 8, generator=generator).to(weight)
    text = torch.randn(9, config.text_dim, generator=generator).to(weight.device)
    conditioning = given_by(config, weight.device)
    with torch.no_grad():
        context = made.encode_context([text], conditioning)
        times = [torch.tensor([time], device=weight.device) for time in (999.0, 400.0)]
        return torch.cat([made(latents, time, context, conditioning) for time in times]).cpu()


def given_by(config: DiTConfig, device: torch.device | str = "cpu") -> Conditioning:
    """All that a backbone of this configuration takes."""
    generator = torch.Generator().manual_seed(2)

    def noise(wanted: object, *shape: int) -> Tensor | None:
        return torch.randn(shape, generator=generator).to(device) if wanted else None

    extra = config.in_dim - config.out_dim
    return Conditioning(
        extra_latents=noise(extra, 1, extra, 3, 8, 8),
        image_context=noise(config.image_dim, 1, config.pos_embed_seq_len or 5, config.image_dim or 0),
        vace=noise(config.vace_layers, 1, config.vace_in_dim, 3, 8, 8),
        reference=noise(config.ref_dim, 1, config.ref_dim, 8, 8),
    )

"""Small DC-AEs of every kind with random weights, ours and diffusers' AutoencoderDC, and how far the two are apart."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import AutoencoderDC
from torch import Tensor
from wan_vae.codecs.dcae import DCAE
from wan_vae.codecs.dcae_config import DCAEConfig
from wan_vae.codecs.dcae_diffusers import to_tensors
from wan_vae.codecs.dcae_layers import BatchNorm
from wan_vae.testing import difference, randomise

TOLERANCE = 1e-5
LOOSE = "gradients of the weights"  # where attention divides by little, rounding shows
DEEP = DCAEConfig(
    z_dim=4,
    encoder_dims=(8, 16, 16, 32),
    decoder_dims=(8, 16, 16, 32),
    encoder_depths=(0, 1, 2, 1),
    decoder_depths=(0, 2, 1, 2),
    encoder_blocks=("residual", "residual", "residual", "attention"),
    decoder_blocks=("residual", "residual", "attention", "attention"),
    encoder_scales=((), (), (), ()),
    decoder_scales=((), (), (), ()),
    decoder_norms=("batch_norm", "batch_norm", "rms_norm", "rms_norm"),
    decoder_activations=("relu", "relu", "silu", "silu"),
    head_dim=8,
    scaling_factor=0.37,
)
SANA = DEEP.model_copy(
    update={
        "encoder_depths": (1, 1, 1, 2),
        "decoder_depths": (1, 1, 1, 1),
        "encoder_scales": ((), (), (), (5,)),
        "decoder_scales": ((), (), (5,), (3, 5)),
        "decoder_norms": ("rms_norm",) * 4,
        "decoder_activations": ("silu",) * 4,
        "downsample": "conv",
        "upsample": "interpolate",
    }
)
LITE = SANA.model_copy(  # halves of two kinds, without the shortcuts around the latents
    update={
        "decoder_dims": (12, 8, 8, 16),
        "decoder_depths": (0, 1, 1, 2),
        "decoder_blocks": ("residual",) * 4,
        "decoder_scales": ((),) * 4,
        "upsample": "pixel_shuffle",
        "out_activation": "silu",
        "encoder_shortcut": False,
        "decoder_shortcut": False,
    }
)
CONFIGS = {"deep": DEEP, "sana": SANA, "lite": LITE}
CELLS = {"a weight for every pair": (2, 3), "values summed first": (6, 5)}  # less and more places than channels of a head


def made(config: DCAEConfig, seed: int = 0) -> DCAE:
    """One with random weights and statistics."""
    vae, generator = DCAE(config).eval(), torch.Generator().manual_seed(seed)
    randomise(vae, seed)
    for module in vae.modules():
        if isinstance(module, BatchNorm):
            module.running_mean.copy_(torch.randn(module.num_features, generator=generator))
            module.running_var.copy_(torch.rand(module.num_features, generator=generator) + 0.5)
            module.num_batches_tracked.fill_(70_001)
    return vae


def pair(config: DCAEConfig, seed: int = 0) -> tuple[DCAE, Any]:
    """Ours and diffusers' AutoencoderDC with the same random weights and statistics."""
    vae = made(config, seed)
    fields, state = vae.to_diffusers()
    theirs = AutoencoderDC.from_config(fields).eval()
    theirs.load_state_dict(state, strict=True)
    return vae, theirs


def pictures(vae: DCAE, cells: tuple[int, int], frames: int = 2, seed: int = 0) -> Tensor:
    _, height, width = vae.spec.stride
    shape = (1, 3, frames, cells[0] * height, cells[1] * width)
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def parity(config: DCAEConfig, cells: tuple[int, int]) -> dict[str, float]:
    """How far encoding, decoding and gradients are from diffusers' AutoencoderDC; those of each weight over the largest of it."""
    vae, theirs = pair(config)
    video = pictures(vae, cells).requires_grad_()
    frames = video.detach()[0].transpose(0, 1).contiguous().requires_grad_()
    reference = theirs.encode(frames).latent
    latents = torch.randn(reference.shape, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        shown = theirs.decode(latents / theirs.config.scaling_factor).sample.clamp(-1, 1)
    output, _, _ = vae.reconstruct(video)
    weights = torch.randn(output.shape, generator=torch.Generator().manual_seed(2))
    (output * weights).sum().backward()
    (theirs.decode(reference).sample * weights[0].transpose(0, 1)).sum().backward()
    ours = to_tensors({name: value.grad for name, value in vae.named_parameters()}, config)
    pairs = [(ours[name], value.grad) for name, value in theirs.named_parameters()]
    assert all(expected.abs().max() > 0.05 for _, expected in pairs)
    return {
        "encode": difference(vae.encode(video)[0].transpose(0, 1), reference * theirs.config.scaling_factor),
        "decode": difference(vae.decode(latents.transpose(0, 1)[None])[0].transpose(0, 1), shown),
        "gradient of the pictures": difference(video.grad[0].transpose(0, 1), frames.grad),
        LOOSE: max(float((got - expected).abs().max() / expected.abs().max()) for got, expected in pairs),
    }

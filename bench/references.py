"""Ours and the reference library's model with the same random weights: the pairs that parity and benchmarks compare."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from wan_dit.config import DiTConfig
from wan_dit.layouts import DIFFUSERS_FIELDS as DIT_FIELDS
from wan_dit.layouts import names as dit_names
from wan_dit.model import WanDiT
from wan_text.config import UMT5Config
from wan_text.layouts import HF_FIELDS, hf_names
from wan_text.umt5 import UMT5Encoder
from wan_vae.checkpoint import diffusers_config
from wan_vae.config import VAEConfig
from wan_vae.model import WanVAE
from wan_vae.names import diffusers_names
from wan_vae.testing import randomise

M = TypeVar("M", bound=nn.Module)


def copy_weights(ours: nn.Module, theirs: M, names: Mapping[str, str], tied: Mapping[str, str] | None = None) -> M:
    """Load our tensors into the reference by the table of names, strictly; `tied` are its second names of one tensor."""
    state = {names[key]: value for key, value in ours.state_dict().items()}
    state |= {copy: state[original] for copy, original in (tied or {}).items()}
    theirs.load_state_dict(state, strict=True)
    return theirs.eval()


def vae_pair(config: VAEConfig, seed: int = 0, *, reference: bool = True) -> tuple[WanVAE, Any]:
    """Ours and diffusers' AutoencoderKLWan, or None without `reference`."""
    from diffusers import AutoencoderKLWan

    ours = WanVAE(config).eval()
    randomise(ours, seed)
    if not reference:
        return ours, None
    return ours, copy_weights(ours, AutoencoderKLWan.from_config(diffusers_config(config)), diffusers_names(config))


def text_pair(config: UMT5Config, seed: int = 0) -> tuple[UMT5Encoder, Any]:
    """Ours and transformers' UMT5EncoderModel."""
    from transformers import UMT5Config as Reference
    from transformers import UMT5EncoderModel

    torch.manual_seed(seed)
    ours = UMT5Encoder(config).eval()  # its own initialisation: q without the scale makes any other saturate the softmax
    fields = {theirs: getattr(config, own) for own, theirs in HF_FIELDS.items()}
    reference = Reference(**fields, d_kv=config.dim_attn // config.num_heads, feed_forward_proj="gated-gelu", dropout_rate=0.0)
    tied = {"encoder.embed_tokens.weight": "shared.weight"}
    return ours, copy_weights(ours, UMT5EncoderModel(reference), hf_names(config), tied)


def backbone_pair(config: DiTConfig, seed: int = 0) -> tuple[WanDiT, Any]:
    """Ours and diffusers' WanTransformer3DModel."""
    from diffusers import WanTransformer3DModel

    ours = WanDiT(config).eval()
    randomise(ours, seed)
    fields = {theirs: getattr(config, own) for own, theirs in DIT_FIELDS.items() if not own.startswith("vace")}
    norm = "rms_norm_across_heads" if config.qk_norm else None
    theirs = WanTransformer3DModel(**fields, attention_head_dim=config.head_dim, qk_norm=norm)
    return ours, copy_weights(ours, theirs, dit_names(config, "diffusers"))


def reference_latents(vae: Any, video: Tensor) -> Tensor:
    """Normalised latents by diffusers' VAE."""
    mean, std = (torch.tensor(values).view(1, -1, 1, 1, 1) for values in (vae.config.latents_mean, vae.config.latents_std))
    return (vae.encode(video).latent_dist.mode() - mean) / std


def reference_video(vae: Any, latents: Tensor) -> Tensor:
    """Video from normalised latents by diffusers' VAE."""
    mean, std = (torch.tensor(values).view(1, -1, 1, 1, 1) for values in (vae.config.latents_mean, vae.config.latents_std))
    return vae.decode(latents * std + mean).sample.clamp(-1, 1)


def padded(text: Tensor, rows: int) -> Tensor:
    """`[L, D]` to the `[1, rows, D]` that the reference backbone expects."""
    return torch.cat([text, text.new_zeros(rows - len(text), text.shape[1])])[None]

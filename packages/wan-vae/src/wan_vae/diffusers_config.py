"""The config.json of diffusers' AutoencoderKLWan, as a table of field names, to and from ours."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ._shared.spec import UNKNOWN
from .config import WAN21, WAN22, VAEConfig
from .layouts import validated
from .statistics import WAN21_MEAN, WAN21_STD

DIFFUSERS_CLASS = "AutoencoderKLWan"

# own field: diffusers field, and its default in AutoencoderKLWan
DIFFUSERS_FIELDS: dict[str, tuple[str, Any]] = {
    "base_dim": ("base_dim", 96),
    "decoder_base_dim": ("decoder_base_dim", None),
    "z_dim": ("z_dim", 16),
    "dim_mult": ("dim_mult", [1, 2, 4, 4]),
    "num_res_blocks": ("num_res_blocks", 2),
    "temporal_downsample": ("temperal_downsample", [False, True, True]),
    "residual": ("is_residual", False),
    "patch_size": ("patch_size", None),
    "latents_mean": ("latents_mean", list(WAN21_MEAN)),
    "latents_std": ("latents_std", list(WAN21_STD)),
}


def diffusers_config(config: VAEConfig) -> dict[str, Any]:
    """The fields of AutoencoderKLWan's config.json."""
    fields = config.model_dump(mode="json")
    fields["latents_mean"] = fields["latents_mean"] or [0.0] * config.z_dim
    fields["latents_std"] = fields["latents_std"] or [1.0] * config.z_dim
    fields["patch_size"] = config.patch_size if config.patch_size > 1 else None
    channels = 3 * config.patch_size**2
    return {
        "_class_name": DIFFUSERS_CLASS,
        **{theirs: fields[own] for own, (theirs, _) in DIFFUSERS_FIELDS.items()},
        "attn_scales": [],
        "dropout": 0.0,
        "in_channels": channels,
        "out_channels": channels,
        "scale_factor_temporal": config.stride[0],
        "scale_factor_spatial": config.stride[1],
    }


def from_diffusers(fields: Mapping[str, Any], path: Path) -> VAEConfig:
    """The configuration that an AutoencoderKLWan's config.json gives; statistics of 0 and 1 are none. ValueError names a bad field."""
    values = {own: fields.get(theirs, default) for own, (theirs, default) in DIFFUSERS_FIELDS.items()}
    values["decoder_base_dim"] = values["decoder_base_dim"] or values["base_dim"]
    values["patch_size"] = values["patch_size"] or 1
    mean, std = tuple(values["latents_mean"] or ()), tuple(values["latents_std"] or ())
    if not any(mean) and all(value == 1 for value in std):
        mean = std = ()
    known = (preset.latent_space for preset in (WAN21, WAN22) if (mean, std) == (preset.latents_mean, preset.latents_std))
    space = next(known, UNKNOWN)
    return validated(values | {"latents_mean": mean, "latents_std": std, "latent_space": space}, path)

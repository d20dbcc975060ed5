"""The configuration of a Wan-style video VAE, and the published ones as presets."""

from __future__ import annotations

import math
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, PositiveInt, model_validator

from .statistics import WAN21_MEAN, WAN21_STD, WAN22_MEAN, WAN22_STD


class VAEConfig(BaseModel):
    """Widths, depths and strides of encoder and decoder, and the convention of the latents.

    base_dim, decoder_base_dim: width of the first encoder level and of the last decoder level
    dim_mult: width of each level as a multiple of the base width; all levels but the last halve height and width
    temporal_downsample: for each of those, whether it halves time too
    num_res_blocks: residual blocks of an encoder level; a decoder level has one more
    residual: Wan2.2 style, every level has a parameter-free shortcut and upsampling keeps its width
    patch_size: pixels per side folded into channels before the encoder
    chunk: latent frames of a chunk, within which 3x3x3 convolutions see both ways; 0: they see the present and the past. The first frame
        is a chunk of its own, and the last one may be shorter
    timestep_conditioning: the decoder is told how much noise is in the latents, and takes it out. `decode` mixes in
        `decode_noise_scale` of it and says `decode_timestep`; training draws both as one share of [0, `max_timestep`]
    latents_mean, latents_std: per channel; latents are (mean - latents_mean) / latents_std. Empty: no normalisation
    latent_space: tag of the space; parts that carry one tag are interchangeable
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    base_dim: PositiveInt
    decoder_base_dim: PositiveInt
    z_dim: PositiveInt
    dim_mult: tuple[PositiveInt, ...] = Field(min_length=1)
    temporal_downsample: tuple[bool, ...]
    num_res_blocks: PositiveInt = 2
    residual: bool = False
    patch_size: PositiveInt = 1
    chunk: NonNegativeInt = 0
    timestep_conditioning: bool = False
    decode_timestep: float = Field(default=0.05, ge=0, le=1)
    decode_noise_scale: float = Field(default=0.025, ge=0, le=1)
    max_timestep: float = Field(default=0.2, gt=0, le=1)
    latents_mean: tuple[float, ...] = ()
    latents_std: tuple[float, ...] = ()
    latent_space: str

    @model_validator(mode="after")
    def _lengths_agree(self) -> VAEConfig:
        if len(self.temporal_downsample) != len(self.dim_mult) - 1:
            flags, levels = len(self.temporal_downsample), len(self.dim_mult)
            raise ValueError(
                f"temporal_downsample has {flags} flags, expected {levels - 1}: one for each of the {levels} levels but the last"
            )
        for name, values in (("latents_mean", self.latents_mean), ("latents_std", self.latents_std)):
            if len(values) not in (0, self.z_dim):
                raise ValueError(f"{name} has {len(values)} values, expected {self.z_dim} (z_dim) or none")
        if not all(math.isfinite(value) and value > 0 for value in self.latents_std):
            raise ValueError(f"latents_std must be positive and finite, got {self.latents_std}")
        return self

    @property
    def beyond_wan(self) -> dict[str, Any]:
        """The fields that make of it what Wan's code, and diffusers', cannot run; empty for a VAE like theirs."""
        fields = {"chunk": self.chunk, "timestep_conditioning": self.timestep_conditioning}
        return {name: value for name, value in fields.items() if value}

    @property
    def stride(self) -> tuple[int, int, int]:
        """Pixels per latent in (time, height, width)."""
        spatial = self.patch_size * 2 ** len(self.temporal_downsample)
        return (2 ** sum(self.temporal_downsample), spatial, spatial)


WAN21 = VAEConfig(
    base_dim=96, decoder_base_dim=96, z_dim=16, dim_mult=(1, 2, 4, 4), temporal_downsample=(False, True, True),
    latents_mean=WAN21_MEAN, latents_std=WAN21_STD, latent_space="wan2.1",
)  # fmt: skip
WAN22 = VAEConfig(
    base_dim=160, decoder_base_dim=256, z_dim=48, dim_mult=(1, 2, 4, 4), temporal_downsample=(False, True, True),
    residual=True, patch_size=2, latents_mean=WAN22_MEAN, latents_std=WAN22_STD, latent_space="wan2.2",
)  # fmt: skip
TINY = VAEConfig(
    base_dim=16, decoder_base_dim=16, z_dim=16, dim_mult=(1, 2, 2), temporal_downsample=(True, True),
    num_res_blocks=1, residual=True, patch_size=2, latent_space="tiny-2",
)  # fmt: skip
RESIDUAL_F16T4 = VAEConfig(
    base_dim=128, decoder_base_dim=192, z_dim=64, dim_mult=(1, 2, 4, 4), temporal_downsample=(False, True, True),
    residual=True, patch_size=2, latent_space="residual-f16t4",
)  # fmt: skip
RESIDUAL_F32T8 = VAEConfig(
    base_dim=128, decoder_base_dim=128, z_dim=128, dim_mult=(1, 2, 4, 4, 8), temporal_downsample=(False, True, True, True),
    residual=True, patch_size=2, latent_space="residual-f32t8",
)  # fmt: skip
PRESETS = {"wan2.1": WAN21, "wan2.2": WAN22, "tiny": TINY, "residual-f16t4": RESIDUAL_F16T4, "residual-f32t8": RESIDUAL_F32T8}

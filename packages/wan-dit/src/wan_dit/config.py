"""The configuration of a Wan diffusion transformer and the presets (Wan report, section 4.2; official `wan/configs`)."""

from __future__ import annotations

from typing import Any, Self

from pydantic import BaseModel, ConfigDict, model_validator

from .plugins import BackboneSpec


class DiTConfig(BaseModel):
    """Field names are those of the official `config.json`, and what a checkpoint is trained on.

    patch_size: latents per token in (time, height, width)
    in_dim, out_dim: latent channels in (with those a task concatenates) and out
    dim, ffn_dim, freq_dim: widths of the tokens, of the feed-forward layer and of the time sinusoid
    text_dim, text_len: width of the text tokens, and the count every prompt is padded to
    latent_space, stride: the VAE it was trained on; stride in pixels a latent, (time, height, width)
    embedding_space: the text encoder it was trained on
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    patch_size: tuple[int, int, int] = (1, 2, 2)
    in_dim: int = 16
    out_dim: int = 16
    dim: int
    ffn_dim: int
    freq_dim: int = 256
    text_dim: int = 4096
    text_len: int = 512
    num_heads: int
    num_layers: int
    qk_norm: bool = True
    cross_attn_norm: bool = True
    eps: float = 1e-6
    latent_space: str = "wan2.1"
    stride: tuple[int, int, int] = (4, 8, 8)
    embedding_space: str = "umt5-xxl"

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.dim % self.num_heads or self.head_dim % 2:
            raise ValueError(f"dim {self.dim} over num_heads {self.num_heads} must give an even head width (rotary pairs)")
        if self.freq_dim % 2:
            raise ValueError(f"freq_dim must be even (a cosine and a sine half), got {self.freq_dim}")
        return self

    @property
    def head_dim(self) -> int:
        return self.dim // self.num_heads

    def spec(self, name: str = "wan-dit", **fields: Any) -> BackboneSpec:
        """The facts a pipeline checks before any weight is read."""
        return BackboneSpec(
            name,
            "wan_dit.model:WanDiT",
            latent_space=self.latent_space,
            latent_channels=self.out_dim,
            stride=self.stride,
            embedding_space=self.embedding_space,
            text_dim=self.text_dim,
            text_len=self.text_len,
            patch=self.patch_size,
            format="wan-dit/1",
            describe="wan_dit.checkpoint:describe",
            **fields,
        )


TINY = DiTConfig(
    in_dim=16,
    out_dim=16,
    dim=128,
    ffn_dim=384,
    freq_dim=64,
    text_dim=96,
    text_len=32,
    num_heads=4,
    num_layers=6,
    latent_space="tiny-1",
    embedding_space="tiny-1",
)
T2V_1_3B = DiTConfig(dim=1536, ffn_dim=8960, num_heads=12, num_layers=30)
T2V_14B = DiTConfig(dim=5120, ffn_dim=13824, num_heads=40, num_layers=40)

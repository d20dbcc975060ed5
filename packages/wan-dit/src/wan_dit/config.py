"""The configuration of a Wan diffusion transformer and the presets (Wan report, section 4.2; official `wan/configs`)."""

from __future__ import annotations

from typing import Any, Self

from pydantic import BaseModel, ConfigDict, model_validator

from .parameters import count_parameters
from .plugins import BackboneSpec


class DiTConfig(BaseModel):
    """Field names are those of the official `config.json`, and what a checkpoint is trained on.

    patch_size: latents per token in (time, height, width)
    in_dim, out_dim: latent channels in (with those a task concatenates) and out
    dim, ffn_dim, freq_dim: widths of the tokens, of the feed-forward layer and of the time sinusoid
    text_dim, text_len: width of the text tokens, and the count every prompt is padded to
    latent_space, stride: the VAE it was trained on; stride in pixels a latent, (time, height, width)
    embedding_space: the text encoder it was trained on
    image_dim: width of the CLIP image tokens that cross-attention reads (Wan2.1 I2V and FLF2V, Fun); None where there are none
    pos_embed_seq_len: image tokens with a learned position (FLF2V: two images of 257); None where they have none
    vace_layers: blocks that get a hint of a VACE block; vace_in_dim: channels of the VACE context
    ref_dim: latent channels of a reference image that becomes tokens in front (Fun control `ref_conv`); 0 is none
    camera_dim: channels of a camera path, 6 Pluecker coordinates of 4 frames each (Fun camera `control_adapter`); 0 is none
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
    image_dim: int | None = None
    pos_embed_seq_len: int | None = None
    vace_layers: tuple[int, ...] = ()
    vace_in_dim: int = 96
    ref_dim: int = 0
    camera_dim: int = 0

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.dim % self.num_heads or self.head_dim % 2:
            raise ValueError(f"dim {self.dim} over num_heads {self.num_heads} must give an even head width (rotary pairs)")
        if self.freq_dim % 2:
            raise ValueError(f"freq_dim must be even (a cosine and a sine half), got {self.freq_dim}")
        if list(self.vace_layers) != sorted(set(self.vace_layers) & set(range(self.num_layers))):
            raise ValueError(f"vace_layers must be rising numbers of blocks below {self.num_layers}, got {list(self.vace_layers)}")
        if self.pos_embed_seq_len is not None and self.image_dim is None:
            raise ValueError("pos_embed_seq_len is of image tokens: give image_dim too")
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
            in_channels=self.in_dim,
            image_dim=self.image_dim,
            image_tokens=self.pos_embed_seq_len,
            vace=bool(self.vace_layers),
            parameters=count_parameters(self),
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
    latent_space="tiny-2",
    embedding_space="tiny-2",
)
# Wan2.1: text to video; with image conditioning (CLIP, mask and image latents) or VACE blocks besides
T2V_1_3B = DiTConfig(dim=1536, ffn_dim=8960, num_heads=12, num_layers=30)
T2V_14B = DiTConfig(dim=5120, ffn_dim=13824, num_heads=40, num_layers=40)
I2V_14B = DiTConfig(**{**T2V_14B.model_dump(), "in_dim": 36, "image_dim": 1280})
FLF2V_14B = DiTConfig(**{**I2V_14B.model_dump(), "pos_embed_seq_len": 514})
VACE_1_3B = DiTConfig(**{**T2V_1_3B.model_dump(), "vace_layers": tuple(range(0, 30, 2))})
VACE_14B = DiTConfig(**{**T2V_14B.model_dump(), "vace_layers": tuple(range(0, 40, 5))})
# Wan2.2: each expert of T2V-A14B is a T2V_14B, of I2V-A14B one without CLIP; TI2V-5B has its own VAE
I2V_A14B = DiTConfig(**{**T2V_14B.model_dump(), "in_dim": 36})
TI2V_5B = DiTConfig(in_dim=48, out_dim=48, dim=3072, ffn_dim=14336, num_heads=24, num_layers=30, latent_space="wan2.2", stride=(4, 16, 16))

"""The configurations of the umT5 encoder and of the CLIP vision tower, and their presets."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, PositiveInt, model_validator


class UMT5Config(BaseModel):
    """Sizes of the network and how a prompt becomes ids.

    vocab_size: rows of the embedding table, at least the tokenizer's number of pieces
    dim, dim_attn, dim_ffn: width of the stream, of all heads together, and of the feed-forward's hidden layer
    num_buckets, max_distance: of the relative position bias
    max_tokens: longest context, the end token included
    embedding_space: tag of the space of the output; equal width is not equal space
    cleaning: what is done to a prompt before the tokenizer (`tokenizer.clean`)
    unknown: characters outside the vocabulary become byte pieces or one `<unk>` per run
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    vocab_size: PositiveInt
    dim: PositiveInt
    dim_attn: PositiveInt
    dim_ffn: PositiveInt
    num_heads: PositiveInt
    num_layers: PositiveInt
    num_buckets: PositiveInt = 32
    max_distance: PositiveInt = 128
    max_tokens: PositiveInt = 512
    embedding_space: str
    cleaning: Literal["whitespace", "lower", "canonicalize"] = "whitespace"
    unknown: Literal["bytes", "unk"] = "bytes"

    @model_validator(mode="after")
    def _check(self) -> UMT5Config:
        if self.dim_attn % self.num_heads:
            raise ValueError(f"dim_attn {self.dim_attn} does not divide into {self.num_heads} heads")
        return self


# google/umt5-xxl, encoder half: 256,000 pieces + 300 <extra_id> + 84 unused rows; 5,680,910,336 parameters
XXL = UMT5Config(vocab_size=256384, dim=4096, dim_attn=4096, dim_ffn=10240, num_heads=64, num_layers=24, embedding_space="umt5-xxl")
# the built-in encoder: small enough to train with the backbone on a CPU; it lower-cases, so capitals never matter
TINY = UMT5Config(
    vocab_size=448, dim=96, dim_attn=96, dim_ffn=192, num_heads=4, num_layers=2, max_tokens=32, embedding_space="tiny-2", cleaning="lower"
)


class CLIPVisionConfig(BaseModel):
    """Sizes of a CLIP vision tower as Wan uses it.

    image_size, patch_size: sides in pixels
    dim, dim_ffn: width of the tokens and of the feed-forward's hidden layer
    num_layers: blocks that are run, one fewer than were trained
    image_space: tag of the space of the output; equal width is not equal space
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    image_size: PositiveInt
    patch_size: PositiveInt
    dim: PositiveInt
    dim_ffn: PositiveInt
    num_heads: PositiveInt
    num_layers: PositiveInt
    norm_eps: float = 1e-5
    activation: Literal["gelu", "quick_gelu"] = "gelu"
    image_space: str

    @property
    def tokens(self) -> int:
        """The patches and the class token."""
        return 1 + (self.image_size // self.patch_size) ** 2

    @model_validator(mode="after")
    def _check(self) -> CLIPVisionConfig:
        for name, whole, part in (("dim", self.dim, self.num_heads), ("image_size", self.image_size, self.patch_size)):
            if whole % part:
                raise ValueError(f"{name} {whole} does not divide by {part}")
        return self


# the tower of open_clip's XLM-RoBERTa ViT-H/14 without its last block
VIT_H_14 = CLIPVisionConfig(image_size=224, patch_size=14, dim=1280, dim_ffn=5120, num_heads=16, num_layers=31, image_space="clip-vit-h-14")

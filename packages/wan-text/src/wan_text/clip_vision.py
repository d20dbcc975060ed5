"""The vision tower of CLIP ViT-H/14, which turns a reference image into context tokens for Wan2.1 I2V, FLF2V and Animate.

Radford et al., "Learning Transferable Visual Models From Natural Language Supervision" (2021); wan/modules/clip.py of the
reference, whose text tower Wan never uses. The last block, the norm after it and the projection are not used either: they
are neither built nor loaded.

Shapes: B images, L = 1 + patches tokens, D dim, N heads, H head width.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from . import clip_checkpoint
from ._shared.weights import Pretrained, State
from .config import CLIPVisionConfig
from .plugins import ImageEncoderSpec

MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)
SLACK = 1e-3  # beyond [-1, 1] that rounding may leave


class Attention(nn.Module):
    """Self-attention among all tokens."""

    def __init__(self, config: CLIPVisionConfig) -> None:
        super().__init__()
        self.heads = config.num_heads
        self.qkv = nn.Linear(config.dim, 3 * config.dim)
        self.proj = nn.Linear(config.dim, config.dim)

    def forward(self, x_BLD: Tensor) -> Tensor:
        q_BNLH, k_BNLH, v_BNLH = rearrange(self.qkv(x_BLD), "B L (three N H) -> three B N L H", three=3, N=self.heads)
        x_BNLH = F.scaled_dot_product_attention(q_BNLH, k_BNLH, v_BNLH)
        return self.proj(rearrange(x_BNLH, "B N L H -> B L (N H)"))


class FeedForward(nn.Module):
    """Two layers around a GELU (exact, or OpenAI's quick one)."""

    def __init__(self, config: CLIPVisionConfig) -> None:
        super().__init__()
        self.quick = config.activation == "quick_gelu"
        self.up = nn.Linear(config.dim, config.dim_ffn)
        self.down = nn.Linear(config.dim_ffn, config.dim)

    def forward(self, x_BLD: Tensor) -> Tensor:
        h_BLF = self.up(x_BLD)
        return self.down(h_BLF * torch.sigmoid(1.702 * h_BLF) if self.quick else F.gelu(h_BLF))


class Block(nn.Module):
    """Pre-norm attention and feed-forward."""

    def __init__(self, config: CLIPVisionConfig) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(config.dim, config.norm_eps)
        self.attn = Attention(config)
        self.norm2 = nn.LayerNorm(config.dim, config.norm_eps)
        self.ffn = FeedForward(config)

    def forward(self, x_BLD: Tensor) -> Tensor:
        x_BLD = x_BLD + self.attn(self.norm1(x_BLD))
        return x_BLD + self.ffn(self.norm2(x_BLD))


class CLIPVision(Pretrained):
    """Images to tokens: all blocks but the released tower's last, without the norm that follows it.

    `from_pretrained` takes our folder, the official `models_clip_*.pth`, transformers' and diffusers' `image_encoder/`, and single
    files such as ComfyUI's `clip_vision_h.safetensors`.

    Example: `load_image_encoder("clip-vit-h-14").encode(images)` is `[B, 257, 1280]`.
    """

    format: ClassVar[str] = clip_checkpoint.FORMAT
    hub_files = clip_checkpoint.HUB_FILES

    def __init__(self, config: CLIPVisionConfig) -> None:
        super().__init__()
        self.config = config
        self.patch_embedding = nn.Conv2d(3, config.dim, config.patch_size, config.patch_size, bias=False)
        self.cls_embedding = nn.Parameter(config.dim**-0.5 * torch.randn(1, 1, config.dim))
        self.pos_embedding = nn.Parameter(config.dim**-0.5 * torch.randn(1, config.tokens, config.dim))
        self.pre_norm = nn.LayerNorm(config.dim, config.norm_eps)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.num_layers))

    def forward(self, x: Tensor) -> Tensor:
        """Tokens `[B, L, D]` of preprocessed images `[B, 3, size, size]`."""
        x_BLD = rearrange(self.patch_embedding(x), "B D h w -> B (h w) D")
        x_BLD = torch.cat([self.cls_embedding.expand(len(x_BLD), -1, -1), x_BLD], dim=1) + self.pos_embedding
        x_BLD = self.pre_norm(x_BLD)
        for block in self.blocks:
            x_BLD = block(x_BLD)
        return x_BLD

    @torch.no_grad()
    def encode(self, images: Tensor | Sequence[Tensor]) -> Tensor:
        """Tokens `[B, L, D]` of images in [-1, 1]: one tensor `[B, 3, H, W]`, or several `[3, H, W]` of any sizes."""
        weight = self.patch_embedding.weight
        if len(images) == 0:
            return weight.new_empty(0, self.config.tokens, self.config.dim)
        pictures = [preprocess(_checked(image), self.config.image_size) for image in images]
        return self(torch.cat(pictures).to(weight.device, weight.dtype))

    @property
    def spec(self) -> ImageEncoderSpec:
        """Number, width and space of the tokens."""
        return clip_checkpoint.spec_of(self.config, self.name or self.config.image_space)

    @classmethod
    def read_checkpoint(cls, path: Path) -> tuple[CLIPVisionConfig, State]:
        return clip_checkpoint.read_tower(path)

    @classmethod
    def official_names(cls, config: CLIPVisionConfig) -> dict[str, str]:
        return clip_checkpoint.official_names(config)


def preprocess(image: Tensor, size: int) -> Tensor:
    """An image `[3, H, W]` in [-1, 1] as the tower was trained to see it, `[1, 3, size, size]`.

    As in the reference: stretched to a square by bicubic interpolation, without antialiasing, then CLIP's mean and deviation.
    """
    resized = F.interpolate(image[None].float(), size=(size, size), mode="bicubic", align_corners=False)
    mean, std = (torch.tensor(values, device=image.device).view(1, 3, 1, 1) for values in (MEAN, STD))
    return (0.5 * resized + 0.5 - mean) / std


def _checked(image: Any) -> Tensor:
    if not isinstance(image, Tensor) or image.ndim != 3 or image.shape[0] != 3 or 0 in image.shape:
        got = list(image.shape) if isinstance(image, Tensor) else type(image).__name__
        raise ValueError(f"expected images [3, H, W], alone in a list or stacked to [B, 3, H, W], got {got}")
    if not image.is_floating_point():
        raise ValueError(f"expected a floating-point image in [-1, 1], got {image.dtype}: scale 0..255 by x / 127.5 - 1")
    least, most = (float(value) for value in image.aminmax())
    if not (least >= -1 - SLACK and most <= 1 + SLACK):
        raise ValueError(f"expected an image in [-1, 1], got values from {least:g} to {most:g}")
    return image

"""How much memory an encoder takes, by its configuration: the `footprint` of this package's specs."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ._shared.weights import locate
from .checkpoint import config_of
from .clip_checkpoint import read_tower
from .clip_vision import CLIPVision
from .config import TINY, VIT_H_14, XXL
from .plugins import ImageEncoderSpec, TextEncoderSpec
from .umt5 import UMT5Encoder


def encoding_text(spec: TextEncoderSpec, *, dtype: str, **_: Any) -> dict[str, int]:
    """Of an encoder that is given the longest prompt."""
    known = {(config.embedding_space, config.dim): config for config in (XXL, TINY)}
    config = known.get((spec.embedding_space, spec.embed_dim)) or config_of(locate(spec.weights or spec.name))
    width, tokens = getattr(torch, dtype).itemsize, config.max_tokens
    with torch.device("meta"):
        encoder = UMT5Encoder(config)
    scores = 3 * 4 * config.num_heads * tokens**2  # logits, bias and their softmax
    return {
        "weights": _weights(encoder, width),
        "work": scores + tokens * (24 * config.dim + 3 * width * config.dim_ffn),
        "streamed": _weights(encoder.blocks[0], width),  # half a block, and the one that is read
    }


def encoding_image(spec: ImageEncoderSpec, *, dtype: str, **_: Any) -> dict[str, int]:
    """Of a tower that is given one image."""
    config = VIT_H_14 if spec.image_space == VIT_H_14.image_space else read_tower(locate(spec.weights or spec.name))[0]
    width = getattr(torch, dtype).itemsize
    with torch.device("meta"):
        tower = CLIPVision(config)
    return {"weights": _weights(tower, width), "work": config.tokens * (24 * config.dim + 3 * width * config.dim_ffn)}


def _weights(module: nn.Module, width: int) -> int:
    return width * sum(parameter.numel() for parameter in module.parameters())

"""Reads the CLIP vision tower in every layout that it is published in, as tables of names, strict and one to one."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor

from ._shared.weights import State, locate, read_config, read_state, rename, strip_prefix
from .config import VIT_H_14, CLIPVisionConfig
from .plugins import ImageEncoderSpec

FORMAT = "wan-text-image/1"
# own name, official name (wan/modules/clip.py), transformers' name (CLIPVisionModel)
OWN, OFFICIAL, TRANSFORMERS = range(3)
GLOBAL_NAMES = (
    ("cls_embedding", "cls_embedding", "embeddings.class_embedding"),
    ("pos_embedding", "pos_embedding", "embeddings.position_embedding.weight"),
    ("patch_embedding.weight", "patch_embedding.weight", "embeddings.patch_embedding.weight"),
    ("pre_norm.weight", "pre_norm.weight", "pre_layrnorm.weight"),
    ("pre_norm.bias", "pre_norm.bias", "pre_layrnorm.bias"),
)
BLOCK_NAMES = (
    ("norm1", "norm1", "layer_norm1"),
    ("attn.qkv", "attn.to_qkv", "self_attn.qkv_proj"),
    ("attn.proj", "attn.proj", "self_attn.out_proj"),
    ("norm2", "norm2", "layer_norm2"),
    ("ffn.up", "mlp.0", "mlp.fc1"),
    ("ffn.down", "mlp.2", "mlp.fc2"),
)
BLOCK_PREFIXES = ("blocks", "transformer", "encoder.layers")
AFTER = ("post_norm", "post_norm", "post_layernorm")  # its presence tells that the block before it is the one that is not used
UNUSED = ("head", "visual_projection.weight", "embeddings.position_ids", "logit_scale", "log_scale", "text_projection.weight")
OTHER_TOWER = ("textual.", "text_model.")
PREFIXES = ("visual.", "vision_model.", "clip_vision.vision_model.", "image_encoder.")
# transformers' fields: what decides the result and cannot be told from shapes
HF_ACTIVATION, HF_HEADS, HF_EPS = "hidden_act", "num_attention_heads", "layer_norm_eps"
HEAD_DIM = 80  # of ViT-H/14, where no config says otherwise
WEIGHTS = ("models_clip_*.pth", "image_encoder/model.safetensors", "image_encoder/model-*.safetensors")
CONFIG_FILES = ("image_encoder/config.json",)
HUB_FILES = (*WEIGHTS, "image_encoder/*.json")


def official_names(config: CLIPVisionConfig) -> dict[str, str]:
    """Own tensor name to official tensor name."""
    return _table(config.num_layers, OWN, OFFICIAL)


def _table(layers: int, source: int, target: int) -> dict[str, str]:
    prefixes = (BLOCK_PREFIXES[source], BLOCK_PREFIXES[target])
    blocks = {
        f"{prefixes[0]}.{i}.{row[source]}.{field}": f"{prefixes[1]}.{i}.{row[target]}.{field}"
        for i in range(layers)
        for row in BLOCK_NAMES
        for field in ("weight", "bias")
    }
    return {row[source]: row[target] for row in GLOBAL_NAMES} | blocks


def read_tower(path: Path) -> tuple[CLIPVisionConfig, State]:
    """Config and tensors, in own names, of a file or folder in any layout.

    Raises ValueError that names the tensors that are missing or unexpected, FileNotFoundError where there are no weights.
    """
    weights = _weights(path)
    state = {key: value for key, value in read_state(weights).items() if not key.startswith(OTHER_TOWER) and key not in UNUSED}
    state = strip_prefix(state, PREFIXES)
    state = {key: value for key, value in state.items() if key not in UNUSED}
    layout = TRANSFORMERS if any(".self_attn." in key for key in state) else OFFICIAL
    state = _fused(state) if layout == TRANSFORMERS else state
    found = [int(i) for i in re.findall(rf"^{re.escape(BLOCK_PREFIXES[layout])}\.(\d+)\.", "\n".join(state), re.MULTILINE)]
    layers = 1 + max(found, default=-1)
    if any(key.startswith(AFTER[layout]) for key in state):
        layers -= 1
        state = {key: value for key, value in state.items() if not key.startswith((AFTER[layout], f"{BLOCK_PREFIXES[layout]}.{layers}."))}
    state = rename(state, _table(layers, layout, OWN), weights)
    state["cls_embedding"] = state["cls_embedding"].reshape(1, 1, -1)
    state["pos_embedding"] = state["pos_embedding"].reshape(1, *state["pos_embedding"].shape[-2:])
    return _config(state, layers, read_config(weights) or {}, weights), state


def _weights(path: Path) -> Path:
    if path.is_file():
        return path
    if official := sorted(path.glob("models_clip_*.pth")):
        return official[0]
    return path / "image_encoder" if (path / "image_encoder").is_dir() else path


def _fused(state: State) -> State:
    """The products for q, k and v, which transformers keeps apart, as one."""
    made = dict(state)
    for key in [key for key in state if ".self_attn.q_proj." in key]:
        parts = [made.pop(key.replace(".q_proj.", f".{part}_proj."), None) for part in "qkv"]
        if all(part is not None for part in parts):
            made[key.replace(".q_proj.", ".qkv_proj.")] = torch.cat([part for part in parts if part is not None])
    return made


def _config(state: dict[str, Tensor], layers: int, written: dict[str, Any], source: Path) -> CLIPVisionConfig:
    if written.get("format") == FORMAT:
        try:
            return CLIPVisionConfig(**{key: value for key, value in written.items() if key != "format"})
        except ValidationError as error:
            problems = "; ".join(f"{'.'.join(map(str, e['loc'])) or 'config'}: {e['msg']}" for e in error.errors())
            raise ValueError(f"config.json of '{source}' is not valid: {problems}") from error
    dim, _, patch, _ = state["patch_embedding.weight"].shape
    tokens = state["pos_embedding"].shape[1]
    config = CLIPVisionConfig(
        image_size=patch * round((tokens - 1) ** 0.5),
        patch_size=patch,
        dim=dim,
        dim_ffn=state["blocks.0.ffn.up.weight"].shape[0],
        num_heads=written.get(HF_HEADS, max(1, dim // HEAD_DIM)),
        num_layers=layers,
        norm_eps=written.get(HF_EPS, VIT_H_14.norm_eps),
        activation=written.get(HF_ACTIVATION, VIT_H_14.activation),
        image_space=f"clip-{dim}x{layers}",
    )
    return VIT_H_14 if config == VIT_H_14.model_copy(update={"image_space": config.image_space}) else config


def spec_of(config: CLIPVisionConfig, name: str) -> ImageEncoderSpec:
    """The spec of a tower with this config."""
    return ImageEncoderSpec(
        name=name,
        target="wan_text.clip_vision:CLIPVision",
        image_space=config.image_space,
        image_dim=config.dim,
        tokens=config.tokens,
        format=FORMAT,
        describe="wan_text.clip_checkpoint:describe",
    )


def describe(source: str | os.PathLike[str]) -> ImageEncoderSpec:
    """The facts of a checkpoint; its tensors are mapped, not read."""
    return spec_of(read_tower(locate(source, HUB_FILES))[0], str(source))

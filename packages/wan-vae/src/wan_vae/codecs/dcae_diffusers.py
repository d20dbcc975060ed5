"""The layout of diffusers' AutoencoderDC: its config.json, and its tensors, of which three make one of ours."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .._shared.spec import UNKNOWN
from .._shared.weights import State, rename
from .dcae_config import HALVES, PRESETS, DCAEConfig, validated

DIFFUSERS_CLASS = "AutoencoderDC"
BLOCKS = {"residual": "ResBlock", "attention": "EfficientViTBlock"}

# own field: diffusers field, and its default in AutoencoderDC
DIFFUSERS_FIELDS: dict[str, tuple[str, Any]] = {
    "z_dim": ("latent_channels", 32),
    "head_dim": ("attention_head_dim", 32),
    "encoder_dims": ("encoder_block_out_channels", [128, 256, 512, 512, 1024, 1024]),
    "decoder_dims": ("decoder_block_out_channels", [128, 256, 512, 512, 1024, 1024]),
    "encoder_depths": ("encoder_layers_per_block", [2, 2, 2, 3, 3, 3]),
    "decoder_depths": ("decoder_layers_per_block", [3, 3, 3, 3, 3, 3]),
    "encoder_blocks": ("encoder_block_types", "ResBlock"),
    "decoder_blocks": ("decoder_block_types", "ResBlock"),
    "encoder_scales": ("encoder_qkv_multiscales", [[], [], [], [5], [5], [5]]),
    "decoder_scales": ("decoder_qkv_multiscales", [[], [], [], [5], [5], [5]]),
    "decoder_norms": ("decoder_norm_types", "rms_norm"),
    "decoder_activations": ("decoder_act_fns", "silu"),
    "downsample": ("downsample_block_type", "pixel_unshuffle"),
    "upsample": ("upsample_block_type", "pixel_shuffle"),
    "encoder_shortcut": ("encoder_out_shortcut", True),
    "decoder_shortcut": ("decoder_in_shortcut", True),
    "out_activation": ("decoder_conv_act_fn", "relu"),
    "scaling_factor": ("scaling_factor", 1.0),
}
STAGES = ("blocks", "norms", "activations")  # fields that diffusers gives once for all stages, or for each

RENAMED = (  # own names to those of diffusers, one after another; `first` stands for the first convolution
    (r"^encoder\.project_in\.(conv\.)+", "encoder.conv_in.{first}"),
    (r"^encoder\.project_out\.(main\.)?op_list\.0\.conv\.", "encoder.conv_out."),
    (r"^decoder\.project_in\.(main\.)?conv\.", "decoder.conv_in."),
    (r"^decoder\.project_out\.op_list\.0\.", "decoder.norm_out."),
    (r"^decoder\.project_out\.op_list\.2\.conv\.", "decoder.conv_out."),
    (r"^encoder\.stages\.(\d+)\.op_list\.", r"encoder.down_blocks.\1."),
    (r"^decoder\.stages\.(\d+)\.op_list\.", r"decoder.up_blocks.\1."),
    (r"\.context_module\.main\.aggreg\.(\d+)\.0\.", r".attn.to_qkv_multiscale.\1.proj_in."),
    (r"\.context_module\.main\.aggreg\.(\d+)\.1\.", r".attn.to_qkv_multiscale.\1.proj_out."),
    (r"\.context_module\.main\.qkv\.conv\.", ".attn.to_{part}."),
    (r"\.context_module\.main\.proj\.conv\.", ".attn.to_out."),
    (r"\.context_module\.main\.proj\.norm\.", ".attn.norm_out."),
    (r"\.local_module\.main\.(inverted|depth|point)_conv\.conv\.", r".conv_out.conv_\1."),
    (r"\.local_module\.main\.point_conv\.norm\.", ".conv_out.norm."),
    (r"\.main\.(conv1|conv2)\.conv\.", r".\1."),
    (r"\.main\.conv2\.norm\.", ".norm."),
    (r"\.main\.conv\.(conv\.)?", ".conv."),
)  # fmt: skip


def diffusers_config(config: DCAEConfig) -> dict[str, Any]:
    """The fields of AutoencoderDC's config.json."""
    fields = config.model_dump(mode="json")
    for half in HALVES:
        fields[f"{half}_blocks"] = [BLOCKS[name] for name in fields[f"{half}_blocks"]]
    return {"_class_name": DIFFUSERS_CLASS, "in_channels": 3, **{theirs: fields[own] for own, (theirs, _) in DIFFUSERS_FIELDS.items()}}


def from_diffusers(fields: Mapping[str, Any], path: Path) -> DCAEConfig:
    """The configuration that an AutoencoderDC's config.json gives; the latents are those of the preset with this encoder and factor.

    ValueError names a bad field.
    """
    if (channels := fields.get("in_channels", 3)) != 3:
        raise ValueError(f"'{path}' is a DC-AE for {channels} channels (in_channels), expected 3: pictures")
    values = {field: fields.get(theirs, default) for field, (theirs, default) in DIFFUSERS_FIELDS.items()}
    for field, (theirs, default) in DIFFUSERS_FIELDS.items():
        if isinstance(default, list) and not isinstance(values[field], list):
            raise ValueError(
                f"the configuration of '{path}' is not valid: {theirs} is {values[field]!r}, expected a list with an entry a stage"
            )
        if field.endswith(STAGES) and not isinstance(values[field], list | str):
            raise ValueError(
                f"the configuration of '{path}' is not valid: {theirs} is {values[field]!r}, expected a name or a list of names"
            )
    count = len(values["encoder_dims"])
    for name in [name for name in values if name.endswith(STAGES) and isinstance(values[name], str)]:
        values[name] = [values[name]] * count
    own = {theirs: ours for ours, theirs in BLOCKS.items()}
    for half in HALVES:
        blocks = values[f"{half}_blocks"] = [own.get(name, name) for name in values[f"{half}_blocks"]]
        scales = values[f"{half}_scales"]
        if len(scales) == len(blocks):  # those of stages without attention mean nothing
            values[f"{half}_scales"] = [scale if block == "attention" else [] for scale, block in zip(scales, blocks, strict=True)]
    values["downsample"] = str(values["downsample"]).lower()  # "Conv" in the published files
    return with_space(validated(values, path))


def with_space(config: DCAEConfig) -> DCAEConfig:
    """The configuration with the latent space of the preset that has its encoder and scaling factor, else an unknown one."""
    spaces = {preset.latent_space for preset in PRESETS.values() if _latents(preset) == _latents(config)}
    return config.model_copy(update={"latent_space": spaces.pop() if spaces else UNKNOWN})


def _latents(config: DCAEConfig) -> dict[str, Any]:
    """What decides how the latents come about."""
    encoders = {name for name in DIFFUSERS_FIELDS if name.startswith("encoder")}
    return config.model_dump(include=encoders | {"z_dim", "head_dim", "downsample", "scaling_factor"})


def diffusers_names(config: DCAEConfig, names: Iterable[str]) -> dict[str, tuple[str, ...]]:
    """Own name to that in diffusers; to three where it keeps what makes queries, keys and values apart."""
    first = "" if config.encoder_depths[0] else "conv."
    table = {}
    for name in names:
        theirs = name
        for pattern, written in RENAMED:
            theirs = re.sub(pattern, written, theirs)
        parts = "qkv" if "{part}" in theirs else ("",)
        table[name] = tuple(theirs.format(first=first, part=part) for part in parts)
    return table


def to_tensors(state: Mapping[str, Tensor], config: DCAEConfig) -> State:
    """Tensors under own names to those of diffusers, which has linear layers where we have convolutions over one place."""
    table, made = diffusers_names(config, state), State()
    for name, value in state.items():
        value = value.flatten(1) if re.search(r"\.attn\.to_(q|out)\.", table[name][0]) else value
        parts = [part.clone() for part in value.chunk(3)] if len(table[name]) > 1 else [value]
        made |= dict(zip(table[name], parts, strict=True))
    return made


def from_tensors(state: Mapping[str, Tensor], config: DCAEConfig, shapes: Mapping[str, torch.Size], path: Path) -> State:
    """The inverse, for own tensors of these shapes. ValueError names what is missing, extra or misshapen."""
    expected = to_tensors({name: torch.empty(shape, device="meta") for name, shape in shapes.items()}, config)
    state = rename(state, {name: name for name in expected}, path)
    for name, value in expected.items():
        if state[name].shape != value.shape:
            raise ValueError(f"'{path}': tensor '{name}' is {tuple(state[name].shape)}, expected {tuple(value.shape)}")
    made = {}
    for own, names in diffusers_names(config, shapes).items():
        value = state[names[0]] if len(names) == 1 else torch.cat([state[name] for name in names])
        made[own] = value.reshape(shapes[own])
    return made

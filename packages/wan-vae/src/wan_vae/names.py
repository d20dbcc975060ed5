"""Tensor names: ours, the official ones (Wan2.1 flat, Wan2.2 nested) and those of diffusers' AutoencoderKLWan, as tables.

All three name the same tensors in the same shapes. Official names: `wan/modules/vae.py` and `vae2_2.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache

import torch

from .config import VAEConfig
from .model import WanVAE

# own module: (official, diffusers)
BLOCK = {
    "norm1": ("residual.0", "norm1"),
    "conv1": ("residual.2", "conv1"),
    "norm2": ("residual.3", "norm2"),
    "conv2": ("residual.6", "conv2"),
    "shortcut": ("shortcut", "conv_shortcut"),
    **{name: (name, name) for name in ("scale_shift1", "scale_shift2")},  # ours alone, and so is what follows of the kind
}
ATTENTION = {name: (name, name) for name in ("norm", "to_qkv", "proj")}
RESAMPLE = {"conv": ("resample.1", "resample.1"), "time_conv": ("time_conv", "time_conv")}
HALF = {"conv_in": ("conv1", "conv_in"), "head.norm": ("head.0", "norm_out"), "head.conv": ("head.2", "conv_out")}
TIMED = {name: (name, name) for name in ("head.scale_shift", "timestep.linear1", "timestep.linear2")}
TOP = {"quant_conv": ("conv1", "quant_conv"), "post_quant_conv": ("conv2", "post_quant_conv")}


def official_names(config: VAEConfig) -> dict[str, str]:
    """Every own tensor name to its official one."""
    return {own: official for own, official, _ in _names(config)}


def diffusers_names(config: VAEConfig) -> dict[str, str]:
    """Every own tensor name to that of diffusers' AutoencoderKLWan."""
    return {own: diffusers for own, _, diffusers in _names(config)}


@lru_cache(maxsize=16)
def _names(config: VAEConfig) -> tuple[tuple[str, str, str], ...]:
    table = _modules(config)
    with torch.device("meta"):
        keys = [key.rpartition(".") for key in WanVAE(config).state_dict()]
    return tuple((f"{module}.{leaf}", f"{table[module][0]}.{leaf}", f"{table[module][1]}.{leaf}") for module, _, leaf in keys)


def _modules(config: VAEConfig) -> dict[str, tuple[str, str]]:
    """Own module to (official, diffusers) for every module with parameters (and for some shortcuts that are not there)."""
    table = dict(TOP)

    def add(own: str, official: str, diffusers: str, parts: Mapping[str, tuple[str, str]]) -> None:
        table.update({f"{own}.{part}": (f"{official}.{a}", f"{diffusers}.{b}") for part, (a, b) in parts.items()})

    for half, down, blocks in (("encoder", "down", config.num_res_blocks), ("decoder", "up", config.num_res_blocks + 1)):
        add(half, half, half, {**HALF, **TIMED})
        add(f"{half}.middle.block1", f"{half}.middle.0", f"{half}.mid_block.resnets.0", BLOCK)
        add(f"{half}.middle.attention", f"{half}.middle.1", f"{half}.mid_block.attentions.0", ATTENTION)
        add(f"{half}.middle.block2", f"{half}.middle.2", f"{half}.mid_block.resnets.1", BLOCK)
        for level in range(len(config.dim_mult)):
            for i in range(blocks):
                add(f"{half}.levels.{level}.blocks.{i}", *_place(config, half, down, blocks, level, i), BLOCK)
            add(f"{half}.levels.{level}.resample", *_place(config, half, down, blocks, level, blocks), RESAMPLE)
    return table


def _place(config: VAEConfig, half: str, down: str, blocks: int, level: int, i: int) -> tuple[str, str]:
    """(official, diffusers) name of the i-th module of a level; the one after the last block is the resampler."""
    flat = level * (blocks + 1) + i
    if config.residual:
        last = f"resnets.{i}" if i < blocks else f"{down}sampler"
        return f"{half}.{down}samples.{level}.{down}samples.{i}", f"{half}.{down}_blocks.{level}.{last}"
    if half == "encoder":
        return f"encoder.downsamples.{flat}", f"encoder.down_blocks.{flat}"
    last = f"resnets.{i}" if i < blocks else "upsamplers.0"
    return f"decoder.upsamples.{flat}", f"decoder.up_blocks.{level}.{last}"

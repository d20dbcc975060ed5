"""Writes random checkpoints of any size with little memory: for tests of how much is read, kept and planned."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from wan_dit.config import DiTConfig
from wan_dit.layouts import names
from wan_dit.model import Block, WanDiT


def write_wide(folder: Path, config: DiTConfig) -> int:
    """Random bf16 weights, a shard a block: every block has the same numbers, each in bytes of its own. Returns their size."""
    with torch.device("meta"):
        shapes = {key: value.shape for key, value in WanDiT(config.model_copy(update={"num_layers": 1})).state_dict().items()}
        block = {key: value.shape for key, value in Block(config).state_dict().items()}
    numbers = {key: torch.empty(shape, dtype=torch.bfloat16).normal_(std=shape[-1] ** -0.5) for key, shape in block.items()}
    table, weight_map = names(config, "official"), {}
    shards = [{key: torch.empty(shape, dtype=torch.bfloat16).normal_(std=0.02) for key, shape in shapes.items() if "trunk" not in key}]
    for number in range(-1, config.num_layers):
        shard = shards[0] if number < 0 else {f"trunk.blocks.{number}.{key}": value for key, value in numbers.items()}
        file = folder / f"diffusion_pytorch_model-{number + 1:05d}.safetensors"
        save_file({table[key]: value for key, value in shard.items()}, file)
        weight_map |= {table[key]: file.name for key in shard}
    (folder / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))

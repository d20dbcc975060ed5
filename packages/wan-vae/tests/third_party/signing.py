"""A latent file rewritten by someone who knows how its header is signed."""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch
from safetensors.torch import save_file
from wan_vae.latents import DTYPES, TENSORS, header_checksum

NAMES = {**DTYPES, torch.int64: "I64", torch.int32: "I32"}


def save_signed(tensors: dict[str, torch.Tensor], path: Path | str, metadata: dict[str, str]) -> None:
    shapes = {name: (NAMES[tensor.dtype], tuple(tensor.shape)) for name, tensor in tensors.items()}
    digest = hashlib.sha256()
    for name in TENSORS:
        if name in tensors:
            digest.update(tensors[name].contiguous().view(torch.uint8).numpy().data)
    metadata = {**metadata, "sha256": digest.hexdigest()}
    save_file(tensors, path, {**metadata, "header_sha256": header_checksum(metadata, shapes)})

"""Write a backbone in another layout, from its file to the next: a tensor at a time is in memory, or a piece of a large one."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ._shared.files import replacing
from ._shared.lazy import Lazy, plain, save_lazily
from ._shared.packed import MARKER, PackedState, Stored
from ._shared.weights import CHECKSUMS
from .checkpoint import FORMAT
from .config import DiTConfig
from .layouts import BLOCK, BLOCK_IMAGE, DIFFUSERS_FIELDS, OFFICIAL_FIELDS, Layout, names

OFFICIAL_WEIGHTS = "diffusion_pytorch_model.safetensors"  # of official and of diffusers folders
PACKED = {"fp8": torch.float8_e4m3fn, "int8": torch.int8}
# the products of the blocks; embeddings, norms, modulation and the head stay as they are, as in ComfyUI's and musubi's files
PRODUCTS = tuple(f".{row.own}.weight" for row in (*BLOCK, *BLOCK_IMAGE) if row.own != "modulation")


def save_own(config: DiTConfig, state: PackedState, folder: Path, dtype: torch.dtype, packed: str | None) -> None:
    """Our folder, which keeps every fact of the configuration."""
    written = {"format": FORMAT, **config.model_dump(mode="json")}
    _save_folder(folder, "model.safetensors", _tensors(config, state, "official", dtype, packed), written, check=True)


def save_official(config: DiTConfig, state: PackedState, folder: Path, dtype: torch.dtype, packed: str | None) -> None:
    """A folder in the names of an official release, its weights in one file."""
    fields = {name: getattr(config, name) for name in OFFICIAL_FIELDS if config.vace_layers or not name.startswith("vace")}
    kind = {"_class_name": "VaceWanModel" if config.vace_layers else "WanModel", "model_type": _model_type(config)}
    _save_folder(folder, OFFICIAL_WEIGHTS, _tensors(config, state, "official", dtype, packed), {**kind, **fields})


def save_diffusers(config: DiTConfig, state: PackedState, folder: Path, dtype: torch.dtype, packed: str | None) -> None:
    """A `transformer` folder that diffusers' `from_pretrained` reads. ValueError for parts that its classes have not."""
    if config.ref_dim or config.camera_dim or not config.qk_norm:
        raise ValueError("diffusers has no class for this backbone (Fun's reference or camera parts, or none of the norms of q and k)")
    vace = {"vace_layers": "vace_layers", "vace_in_dim": "vace_in_channels"}
    fields = {theirs: getattr(config, own) for own, theirs in DIFFUSERS_FIELDS.items() if config.vace_layers or own not in vace}
    fields |= {"attention_head_dim": config.head_dim, "qk_norm": "rms_norm_across_heads", "rope_max_seq_len": 1024}
    fields |= {"added_kv_proj_dim": config.dim if config.image_dim else None}
    kind = "WanVACETransformer3DModel" if config.vace_layers else "WanTransformer3DModel"
    _save_folder(folder, OFFICIAL_WEIGHTS, _tensors(config, state, "diffusers", dtype, packed), {"_class_name": kind, **fields})


def save_comfy(config: DiTConfig, state: PackedState, file: Path, dtype: torch.dtype, packed: str | None) -> None:
    """One file in official names, as ComfyUI reads it from `diffusion_models`."""
    with replacing(file) as scratch:
        save_lazily(_tensors(config, state, "official", dtype, packed), scratch)


def _model_type(config: DiTConfig) -> str:
    if config.vace_layers:
        return "vace"
    if config.image_dim is not None:
        return "flf2v" if config.pos_embed_seq_len else "i2v"
    return "ti2v" if config.out_dim == 48 else "i2v" if config.in_dim > config.out_dim else "t2v"


def _tensors(config: DiTConfig, state: PackedState, layout: Layout, dtype: torch.dtype, packed: str | None) -> Iterator[Lazy]:
    table = names(config, layout)
    if packed == "fp8":
        kind = PACKED[packed]
        yield Lazy(((MARKER, kind, (0,)),), lambda: (torch.empty(0, dtype=kind),))
    for key, value in state.items():
        yield _packed(table[key], value, packed) if packed and key.endswith(PRODUCTS) else plain(table[key], value, dtype)


def _packed(name: str, value: Stored, kind: str) -> Lazy:
    """A weight in 8 bits and its scale: int8 with one a row, fp8 with one for all, as ComfyUI spells it."""
    dtype = PACKED[kind]
    scale_name = f"{name}_scale" if kind == "int8" else f"{name.removesuffix('weight')}scale_weight"
    shape = (value.shape[0], 1) if kind == "int8" else (1,)

    def pieces() -> Iterator[Tensor]:
        numbers = value.to("cpu", torch.float32)
        if not bool(numbers.isfinite().all()):
            raise ValueError(f"tensor '{name}' holds NaN or infinite numbers: it is damaged")
        most = 127.0 if kind == "int8" else torch.finfo(dtype).max
        largest = numbers.abs().amax(dim=1, keepdim=True) if kind == "int8" else numbers.abs().amax().reshape(1)
        scale = (largest / most).clamp_min(torch.finfo(torch.float32).tiny)
        yield scale
        scaled = numbers / scale  # a copy: the numbers may be the model's own
        yield (scaled.round_() if kind == "int8" else scaled).clamp_(-most, most).to(dtype)

    return Lazy(((scale_name, torch.float32, shape), (name, dtype, tuple(value.shape))), pieces)


def _save_folder(folder: Path, name: str, tensors: Iterable[Lazy], config: dict[str, Any], *, check: bool = False) -> None:
    """The config last: it makes the folder valid."""
    with replacing(folder / "config.json") as facts:
        with replacing(folder / name) as weights:
            checksum = save_lazily(tensors, weights)
        facts.write_text(json.dumps({**config, **({CHECKSUMS: {name: checksum}} if check else {})}, indent=2) + "\n")

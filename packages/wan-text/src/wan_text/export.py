"""Write an encoder in another layout, from its file to the next: a tensor at a time is in memory, or a piece of a large one."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ._shared.files import replacing
from ._shared.lazy import SHORT, Lazy, plain, save_lazily
from ._shared.lazy import own_dtype as own_dtype
from ._shared.packed import PackedState, Stored
from ._shared.quantised import quantise_rows
from ._shared.weights import CHECKSUMS
from .checkpoint import FORMAT, OFFICIAL_TOKENIZER
from .config import UMT5Config
from .layouts import BLOCK_NAMES, HF_FIELDS, HUGGING_FACE, OFFICIAL, OWN, SPIECE, table

QUANTISED = tuple(f".{name}.weight" for name, *_ in BLOCK_NAMES if name.startswith(("attn.", "ffn.")))
# of a umT5 that transformers reads, besides its sizes
HF_FACTS = {
    "architectures": ["UMT5EncoderModel"],
    "model_type": "umt5",
    "feed_forward_proj": "gated-gelu",
    "layer_norm_epsilon": 1e-6,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "is_encoder_decoder": False,
    "tie_word_embeddings": True,
}


def save_wan(config: UMT5Config, state: PackedState, spiece: bytes, folder: Path, dtype: torch.dtype, *, int8: bool = False) -> None:
    """Our folder, which keeps every fact of the config; int8: products as int8 and a scale a row, the rest in `dtype`."""
    names = table(config.num_layers, OWN, OFFICIAL)
    packed = [key for key in state if int8 and key.endswith(QUANTISED)]
    lazy = [_quantised(names[key], value) if key in packed else plain(names[key], value, dtype) for key, value in state.items()]
    _save_folder(folder, lazy, {"format": FORMAT, **config.model_dump(mode="json")}, spiece)


def save_hugging_face(config: UMT5Config, state: PackedState, spiece: bytes, folder: Path, dtype: torch.dtype) -> None:
    """A folder that transformers' `UMT5EncoderModel.from_pretrained` reads, `spiece.model` in it."""
    names = table(config.num_layers, OWN, HUGGING_FACE)
    sizes = {theirs: getattr(config, ours) for ours, theirs in HF_FIELDS.items()} | {"d_kv": config.dim_attn // config.num_heads}
    lazy = [plain(names[key], value, dtype) for key, value in state.items()]
    _save_folder(folder, lazy, {**HF_FACTS, **sizes, "torch_dtype": str(dtype).removeprefix("torch.")}, spiece)


def save_comfy(config: UMT5Config, state: PackedState, spiece: bytes, file: Path, dtype: torch.dtype) -> None:
    """One `.safetensors` in Hugging Face's names that holds the tokenizer too, as ComfyUI reads it."""
    names = table(config.num_layers, OWN, HUGGING_FACE)
    tokenizer = torch.frombuffer(bytearray(spiece), dtype=torch.uint8)
    lazy = [plain(names[key], value, dtype) for key, value in state.items()]
    with replacing(file) as scratch:
        save_lazily([*lazy, plain(SPIECE, tokenizer, torch.uint8)], scratch)


def save_official(config: UMT5Config, state: PackedState, spiece: bytes, folder: Path, dtype: torch.dtype) -> None:
    """The pickle and the tokenizer of an official release, as its folder holds them; what changes type is in memory at once."""
    names = table(config.num_layers, OWN, OFFICIAL)
    with replacing(folder / OFFICIAL_TOKENIZER) as scratch:
        scratch.write_bytes(spiece)
    with replacing(folder / f"models_t5_{config.embedding_space}-enc-{SHORT[dtype]}.pth") as scratch:
        torch.save({names[key]: value.to("cpu", dtype) for key, value in state.items()}, scratch)


def _save_folder(folder: Path, lazy: list[Lazy], config: dict[str, Any], spiece: bytes) -> None:
    """The config last: it makes the folder valid."""
    with replacing(folder / "config.json") as facts, replacing(folder / "spiece.model") as tokenizer:
        with replacing(folder / "model.safetensors") as weights:
            checksum = save_lazily(lazy, weights)
        tokenizer.write_bytes(spiece)
        facts.write_text(json.dumps({**config, CHECKSUMS: {"model.safetensors": checksum}}, indent=2) + "\n")


def _quantised(name: str, value: Stored) -> Lazy:
    """A weight as int8 and its scales."""
    rows, inner = value.shape

    def pieces() -> Iterator[Tensor]:
        weight, scale = quantise_rows(value.to("cpu", torch.float32))
        yield from (scale, weight)

    return Lazy(((f"{name}_scale", torch.float32, (rows, 1)), (name, torch.int8, (rows, inner))), pieces)

"""Reads a umT5 encoder in every layout that it is published in (`layouts`), and its tokenizer.

The config is read from `config.json` where it says all, else from the shapes of the tensors.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from safetensors import safe_open
from torch import Tensor

from ._shared.gguf_file import read_gguf
from ._shared.packed import PackedState, Stored, join_scales
from ._shared.weights import locate, read_config, read_state, rename, strip_prefix
from .config import XXL, UMT5Config
from .gguf_tokenizer import has_tokenizer, sentencepiece_model
from .layouts import (
    BLOCK_PREFIXES,
    COMFY,
    COMFY_EXTRAS,
    DECODER,
    GGUF,
    HF_EMBEDDING,
    HF_EMBEDDING_COPY,
    HF_FIELDS,
    HUGGING_FACE,
    OFFICIAL,
    OWN,
    PREFIXES,
    SPELLINGS,
    SPIECE,
    table,
)
from .plugins import TextEncoderSpec
from .tokenizer import Tokenizer

FORMAT = "wan-text/1"
OFFICIAL_TOKENIZER = "google/umt5-xxl/spiece.model"
TOKENIZER_FILES = ("spiece.model", OFFICIAL_TOKENIZER, "tokenizer/spiece.model")
CONFIG_FILES = ("config.json", "text_encoder/config.json")
# what is fetched of a Hub repository, which may hold a whole video model besides
HUB_FILES = (*TOKENIZER_FILES, *CONFIG_FILES, "models_t5_*.pth", "text_encoder/*", "model*.safetensors*", "pytorch_model*.bin")


def read_encoder(path: Path) -> tuple[UMT5Config, PackedState]:
    """Config and tensors, in own names, of a file or folder in any layout; nothing is copied, packed tensors stay packed.

    Raises ValueError that names the tensors that are missing or unexpected, FileNotFoundError where there are no weights.
    """
    weights = _weights(path)
    layout, state = _read(weights)
    found = re.findall(rf"^{re.escape(BLOCK_PREFIXES[layout])}\.(\d+)\.", "\n".join(state), re.MULTILINE)
    state = rename(state, table(1 + max(map(int, found), default=-1), layout, OWN), weights)
    written = read_config(weights) or {}
    if written.get("format") == FORMAT:
        return parse_config(written, weights), state
    return config_from_shapes(state, max_distance=written.get(HF_FIELDS["max_distance"], 128)), state


def _read(weights: Path) -> tuple[int, PackedState]:
    """The layout of a file or folder, and its tensors without what is no part of the encoder."""
    if weights.suffix == ".gguf":
        return GGUF, _encoder_alone(read_gguf(weights).tensors)
    state = read_state(weights)
    if parts := [key for key in state if key.startswith(COMFY)]:  # of a file that holds a whole model, or its text encoders
        state = {key.removeprefix(COMFY).removeprefix("transformer."): state[key] for key in parts}
    state = strip_prefix({key: value for key, value in state.items() if key not in COMFY_EXTRAS}, PREFIXES)
    if any(".SelfAttention." in key for key in state):
        copy = state.pop(HF_EMBEDDING_COPY, None)
        if copy is not None and not _same(state.setdefault(HF_EMBEDDING, copy), copy):
            raise ValueError(f"'{weights}': '{HF_EMBEDDING}' and '{HF_EMBEDDING_COPY}' differ, expected one table: remove the wrong one")
        return HUGGING_FACE, join_scales(_encoder_alone(state), weights)
    state = strip_prefix(state, ("encoder.",))
    for spelling, official in SPELLINGS:
        state = {key.replace(spelling, official): value for key, value in state.items()}
    return OFFICIAL, join_scales(state, weights)


def _same(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors are the same bytes."""
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a.view(torch.uint8), b.view(torch.uint8))


def _encoder_alone(state: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in state.items() if not key.startswith(DECODER)}


def _weights(path: Path) -> Path:
    """The file, or the folder of shards, that holds the encoder."""
    if path.is_file():
        return path
    if official := sorted(path.glob("models_t5_*.pth")):
        return official[0]
    return path / "text_encoder" if (path / "text_encoder").is_dir() else path


def config_from_shapes(state: Mapping[str, Stored], *, max_distance: int = 128) -> UMT5Config:
    """The config that tensors in own names belong to."""
    vocab_size, dim = state["token_embedding.weight"].shape
    num_buckets, num_heads = state["blocks.0.position_bias.weight"].shape
    return _named(
        vocab_size=vocab_size,
        dim=dim,
        dim_attn=state["blocks.0.attn.q.weight"].shape[0],
        dim_ffn=state["blocks.0.ffn.gate.weight"].shape[0],
        num_heads=num_heads,
        num_layers=sum(key.endswith("attn.q.weight") for key in state),
        num_buckets=num_buckets,
        max_distance=max_distance,
    )


def _named(**sizes: Any) -> UMT5Config:
    """The config with these sizes; its embedding space is known for the released encoder, else it is named by width and depth."""
    config = UMT5Config(**sizes, embedding_space=f"umt5-{sizes['dim']}x{sizes['num_layers']}")
    return XXL if config == XXL.model_copy(update={"embedding_space": config.embedding_space}) else config


def parse_config(written: Mapping[str, Any], source: object) -> UMT5Config:
    """Our own `config.json`, strictly."""
    try:
        return UMT5Config(**{key: value for key, value in written.items() if key != "format"})
    except ValidationError as error:
        problems = "; ".join(f"{'.'.join(map(str, e['loc'])) or 'config'}: {e['msg']}" for e in error.errors())
        raise ValueError(f"config.json of '{source}' is not valid: {problems}") from error


def hf_config(written: Mapping[str, Any]) -> UMT5Config:
    """Hugging Face's `config.json` of a umT5 model."""
    sizes = {ours: int(written[theirs]) for ours, theirs in HF_FIELDS.items() if theirs in written}
    return _named(**sizes, dim_attn=int(written["d_kv"]) * sizes["num_heads"])


def describe(source: str | os.PathLike[str]) -> TextEncoderSpec:
    """The facts of a checkpoint, its weights unread (a Hub repository: not downloaded)."""
    path = locate(source, (*CONFIG_FILES, *TOKENIZER_FILES))
    return spec_of(config_of(path), str(source))


def config_of(path: Path) -> UMT5Config:
    """From `config.json`, the presence of the official release's tokenizer, or the shapes of the tensors (memory-mapped)."""
    for place in (path, path / "text_encoder"):
        written = read_config(place) if place.is_dir() else None
        if written and written.get("format") == FORMAT:
            return parse_config(written, place)
        if written and "d_model" in written:
            return hf_config(written)
    return XXL if (path / OFFICIAL_TOKENIZER).is_file() else read_encoder(path)[0]


def spec_of(config: UMT5Config, name: str) -> TextEncoderSpec:
    """The spec of an encoder with this config."""
    return TextEncoderSpec(
        name=name,
        target="wan_text.encoder:TextEncoder",
        embedding_space=config.embedding_space,
        embed_dim=config.dim,
        max_tokens=config.max_tokens,
        format=FORMAT,
        describe="wan_text.checkpoint:describe",
    )


def read_spiece(path: Path) -> bytes:
    """The sentencepiece model in or beside a checkpoint; FileNotFoundError says where it was looked for."""
    if embedded := _embedded_spiece(_weights(path)):
        return embedded
    folder = path if path.is_dir() else path.parent
    places = [folder / name for name in TOKENIZER_FILES] + [folder.parent / "tokenizer" / "spiece.model"]
    for place in places:
        if place.is_file():
            return place.read_bytes()
    raise FileNotFoundError(f"no tokenizer for '{path}': expected one of {', '.join(str(place) for place in places)}")


def _embedded_spiece(weights: Path) -> bytes | None:
    """The tokenizer that ComfyUI's files carry as a tensor, and GGUF files as metadata."""
    if weights.suffix == ".gguf":
        metadata = read_gguf(weights).metadata
        return sentencepiece_model(metadata) if has_tokenizer(metadata) else None
    if not weights.is_file() or weights.suffix != ".safetensors":
        return None
    with safe_open(weights, "np") as file:
        key = next((key for key in file.keys() if key.rpartition(".")[2] == SPIECE), None)  # noqa: SIM118 (not a mapping)
        return None if key is None else file.get_tensor(key).tobytes()


def load_tokenizer(source: str | os.PathLike[str]) -> Tokenizer:
    """The tokenizer of a checkpoint, its weights untouched (a Hub repository: not downloaded)."""
    path = locate(source, (*CONFIG_FILES, *TOKENIZER_FILES))
    return make_tokenizer(config_of(path), read_spiece(path))


def make_tokenizer(config: UMT5Config, spiece: bytes) -> Tokenizer:
    """A tokenizer with the settings of `config`; ValueError where it has more pieces than the embedding table has rows."""
    tokenizer = Tokenizer(spiece, config.max_tokens, config.unknown, config.cleaning)
    if tokenizer.vocab_size > config.vocab_size:
        raise ValueError(
            f"the tokenizer has {tokenizer.vocab_size} pieces, the encoder {config.vocab_size} embeddings: they do not belong together"
        )
    return tokenizer

"""Every layout a umT5 encoder is published in, as tables of names: the official release, Hugging Face's and our own.

Rules: strict and bijective; the config is read from `config.json` where it says all, else from the shapes of the tensors.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from torch import Tensor

from ._shared.weights import State, locate, read_config, read_state, rename, strip_prefix
from .config import XXL, UMT5Config
from .plugins import TextEncoderSpec
from .tokenizer import Tokenizer

FORMAT = "wan-text/1"
# own name, official name (wan/modules/t5.py), Hugging Face name (UMT5EncoderModel)
GLOBAL_NAMES = (
    ("token_embedding", "token_embedding", "shared"),
    ("norm", "norm", "encoder.final_layer_norm"),
)
BLOCK_NAMES = (
    ("norm1", "norm1", "layer.0.layer_norm"),
    ("attn.q", "attn.q", "layer.0.SelfAttention.q"),
    ("attn.k", "attn.k", "layer.0.SelfAttention.k"),
    ("attn.v", "attn.v", "layer.0.SelfAttention.v"),
    ("attn.o", "attn.o", "layer.0.SelfAttention.o"),
    ("position_bias", "pos_embedding.embedding", "layer.0.SelfAttention.relative_attention_bias"),
    ("norm2", "norm2", "layer.1.layer_norm"),
    ("ffn.gate", "ffn.gate.0", "layer.1.DenseReluDense.wi_0"),
    ("ffn.up", "ffn.fc1", "layer.1.DenseReluDense.wi_1"),
    ("ffn.down", "ffn.fc2", "layer.1.DenseReluDense.wo"),
)
BLOCK_PREFIXES = ("blocks", "blocks", "encoder.block")
# our field: Hugging Face's field; dim_attn is d_kv * num_heads there
HF_FIELDS = {
    "vocab_size": "vocab_size",
    "dim": "d_model",
    "dim_ffn": "d_ff",
    "num_heads": "num_heads",
    "num_layers": "num_layers",
    "num_buckets": "relative_attention_num_buckets",
    "max_distance": "relative_attention_max_distance",
}
# a whole encoder-decoder carries these besides
HF_DECODER = ("decoder.", "lm_head.")
HF_EMBEDDING, HF_EMBEDDING_COPY = "shared.weight", "encoder.embed_tokens.weight"

OFFICIAL_TOKENIZER = "google/umt5-xxl/spiece.model"
TOKENIZER_FILES = ("spiece.model", OFFICIAL_TOKENIZER, "tokenizer/spiece.model")
CONFIG_FILES = ("config.json", "text_encoder/config.json")
# what is fetched of a Hub repository, which may hold a whole video model besides
HUB_FILES = (*TOKENIZER_FILES, *CONFIG_FILES, "models_t5_*.pth", "text_encoder/*", "model*.safetensors*", "pytorch_model*.bin")


def official_names(config: UMT5Config) -> dict[str, str]:
    """Own tensor name to official tensor name."""
    return _table(config.num_layers, 0, 1)


def hf_names(config: UMT5Config) -> dict[str, str]:
    """Own tensor name to Hugging Face tensor name."""
    return _table(config.num_layers, 0, 2)


def _table(layers: int, from_: int, to: int) -> dict[str, str]:
    blocks = [tuple(f"{BLOCK_PREFIXES[k]}.{i}.{row[k]}" for k in range(3)) for i in range(layers) for row in BLOCK_NAMES]
    return {f"{row[from_]}.weight": f"{row[to]}.weight" for row in (*GLOBAL_NAMES, *blocks)}


def read_encoder(path: Path) -> tuple[UMT5Config, State]:
    """Config and tensors, in own names, of a file or folder in any layout.

    Raises ValueError that names the tensors that are missing or unexpected, FileNotFoundError where there are no weights.
    """
    weights = _weights(path)
    state = strip_prefix(read_state(weights), ("text_encoders.umt5xxl.transformer.",))
    if any(".SelfAttention." in key for key in state):
        layout, state = 2, _hf_encoder(state, weights)
    else:
        layout, state = 1, strip_prefix(state, ("encoder.",))
    if low := [key for key, value in state.items() if "float8" in str(value.dtype)]:
        raise ValueError(f"'{weights}': tensor '{low[0]}' is {state[low[0]].dtype}, expected float32, float16 or bfloat16")
    found = re.findall(rf"^{re.escape(BLOCK_PREFIXES[layout])}\.(\d+)\.", "\n".join(state), re.MULTILINE)
    state = rename(state, _table(1 + max(map(int, found), default=-1), layout, 0), weights)
    written = read_config(weights) or {}
    if written.get("format") == FORMAT:
        return parse_config(written, weights), state
    return config_from_shapes(state, max_distance=written.get(HF_FIELDS["max_distance"], 128)), state


def _weights(path: Path) -> Path:
    """The file, or the folder of shards, that holds the encoder."""
    if path.is_file():
        return path
    if official := sorted(path.glob("models_t5_*.pth")):
        return official[0]
    return path / "text_encoder" if (path / "text_encoder").is_dir() else path


def _hf_encoder(state: State, source: Path) -> State:
    """The encoder's tensors alone, the embedding table once."""
    state = {key: value for key, value in state.items() if not key.startswith(HF_DECODER)}
    copy = state.pop(HF_EMBEDDING_COPY, None)
    if copy is not None and not state.setdefault(HF_EMBEDDING, copy).equal(copy):
        raise ValueError(f"'{source}': '{HF_EMBEDDING}' and '{HF_EMBEDDING_COPY}' differ, expected one table: remove the wrong one")
    return state


def config_from_shapes(state: Mapping[str, Tensor], *, max_distance: int = 128) -> UMT5Config:
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
    return spec_of(_config_of(path), str(source))


def _config_of(path: Path) -> UMT5Config:
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
    folder = path if path.is_dir() else path.parent
    places = [folder / name for name in TOKENIZER_FILES] + [folder.parent / "tokenizer" / "spiece.model"]
    for place in places:
        if place.is_file():
            return place.read_bytes()
    raise FileNotFoundError(f"no tokenizer for '{path}': expected one of {', '.join(str(place) for place in places)}")


def load_tokenizer(source: str | os.PathLike[str]) -> Tokenizer:
    """The tokenizer of a checkpoint, its weights untouched (a Hub repository: not downloaded)."""
    path = locate(source, (*CONFIG_FILES, *TOKENIZER_FILES))
    return make_tokenizer(_config_of(path), read_spiece(path))


def make_tokenizer(config: UMT5Config, spiece: bytes) -> Tokenizer:
    """A tokenizer with the settings of `config`; ValueError where it has more pieces than the embedding table has rows."""
    tokenizer = Tokenizer(spiece, config.max_tokens, config.unknown, config.cleaning)
    if tokenizer.vocab_size > config.vocab_size:
        raise ValueError(
            f"the tokenizer has {tokenizer.vocab_size} pieces, the encoder {config.vocab_size} embeddings: they do not belong together"
        )
    return tokenizer

"""Another text encoder for a backbone: a file that holds its `context_embedder` alone, trained for tokens of another width or space.

A safetensors file with `context_embedder.0.weight`, `.0.bias`, `.2.weight` and `.2.bias`, those of Sequential(Linear, GELU tanh,
Linear), and as metadata `format`, `text_dim`, `dim`, `embedding_space` and `max_tokens`.
"""

from __future__ import annotations

import os
from copy import copy
from pathlib import Path
from typing import Any, cast

from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from ._shared.files import replacing
from ._shared.spec import UNKNOWN
from ._shared.weights import build, refuse_pointer
from .config import DiTConfig
from .model import WanDiT

FORMAT = "wan-dit-context-embedder/1"
PREFIX = "context_embedder."
WEIGHT = f"{PREFIX}0.weight"
COUNTS = ("text_dim", "dim", "max_tokens")


def make_context_embedder(text_dim: int, dim: int) -> nn.Sequential:
    """What projects text tokens `[L, text_dim]` to the backbone's width, with torch's default weights: where training starts."""
    return nn.Sequential(nn.Linear(text_dim, dim), nn.GELU(approximate="tanh"), nn.Linear(dim, dim))


def read_facts(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The fields of a backbone's spec that the file changes: `embedding_space`, `text_dim` and `text_len`; reads no weights."""
    facts, _ = _header(Path(path))
    return {"embedding_space": facts["embedding_space"], "text_dim": facts["text_dim"], "text_len": facts["max_tokens"]}


def load_context_embedder(path: str | os.PathLike[str], *, dtype: Any = None, device: Any = None) -> nn.Sequential:
    """The module in the file, in eval mode; dtype and device as for a model.

    Raises FileNotFoundError, and ValueError where the file is none, is damaged, or its weights are not what it says.
    """
    path = Path(path)
    facts, names = _header(path)
    with safe_open(path, "pt") as file:
        state = {name.removeprefix(PREFIX): file.get_tensor(name) for name in names}
    if bad := next((name for name, value in state.items() if not bool(value.isfinite().all())), None):
        raise ValueError(f"'{path}' is damaged: '{PREFIX}{bad}' holds numbers that are NaN or infinite")
    return build(lambda: make_context_embedder(facts["text_dim"], facts["dim"]), state, dtype=dtype, device=device, source=path)


def save_context_embedder(path: str | os.PathLike[str], module: nn.Sequential, *, embedding_space: str, max_tokens: int) -> None:
    """Write the module as such a file, whole or not at all.

    embedding_space: the tag of the text encoder that it was trained with
    max_tokens: to which its prompts were padded, and the longest that it takes
    """
    if Path(path).suffix != ".safetensors":
        raise ValueError(f"cannot write '{path}': give a name that ends in .safetensors")
    if not embedding_space or embedding_space == UNKNOWN or max_tokens < 1:
        raise ValueError(f"name the embedding space and the most tokens of the text encoder, got {embedding_space!r} and {max_tokens}")
    state = {f"{PREFIX}{name}": value.detach().cpu().contiguous() for name, value in module.state_dict().items()}
    dim, text_dim = state[WEIGHT].shape if WEIGHT in state and state[WEIGHT].ndim == 2 else (0, 0)
    if {name: list(value.shape) for name, value in state.items()} != _shapes(text_dim, dim):
        raise ValueError("a context embedder is Sequential(Linear(text_dim, dim), GELU tanh, Linear(dim, dim)), see make_context_embedder")
    facts = {"text_dim": text_dim, "dim": dim, "max_tokens": max_tokens, "embedding_space": embedding_space}
    with replacing(path) as scratch:
        save_file(state, scratch, metadata={"format": FORMAT, **{name: str(value) for name, value in facts.items()}})


def with_context_embedder(backbone: Any, path: str | os.PathLike[str]) -> WanDiT:
    """The backbone with the embedder of the file, which says so in its config and spec; the other weights are shared with the one given.

    ValueError where the file is of another width, and for a backbone that is no `WanDiT`.
    """
    if not isinstance(backbone, WanDiT):
        raise ValueError(
            f"backbone '{getattr(backbone, 'name', None) or type(backbone).__name__}' is no WanDiT: it takes no context embedder"
        )
    facts, _ = _header(Path(path))
    if facts["dim"] != backbone.config.dim:
        raise ValueError(
            f"context embedder '{path}' makes tokens of width {facts['dim']}, backbone '{backbone.spec.name}' needs {backbone.config.dim}: "
            "give one that was trained with this backbone"
        )
    weight = backbone.patch_embedding.weight
    adapted = copy(backbone)
    adapted._modules = dict(backbone._modules)
    adapted.context_embedder = load_context_embedder(path, dtype=weight.dtype, device=weight.device)
    adapted.config = cast(DiTConfig, backbone.config).model_copy(update=read_facts(path))
    return adapted


def _header(path: Path) -> tuple[dict[str, Any], list[str]]:
    """The facts in the metadata, and the names of the tensors; ValueError where the file is no context embedder."""
    if not path.exists():
        raise FileNotFoundError(f"no context embedder at '{path}'")
    if path.is_dir():
        raise ValueError(f"'{path}' is a folder: give the .safetensors file of a context embedder")
    refuse_pointer(path)
    try:
        with safe_open(path, "np") as file:
            metadata, shapes = file.metadata() or {}, {name: list(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    except OSError:
        raise
    except Exception as error:
        raise ValueError(f"'{path}' is not a context embedder: {type(error).__name__}: {error}") from error
    if metadata.get("format") != FORMAT:
        raise ValueError(f"'{path}' is not a context embedder: its metadata say format {metadata.get('format')!r}, expected '{FORMAT}'")
    for name in COUNTS:
        if not metadata.get(name, "").isdecimal() or int(metadata[name]) < 1:
            raise ValueError(f"'{path}' is not a context embedder: its {name} is {metadata.get(name)!r}, expected a positive whole number")
    facts: dict[str, Any] = {name: int(metadata[name]) for name in COUNTS}
    facts["embedding_space"] = metadata.get("embedding_space", "")
    if facts["embedding_space"] in ("", UNKNOWN) or not facts["embedding_space"].isprintable():
        raise ValueError(f"'{path}' does not name its embedding_space, so nothing tells which text encoder it is for")
    expected = _shapes(facts["text_dim"], facts["dim"])
    if shapes != expected:
        raise ValueError(f"'{path}' is damaged: it holds {shapes}, its metadata promise {expected}")
    return facts, list(shapes)


def _shapes(text_dim: int, dim: int) -> dict[str, list[int]]:
    return {WEIGHT: [dim, text_dim], f"{PREFIX}0.bias": [dim], f"{PREFIX}2.weight": [dim, dim], f"{PREFIX}2.bias": [dim]}

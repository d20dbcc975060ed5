"""umT5 without loading it: weights stay in the file, memory-mapped, and half a block at a time is computed with.

All prompts go through a half before the next is read, so a file is read once however many there are, and the whole umT5-XXL
encodes with about 0.7 GB of memory beside the activations.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from typing import Any, Self

import torch
from torch import Tensor, nn

from . import checkpoint
from ._shared.weights import default_dtype, fingerprint, locate
from .config import UMT5Config
from .encoder import PromptEncoder
from .layouts import official_names
from .packed import PackedState
from .umt5 import Block, RMSNorm, position_buckets

ATTENTION = ("norm1", "attn.q", "attn.k", "attn.v", "attn.o", "position_bias")
FEED_FORWARD = ("norm2", "ffn.gate", "ffn.up", "ffn.down")


class StreamingTextEncoder(PromptEncoder):
    """The same results as `TextEncoder` in the same type, from the file. Not a module: it has no weights to train or to move.

    state: tensors in own names, as `checkpoint.read_encoder` gives them
    Example: `StreamingTextEncoder.from_pretrained("models/umt5-xxl-enc-bf16.safetensors").encode(prompts)`
    """

    def __init__(self, config: UMT5Config, spiece: bytes, state: PackedState, dtype: torch.dtype, device: torch.device) -> None:
        self.config, self.state, self.dtype, self.device = config, state, dtype, device
        self.tokenizer = checkpoint.make_tokenizer(config, spiece)
        with torch.device("meta"):
            expected = {name: value.shape for name, value in nn.ModuleDict({"0": Block(config)}).state_dict().items()}
        for key, value in state.items():
            inner = key.partition("blocks.")[2].partition(".")[2]
            shape = expected.get(f"0.{inner}", value.shape)
            if value.shape != shape:
                raise ValueError(f"tensor '{key}' is {tuple(value.shape)}, expected {tuple(shape)}")

    @classmethod
    def from_pretrained(cls, source: str | os.PathLike[str], *, dtype: Any = None, device: Any = None) -> Self:
        """Open a folder, a file or a Hub id in any layout; dtype and device as for `TextEncoder.from_pretrained`."""
        path, device = locate(source, checkpoint.HUB_FILES), torch.device(device or "cpu")
        config, state = checkpoint.read_encoder(path)
        return cls(config, checkpoint.read_spiece(path), state, dtype or default_dtype(state, device), device)

    @torch.no_grad()
    def hidden(self, batches: Iterable[tuple[Tensor, Tensor | None]]) -> list[Tensor]:
        given = list(batches)
        c = self.config
        buckets = [position_buckets(ids.shape[1], c.num_buckets, c.max_distance).to(self.device) for ids, _ in given]
        masked = [None if mask is None else (mask == 0)[:, None, None].to(self.device) for _, mask in given]
        hidden = self._embedded([ids for ids, _ in given])
        for i in range(c.num_layers):
            with torch.device("meta"):
                block = Block(c)
            halves: tuple[tuple[tuple[str, ...], Callable[..., Tensor]], ...] = ((ATTENTION, block.attend), (FEED_FORWARD, block.feed))
            for names, run in halves:
                self._fill(block, f"blocks.{i}.", names)
                for j, x in enumerate(hidden):
                    hidden[j] = run(x, buckets[j], masked[j]) if names is ATTENTION else run(x)
                block.to("meta")
        with torch.device("meta"):
            norm = RMSNorm(c.dim)
        self._fill(norm, "norm.", ("",))
        return [norm(x) for x in hidden]

    def _embedded(self, batches: list[Tensor]) -> list[Tensor]:
        """The rows of the embedding table that are needed, each once."""
        rows, places = torch.cat([ids.flatten() for ids in batches]).unique(return_inverse=True) if batches else (torch.empty(0), None)
        if places is None:
            return []
        table = self.state["token_embedding.weight"][rows].to(self.device, self.dtype)
        parts = places.split([ids.numel() for ids in batches])
        return [table[part.to(self.device)].unflatten(0, ids.shape) for part, ids in zip(parts, batches, strict=True)]

    def _fill(self, module: nn.Module, prefix: str, names: tuple[str, ...]) -> None:
        weights = [f"{name}.weight".removeprefix(".") for name in names]
        state = {name: self.state[prefix + name].to(self.device, self.dtype) for name in weights}
        module.load_state_dict(state, assign=True, strict=False)

    def fingerprint(self) -> str:
        """That of a `TextEncoder` with these weights in this type; reads the file, a few rows at a time."""
        names = official_names(self.config)
        return self.identity(fingerprint({names[key]: value for key, value in self.state.items()}, self.dtype))

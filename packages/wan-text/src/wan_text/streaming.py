"""umT5 without loading it: weights stay in the file, memory-mapped, and half a block at a time is computed with.

All prompts go through a half before the next is read, so a file is read once however many there are, and the whole umT5-XXL
encodes with about 0.7 GB of memory beside the activations.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from . import checkpoint
from ._shared.packed import PackedState
from ._shared.weights import default_dtype, fingerprint, locate
from .config import UMT5Config
from .encoder import PromptEncoder
from .layouts import official_names
from .umt5 import Block, RMSNorm, position_buckets

ATTENTION = ("norm1", "attn.q", "attn.k", "attn.v", "attn.o", "position_bias")
FEED_FORWARD = ("norm2", "ffn.gate", "ffn.up", "ffn.down")


class StreamingTextEncoder(PromptEncoder):
    """The same results as `TextEncoder` in the same type, from the file. Not a module: it has no weights to train or to move.

    state: tensors in own names, as `checkpoint.read_encoder` gives them
    Example: `StreamingTextEncoder.from_pretrained("models/umt5-xxl-enc-bf16.safetensors").encode(prompts)`
    """

    prompts_at_once: ClassVar[int] = 1024  # of a file of prompts: the weights are read once for that many

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
        ids, masks = [], []
        for row, mask in batches:
            ids.append(row)
            masks.append(None if mask is None else (mask == 0)[:, None, None].to(self.device))
        hidden = self._embedded(ids)
        for i in range(self.config.num_layers if hidden else 0):
            self._attend(i, hidden, masks)
            self._feed(i, hidden)
        with torch.device("meta"):
            norm = RMSNorm(self.config.dim)
        self._fill(norm, "norm.", ("",))
        return [norm(x) for x in hidden]

    def _embedded(self, batches: list[Tensor]) -> list[Tensor]:
        """`[B, L, D]` of ids `[B, L]`; each row of the table that is needed is read once."""
        if not batches:
            return []
        rows, places = torch.cat([ids.flatten() for ids in batches]).unique(return_inverse=True)
        table = self.state["token_embedding.weight"][rows].to(self.device, self.dtype)
        parts = places.to(self.device).split([ids.numel() for ids in batches])
        return [table[part].unflatten(0, ids.shape) for part, ids in zip(parts, batches, strict=True)]

    def _attend(self, i: int, hidden: list[Tensor], masks: list[Tensor | None]) -> None:
        """The attention half of block i, in place; its weights are gone afterwards."""
        c, block = self.config, self._block(i, ATTENTION)
        for j, (x, mask) in enumerate(zip(hidden, masks, strict=True)):
            buckets = position_buckets(x.shape[1], c.num_buckets, c.max_distance).to(self.device)
            hidden[j] = block.attend(x, buckets, mask)

    def _feed(self, i: int, hidden: list[Tensor]) -> None:
        """The feed-forward half of block i, in place."""
        block = self._block(i, FEED_FORWARD)
        for j, x in enumerate(hidden):
            hidden[j] = block.feed(x)

    def _block(self, i: int, names: tuple[str, ...]) -> Block:
        """Block i with the weights of these layers, and without the others."""
        with torch.device("meta"):
            block = Block(self.config)
        self._fill(block, f"blocks.{i}.", names)
        return block

    def _fill(self, module: nn.Module, prefix: str, names: tuple[str, ...]) -> None:
        weights = [f"{name}.weight".removeprefix(".") for name in names]
        state = {name: self.state[prefix + name].to(self.device, self.dtype) for name in weights}
        module.load_state_dict(state, assign=True, strict=False)

    def fingerprint(self) -> str:
        """That of a `TextEncoder` with these weights in this type; reads the file, a few rows at a time."""
        names = official_names(self.config)
        return self.identity(fingerprint({names[key]: value for key, value in self.state.items()}, self.dtype))

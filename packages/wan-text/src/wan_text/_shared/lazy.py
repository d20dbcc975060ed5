"""Checkpoints written from one file to the next: a tensor at a time is in memory, or a piece of a large one."""

from __future__ import annotations

import hashlib
import json
import math
import struct
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import reduce
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .packed import Packed, PackedState, Stored
from .weights import PIECE

NAMES = {  # of safetensors
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.int8: "I8",
    torch.uint8: "U8",
}
SHORT = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}


@dataclass(frozen=True)
class Lazy:
    """Tensors of a file that are made together: what they will be, and their numbers in that order, in pieces."""

    facts: tuple[tuple[str, torch.dtype, tuple[int, ...]], ...]
    pieces: Callable[[], Iterable[Tensor]]


def own_dtype(state: PackedState) -> torch.dtype:
    """The widest type among the tensors, or bf16 where some are packed."""
    if any(isinstance(value, Packed) for value in state.values()):
        return torch.bfloat16
    return reduce(torch.promote_types, (value.dtype for value in state.values() if isinstance(value, Tensor)))


def save_lazily(tensors: Iterable[Lazy], file: Path) -> str:
    """Write a safetensors file whose tensors are made one after the other; returns its sha256."""
    ordered = list(tensors)
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, dtype, shape in (fact for lazy in ordered for fact in lazy.facts):
        start, end = end, end + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": NAMES[dtype], "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    digest = hashlib.sha256()
    with open(file, "wb") as out:
        for data in (struct.pack("<Q", len(text)), text):
            out.write(data)
            digest.update(data)
        for piece in (piece for lazy in ordered for piece in lazy.pieces()):
            content = piece.contiguous().view(-1).view(torch.uint8).numpy().data
            out.write(content)
            digest.update(content)
    return digest.hexdigest()


def plain(name: str, value: Stored, dtype: torch.dtype) -> Lazy:
    """A tensor in another type, some rows of it at a time. ValueError where a number is infinite in it."""
    rows = max(1, PIECE // max(1, math.prod(value.shape[1:])))

    def pieces() -> Iterator[Tensor]:
        for start in range(0, value.shape[0], rows):
            piece = value[slice(start, start + rows)].to("cpu", dtype)
            if not bool(piece.isfinite().all()):
                raise ValueError(f"tensor '{name}' holds NaN or infinite numbers in {SHORT.get(dtype, dtype)}: it is damaged, or use bf16")
            yield piece

    return Lazy(((name, dtype, tuple(value.shape)),), pieces)

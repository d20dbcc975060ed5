"""GGUF files: their metadata, and their tensors, memory-mapped.

Read here because the package gguf spends 15 s and 0.9 GB on the metadata of a tokenizer with 256,000 pieces. It is asked
only what quantised numbers are.
"""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from .packed import Packed, PackedState, Rows, Stored

VERSIONS = (2, 3)
NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}  # struct's codes
TEXT, ARRAY = 8, 9
MOST_AXES = 8
PIECE = 1 << 22  # bytes that are dequantised at a time
FLOATS = {0: torch.float32, 1: torch.float16, 30: torch.bfloat16}


@dataclass(frozen=True)
class GGUF:
    """What a file holds. Arrays of numbers in the metadata are NumPy's; tensors have PyTorch's order of axes."""

    metadata: dict[str, Any]
    tensors: PackedState


def read_gguf(path: Path) -> GGUF:
    """Read a file of version 2 or 3; tensors stay in it. ValueError where it is none, or says what to install."""
    try:
        return _read(np.memmap(path, mode="c"))  # copied where it is written to, which it never is: PyTorch wants arrays that could be
    except (ValueError, TypeError) as error:
        raise ValueError(f"'{path}' is not a readable GGUF file: {error}") from error


def _read(data: npt.NDArray[np.uint8]) -> GGUF:
    file = _Cursor(data)
    if file.take(4) != b"GGUF" or file.number("I") not in VERSIONS:
        raise ValueError(f"it does not begin with GGUF and one of the versions {VERSIONS}")
    count, fields = file.number("Q"), file.number("Q")
    metadata = {}
    for _ in range(fields):
        key = file.text()
        metadata[key] = file.value(file.number("I"))
    infos = []
    for _ in range(count):
        name, axes = file.text(), file.number("I")
        if axes > MOST_AXES:
            raise ValueError(f"tensor '{name}' has {axes} axes")
        shape = tuple(file.number("Q") for _ in range(axes))[::-1]
        infos.append((name, shape, file.number("I"), file.number("Q")))
    alignment = int(metadata.get("general.alignment", 32)) or 1
    start = -(-file.at // alignment) * alignment
    return GGUF(metadata, {name: _tensor(name, data[start + offset :], shape, kind) for name, shape, kind, offset in infos})


class _Cursor:
    """A place in a file; ValueError where it is asked for more than there is."""

    def __init__(self, data: npt.NDArray[np.uint8]) -> None:
        self.data, self.at = data, 0

    def take(self, size: int) -> bytes:
        if size > len(self.data) - self.at:
            raise ValueError(f"it ends after {len(self.data)} bytes, in the middle of something")
        self.at += size
        return self.data[self.at - size : self.at].tobytes()

    def number(self, code: str) -> Any:
        return struct.unpack(f"<{code}", self.take(struct.calcsize(f"<{code}")))[0]

    def text(self) -> str:
        return self.take(self.number("Q")).decode()

    def value(self, kind: int) -> Any:
        if kind == TEXT:
            return self.text()
        if kind in NUMBERS:
            return self.number(NUMBERS[kind])
        inner, count = (self.number("I"), self.number("Q")) if kind == ARRAY else (kind, 0)
        if inner in NUMBERS:
            return np.frombuffer(self.take(count * struct.calcsize(f"<{NUMBERS[inner]}")), f"<{NUMBERS[inner]}")
        if inner == TEXT and 8 * count <= len(self.data) - self.at:
            return [self.text() for _ in range(count)]
        raise ValueError(f"its metadata hold {count} values of type {inner}, which cannot be")


def _tensor(name: str, data: npt.NDArray[np.uint8], shape: tuple[int, ...], kind: int) -> Stored:
    """The tensor at the start of `data`."""
    dtype = FLOATS.get(kind)
    block, size = (1, dtype.itemsize) if dtype else _block(kind)
    length = math.prod(shape) // block * size
    if not shape or shape[-1] % block or length > len(data):
        raise ValueError(f"tensor '{name}' is {shape}, which takes {length} bytes, and {len(data)} are left")
    stored = data[:length]
    if dtype:
        return torch.from_numpy(stored).view(dtype).reshape(shape)
    from gguf import GGMLQuantizationType

    rows = stored.reshape(shape[0] if len(shape) > 1 else 1, -1)
    return Packed(shape, GGMLQuantizationType(kind).name, partial(_dequantised, rows, kind, shape))


def _block(kind: int) -> tuple[int, int]:
    """Numbers in a block of a quantised type, and its bytes."""
    try:
        from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
    except ImportError as error:
        raise ValueError("its tensors are quantised, which takes the package gguf: pip install gguf") from error
    return GGML_QUANT_SIZES[GGMLQuantizationType(kind)]


def _dequantised(data: npt.NDArray[np.uint8], kind: int, shape: tuple[int, ...], rows: Rows | None) -> Tensor:
    """Numbers of these rows, in pieces: the package takes several times their memory."""
    from gguf import GGMLQuantizationType
    from gguf.quants import dequantize

    index = rows.cpu().numpy() if isinstance(rows, Tensor) else rows
    picked = data if index is None else data[index]
    numbers = np.empty((len(picked), math.prod(shape) // len(data)), np.float32)
    step = max(1, PIECE // data.shape[1])
    for at in range(0, len(picked), step):
        numbers[at : at + step] = dequantize(picked[at : at + step], GGMLQuantizationType(kind))
    return torch.from_numpy(numbers).reshape(-1, *shape[1:])

"""GGUF files, as llama.cpp writes umT5 encoders: their tensors, and the tokenizer in their metadata. Needs `wan-text[gguf]`."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .packed import Packed, PackedState, Rows

FLOATS = {"F32": torch.float32, "F16": torch.float16}
VARINT, BYTES, FLOAT = 0, 2, 5  # wire types of a protocol buffer
UNIGRAM = 1  # sentencepiece's number for it
FIELDS = {"byte_fallback": 35, "unk_id": 40, "bos_id": 41, "eos_id": 42, "pad_id": 43}  # of its TrainerSpec
SPECIAL = {"unk_id": "unknown", "bos_id": "bos", "eos_id": "eos", "pad_id": "padding"}


def open_gguf(path: Path) -> Any:
    """The `gguf.GGUFReader` of a file. ValueError where it is no GGUF file, or says what to install."""
    try:
        from gguf import GGUFReader
    except ImportError as error:
        raise ValueError(f"'{path}' is a GGUF file, which takes an extra: pip install 'wan-text[gguf]'") from error
    try:
        return GGUFReader(path, "c")  # copied where it is written to, which it never is: PyTorch wants arrays that could be
    except OSError:
        raise
    except Exception as error:
        raise ValueError(f"'{path}' is not a readable GGUF file: {type(error).__name__}: {error}") from error


def read_gguf(path: Path) -> PackedState:
    """All tensors, memory-mapped, under llama.cpp's names, in PyTorch's order of axes."""
    state: PackedState = {}
    for tensor in open_gguf(path).tensors:
        shape = tuple(int(size) for size in reversed(tensor.shape))
        kind = tensor.tensor_type.name
        if kind in FLOATS:
            state[tensor.name] = torch.from_numpy(np.array(tensor.data, copy=False).reshape(shape))
        else:
            state[tensor.name] = Packed(shape, kind, partial(_dequantised, tensor.data, tensor.tensor_type, shape))
    return state


def _dequantised(data: Any, kind: Any, shape: tuple[int, ...], rows: Rows | None) -> Tensor:
    from gguf.quants import dequantize

    data = data.reshape(shape[0], -1) if len(shape) > 1 else data
    index = rows.cpu().numpy() if isinstance(rows, Tensor) else rows
    values = dequantize(data if index is None else data[index], kind)
    return torch.from_numpy(np.ascontiguousarray(values)).reshape(-1, *shape[1:]) if len(shape) > 1 else torch.from_numpy(values)


def read_gguf_spiece(path: Path) -> bytes:
    """The sentencepiece model that a GGUF file's metadata describe, written as one. ValueError where they do not."""
    fields = open_gguf(path).fields

    def value(name: str, default: Any = None) -> Any:
        field = fields.get(f"tokenizer.ggml.{name}")
        return default if field is None else field.contents()

    if value("model") != "t5" or value("tokens") is None or value("scores") is None:
        raise ValueError(f"'{path}' describes no sentencepiece tokenizer ('{value('model')}'), expected 't5': put spiece.model beside it")
    tokens, scores = value("tokens"), value("scores")
    types = value("token_type") or [1] * len(tokens)
    pieces = b"".join(
        _field(1, BYTES, _field(1, BYTES, token.encode()) + _field(2, FLOAT, np.float32(score).tobytes()) + _field(3, VARINT, kind))
        for token, score, kind in zip(tokens, scores, types, strict=True)
    )
    special = {name: value(f"{key}_token_id") for name, key in SPECIAL.items()}
    trainer = _field(3, VARINT, UNIGRAM) + _field(FIELDS["byte_fallback"], VARINT, int(6 in types))  # type 6: a byte
    trainer += b"".join(_field(FIELDS[name], VARINT, number & (1 << 64) - 1) for name, number in special.items() if number is not None)
    charsmap = value("precompiled_charsmap")
    normalizer = _field(1, BYTES, b"nmt_nfkc") + (_field(2, BYTES, bytes(np.asarray(charsmap, np.uint8))) if charsmap is not None else b"")
    normalizer += _field(3, VARINT, int(bool(value("add_space_prefix", True))))
    normalizer += _field(4, VARINT, int(bool(value("remove_extra_whitespaces", True))))
    return pieces + _field(2, BYTES, trainer) + _field(3, BYTES, normalizer)


def _field(number: int, wire: int, value: int | bytes) -> bytes:
    """A field of a protocol buffer."""
    key = _varint(number << 3 | wire)
    if isinstance(value, int):
        return key + _varint(value)
    return key + value if wire == FLOAT else key + _varint(len(value)) + value


def _varint(number: int) -> bytes:
    made = bytearray()
    while number > 127:
        made.append(number & 127 | 128)
        number >>= 7
    return bytes([*made, number])

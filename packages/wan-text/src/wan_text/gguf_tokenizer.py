"""The sentencepiece model that the metadata of a GGUF file describe, written as one: a protocol buffer of pieces and settings."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

VARINT, BYTES, FLOAT = 0, 2, 5  # wire types of a protocol buffer
UNIGRAM = 1  # sentencepiece's number for it
BYTE_FALLBACK = 35  # of its TrainerSpec; special ids are those of the pieces that bear their names
NORMAL, USER_DEFINED, UNUSED, BYTE = 1, 4, 5, 6  # types of pieces


def has_tokenizer(metadata: Mapping[str, Any]) -> bool:
    """Whether there is a unigram tokenizer in these metadata."""
    return metadata.get("tokenizer.ggml.model") == "t5" and {"tokenizer.ggml.tokens", "tokenizer.ggml.scores"} <= metadata.keys()


def sentencepiece_model(metadata: Mapping[str, Any]) -> bytes:
    """The model whose ids are those of the file's tokenizer; `<extra_id_0>` typed in a prompt is text, as in umT5's own model."""
    values = {key.removeprefix("tokenizer.ggml."): value for key, value in metadata.items()}
    tokens = values["tokens"]
    types = [int(kind) for kind in values.get("token_type", [NORMAL] * len(tokens))]
    pieces = []
    for token, score, kind in zip(tokens, values["scores"], types, strict=True):
        used = UNUSED if kind == USER_DEFINED and token.startswith("<extra_id_") else kind
        piece = _field(1, BYTES, token.encode()) + _field(2, FLOAT, np.float32(score).tobytes()) + _field(3, VARINT, used)
        pieces.append(_field(1, BYTES, piece))
    trainer = _field(3, VARINT, UNIGRAM) + _field(BYTE_FALLBACK, VARINT, int(BYTE in types))
    normalizer = _field(1, BYTES, b"nmt_nfkc")
    if "precompiled_charsmap" in values:
        normalizer += _field(2, BYTES, np.asarray(values["precompiled_charsmap"]).astype(np.uint8).tobytes())
    normalizer += _field(3, VARINT, int(values.get("add_space_prefix", True)))
    normalizer += _field(4, VARINT, int(values.get("remove_extra_whitespaces", True)))
    return b"".join(pieces) + _field(2, BYTES, trainer) + _field(3, BYTES, normalizer)


def _field(number: int, wire: int, value: int | bytes) -> bytes:
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

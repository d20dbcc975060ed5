"""GGUF files in types that nothing here can write, and their tokenizers."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from wan_text import TextEncoder
from wan_text._shared.gguf_file import read_gguf
from wan_text.gguf_tokenizer import sentencepiece_model
from wan_text.layouts import GGUF, OWN, table
from wan_text.tokenizer import Tokenizer


@pytest.mark.parametrize("kind", ["Q4_K", "Q5_K", "Q6_K", "IQ4_XS"])
def test_blocks_are_read_as_the_package_reads_them(tmp_path: Path, kind: str) -> None:
    quantised = gguf.GGMLQuantizationType[kind]
    block, size = gguf.GGML_QUANT_SIZES[quantised]
    data = np.random.default_rng(0).integers(0, 60, (6, 512 // block * size), np.uint8)  # small bytes: no scale is infinite or NaN
    writer = gguf.GGUFWriter(tmp_path / "a.gguf", "t5encoder")
    writer.add_tensor("x", data, raw_dtype=quantised)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    (tensor,) = gguf.GGUFReader(tmp_path / "a.gguf").tensors
    expected = torch.from_numpy(gguf.quants.dequantize(tensor.data, quantised))
    read = read_gguf(tmp_path / "a.gguf").tensors["x"]
    assert (read.shape, expected.shape) == ((6, 512), (6, 512))
    assert torch.equal(read.to("cpu", torch.float32), expected)
    assert torch.equal(read[torch.tensor([5, 0, 5])], expected[[5, 0, 5]])
    assert torch.equal(read[1:3], expected[1:3])


def test_markers_typed_in_a_prompt_are_text() -> None:
    metadata = {
        "tokenizer.ggml.model": "t5",
        "tokenizer.ggml.tokens": ["<pad>", "</s>", "<s>", "<unk>", "\u2581", "<", "e", "<extra_id_0>", "[PAD1]"],
        "tokenizer.ggml.scores": [0.0, 0.0, 0.0, 0.0, -1.0, -2.0, -3.0, -4.0, -4.0],
        "tokenizer.ggml.token_type": np.array([3, 3, 3, 2, 1, 1, 1, 4, 5]),
    }
    tokenizer = Tokenizer(sentencepiece_model(metadata))
    assert 7 not in tokenizer.tokenize(["<extra_id_0>"])[0].ids
    assert tokenizer.vocab_size == 9


def test_the_tokenizer_may_lie_beside(tmp_path: Path, encoder: TextEncoder) -> None:
    writer = gguf.GGUFWriter(tmp_path / "a.gguf", "t5encoder")
    for key, name in table(encoder.config.num_layers, OWN, GGUF).items():
        writer.add_tensor(name, encoder.umt5.state_dict()[key].numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(FileNotFoundError, match="no tokenizer for"):
        TextEncoder.from_pretrained(tmp_path / "a.gguf")
    (tmp_path / "spiece.model").write_bytes(encoder.tokenizer.model)
    assert torch.equal(TextEncoder.from_pretrained(tmp_path / "a.gguf").encode(["red"])[0], encoder.encode(["red"])[0])

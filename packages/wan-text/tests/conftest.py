"""A small real tokenizer and a random encoder, made in milliseconds."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from wan_text import TextEncoder, UMT5Config
from wan_text.tokenizer import train_tokenizer

LINES = [f"a {colour} {shape} moves {way}" for colour in ("red", "blue") for shape in ("circle", "star") for way in ("left", "right", "up")]


@pytest.fixture(scope="session")
def spiece() -> bytes:
    return train_tokenizer(LINES * 3, 400, "unigram")


@pytest.fixture(scope="session")
def config() -> UMT5Config:
    sizes = {"vocab_size": 420, "dim": 24, "dim_attn": 32, "dim_ffn": 40, "num_heads": 4, "num_layers": 2}
    return UMT5Config(**sizes, max_tokens=128, embedding_space="test-1")


@pytest.fixture
def encoder(config: UMT5Config, spiece: bytes) -> TextEncoder:
    """Every tensor random, norms and biases too: nothing is hidden by an initialisation to one."""
    torch.manual_seed(0)
    module = TextEncoder(config, spiece).eval()
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if "norm" in name:
                parameter.normal_(1, 0.2)
    return module


@pytest.fixture
def golden() -> Path:
    return Path(os.environ.get("WAN_GOLDEN", Path(__file__).parent / "golden"))

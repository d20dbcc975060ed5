"""The numbers of the official code; configuration, calls and tolerances come from the cases."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from wan_text import UMT5Encoder
from wan_text._shared.weights import build
from wan_text.checkpoint import read_encoder
from wan_text.tokenizer import clean
from wan_text.umt5 import relative_buckets

pytestmark = pytest.mark.golden


def read(golden: Path, case: str) -> dict[str, Any]:
    return json.loads((golden / f"{case}.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("exact", [False, True])
def test_umt5(golden: Path, tmp_path: Path, exact: bool) -> None:
    case, tensors = read(golden, "text_umt5"), load_file(golden / "text_umt5.safetensors")
    official = {key.removeprefix("weights/"): value for key, value in tensors.items() if key.startswith("weights/")}
    torch.save(official, tmp_path / "models_t5_umt5-xxl-enc-bf16.pth")
    config, state = read_encoder(tmp_path)
    for ours, theirs in {"vocab_size": "vocab", **{name: name for name in case["config"] if hasattr(config, name)}}.items():
        assert getattr(config, ours) == case["config"][theirs], ours
    encoder = build(lambda: UMT5Encoder(config), state)
    for call in case["calls"]:
        ids, mask = (tensors[call["args"][name]] for name in ("ids", "mask"))
        with torch.no_grad():
            hidden = encoder(ids, mask, exact=exact)
        (name,) = (key for key in tensors if key.startswith(f"outputs/{call['name']}"))
        for row, expected, length in zip(hidden, tensors[name], call["lengths"], strict=True):
            torch.testing.assert_close(row[:length], expected[:length], atol=case["tolerance"]["atol"], rtol=case["tolerance"]["rtol"])


def test_buckets(golden: Path) -> None:
    case, tensors = read(golden, "text_buckets"), load_file(golden / "text_buckets.safetensors")
    for variant in case["config"]["cases"]:
        buckets, distance = variant["num_buckets"], variant["max_dist"]
        got = relative_buckets(tensors["inputs/relative_position"], buckets, distance, bidirectional=variant["bidirectional"])
        direction = "bi" if variant["bidirectional"] else "uni"
        assert torch.equal(got, tensors[f"outputs/buckets_{buckets}_{direction}_{distance}"])


@pytest.mark.parametrize("mode", ["whitespace", "lower", "canonicalize"])
def test_clean(golden: Path, mode: Any) -> None:
    rows = read(golden, "text_clean")["rows"]
    assert rows
    assert [clean(row["raw"], mode) for row in rows] == [row[mode] for row in rows]

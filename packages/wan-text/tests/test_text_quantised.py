"""int8 by rows and float16: the corners; `test_text_layouts` has the errors."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from wan_text import TextEncoder, load_text_encoder, umt5
from wan_text._shared.quantised import quantise_rows

PROMPTS = ["a red circle", "", "a blue star moves up"]


def test_rows_that_are_zero_stay_zero() -> None:
    weight, scale = quantise_rows(torch.tensor([[0.0, 0.0], [1.0, -2.0]]))
    assert weight.tolist() == [[0, 0], [64, -127]]
    assert torch.equal(weight[0] * scale[0], torch.zeros(2))


def test_options_that_contradict_each_other() -> None:
    with pytest.raises(ValueError, match="leave out quantise"):
        load_text_encoder("tiny", stream=True, quantise="int8")
    with pytest.raises(ValueError, match="unknown quantisation 'int4', expected int8"):
        load_text_encoder("tiny", quantise="int4")
    with pytest.raises(ValueError, match="no umT5 encoder"):
        load_text_encoder("collections:OrderedDict", stream=True)


@pytest.mark.parametrize("quantise", [None, "int8"])
def test_float16_survives_large_activations(
    encoder: TextEncoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quantise: str | None
) -> None:
    with torch.no_grad():
        encoder.umt5.blocks[0].ffn.up.weight *= 300
        encoder.umt5.blocks[0].ffn.down.weight *= 30_000
    encoder.save_pretrained(tmp_path / "mine")
    half = load_text_encoder(str(tmp_path / "mine"), dtype=torch.float16, quantise=quantise)
    assert all(bool(context.isfinite().all()) for context in half.encode(PROMPTS))
    monkeypatch.setattr(umt5, "fp16_clamp", lambda x: x)
    assert not all(bool(context.isfinite().all()) for context in half.encode(PROMPTS)), "nothing overflows here: the test shows nothing"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_near(encoder: TextEncoder, tmp_path: Path, dtype: torch.dtype) -> None:
    encoder.save_pretrained(tmp_path / "mine")
    exact = torch.cat(encoder.encode(PROMPTS))
    for quantise, bound in ((None, 0.012), ("int8", 0.03)):
        got = torch.cat(load_text_encoder(str(tmp_path / "mine"), dtype=dtype, quantise=quantise).encode(PROMPTS))
        assert got.dtype == dtype
        assert float((got.float() - exact).norm() / exact.norm()) < bound

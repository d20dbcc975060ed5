"""The network against transformers' UMT5EncoderModel, and the sizes of the released encoder."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import UMT5Config as HFConfig
from transformers import UMT5EncoderModel
from wan_text import UMT5Config, UMT5Encoder
from wan_text._shared.weights import build
from wan_text.checkpoint import config_from_shapes, hf_config
from wan_text.config import TINY, XXL
from wan_text.layouts import hf_names, official_names
from wan_text.testing import difference
from wan_text.umt5 import fp16_clamp

SIZES = [
    {"vocab_size": 96, "d_model": 32, "d_kv": 8, "num_heads": 4, "d_ff": 56, "num_layers": 3},
    {"vocab_size": 50, "d_model": 24, "d_kv": 16, "num_heads": 2, "d_ff": 40, "num_layers": 2, "relative_attention_num_buckets": 16},
    {"vocab_size": 64, "d_model": 64, "d_kv": 8, "num_heads": 6, "d_ff": 160, "num_layers": 4, "relative_attention_max_distance": 64},
]


def redrawn(module: nn.Module) -> None:
    """Random values in every tensor, since norms and some tables start as ones."""
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            parameter.normal_(1 if "norm" in name else 0, 0.2)


def pair(sizes: dict[str, int], attention: str) -> tuple[UMT5Encoder, Any]:
    torch.manual_seed(0)
    theirs = UMT5EncoderModel(HFConfig(**sizes, feed_forward_proj="gated-gelu", attn_implementation=attention)).eval()
    redrawn(theirs)
    config = hf_config(theirs.config.to_dict())
    names, state = hf_names(config), theirs.state_dict()
    return build(lambda: UMT5Encoder(config), {own: state[name].clone() for own, name in names.items()}), theirs


def batch(sizes: dict[str, int]) -> tuple[Tensor, Tensor]:
    lengths = torch.tensor([120, 37, 1])
    mask = (torch.arange(120) < lengths[:, None]).long()
    return torch.randint(2, sizes["vocab_size"], mask.shape, generator=torch.Generator().manual_seed(1)) * mask, mask


@torch.no_grad()
@pytest.mark.parametrize("sizes", SIZES)
def test_fused_path_agrees(sizes: dict[str, int]) -> None:
    ours, theirs = pair(sizes, "sdpa")
    ids, mask = batch(sizes)
    got, expected = ours(ids, mask), theirs(ids, mask).last_hidden_state
    assert difference(got[mask.bool()], expected[mask.bool()]) <= 3e-6


@torch.no_grad()
@pytest.mark.parametrize("sizes", SIZES)
def test_exact_path_is_equal_to_the_bit(sizes: dict[str, int]) -> None:
    ours, theirs = pair(sizes, "eager")
    ids, mask = batch(sizes)
    assert torch.equal(ours(ids, mask, exact=True), theirs(ids, mask).last_hidden_state)


@torch.no_grad()
def test_padding_to_512_changes_nothing() -> None:
    ours, _ = pair(SIZES[0], "sdpa")
    ids = torch.randint(2, 96, (1, 21), generator=torch.Generator().manual_seed(2))
    padded = torch.cat([ids, ids.new_zeros(1, 491)], 1)
    assert difference(ours(ids), ours(padded, (padded != 0).long())[:, :21]) <= 2e-6


@torch.no_grad()
@pytest.mark.parametrize("change", ["attn.q", "position_bias", "norm1", "ffn.gate"])
def test_every_part_moves_the_result(change: str) -> None:
    ours, theirs = pair(SIZES[0], "sdpa")
    ids, mask = batch(SIZES[0])
    ours.blocks[1].get_parameter(f"{change}.weight").mul_(1.5)
    assert difference(ours(ids, mask), theirs(ids, mask).last_hidden_state) > 1e-3


def test_released_encoder_has_its_parameters_and_tensors() -> None:
    with torch.device("meta"):
        state = UMT5Encoder(XXL).state_dict()
    assert sum(value.numel() for value in state.values()) == 5_680_910_336
    assert len(state) == 242
    assert set(official_names(XXL)) == set(hf_names(XXL)) == set(state)
    assert config_from_shapes(state) == XXL


def test_gradients_reach_every_parameter() -> None:
    encoder = UMT5Encoder(TINY)
    encoder(torch.arange(TINY.vocab_size)[None, :40].expand(2, -1)).square().sum().backward()
    for name, parameter in encoder.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name


@torch.no_grad()
def test_bfloat16_and_float16_stay_close() -> None:
    ours, _ = pair(SIZES[0], "sdpa")
    ids, mask = batch(SIZES[0])
    expected = ours(ids, mask)[mask.bool()]
    for dtype, bound in ((torch.bfloat16, 0.05), (torch.float16, 0.005)):
        got = copy.deepcopy(ours).to(dtype)(ids, mask)[mask.bool()]
        assert got.dtype == dtype
        assert (got.float() - expected).norm() <= bound * expected.norm()


def test_overflow_in_float16_is_pulled_back() -> None:
    x = torch.tensor([1.0, float("inf"), -65504.0], dtype=torch.float16)
    assert fp16_clamp(x).tolist() == [1.0, 64512.0, -64512.0]
    assert fp16_clamp(x[[0, 2]]).tolist() == [1.0, -65504.0]


def test_heads_that_do_not_divide_are_refused() -> None:
    with pytest.raises(ValueError, match="dim_attn 30 does not divide into 4 heads"):
        UMT5Config(vocab_size=8, dim=8, dim_attn=30, dim_ffn=8, num_heads=4, num_layers=1, embedding_space="x")

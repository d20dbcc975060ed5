"""Attentions of another package, right and wrong; a module that a string can name."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from wan_dit.parallel.lse import PlainLse

CALLS: list[tuple[int, ...]] = []
WRONG = {  # by name what is said
    "wrong_scale": r"is off by 0\.\d+ at 128 tokens, 4 heads of 32 in float32, where 1e-05 is allowed: refused",
    "wrong_at_odd_lengths": r"is off by .* at 77 tokens",
    "wrong_past_a_block": r"is off by .* at 1025 tokens",
    "not_a_number": r"is off by nan",
    "wrong_layout": r"made \[1, 4, 128, 32\] of \[1, 128, 4, 32\], not \[1, 128, 4, 32\]: refused",
    "causal": r"is off by",
    "for_gpus_only": r"does not run on cpu in torch\.float32: RuntimeError: expected a CUDA tensor",
    "wrong_log_sum_exp": r"is off by",
}


def plain(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    CALLS.append(tuple(q.shape))
    return PlainLse().forward(q, k, v)[0]


def with_log_sum_exp(q: Tensor, k: Tensor, v: Tensor, with_lse: bool = False) -> Any:
    CALLS.append(tuple(q.shape))
    out = PlainLse().forward(q, k, v)
    return out if with_lse else out[0]


def eight_bit(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Queries and keys rounded to 8 bits, each token on its own scale, keys less their mean as SageAttention does it."""

    def rounded(x: Tensor) -> Tensor:
        scale = x.abs().amax(-1, keepdim=True) / 127
        return (x / scale).round() * scale

    return plain(rounded(q), rounded(k - k.mean(1, keepdim=True)), v)


def eight_bit_wrong_scale(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return eight_bit(1.3 * q, k, v)


def wrong_scale(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return plain(1.1 * q, k, v)


def wrong_at_odd_lengths(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    even = k.shape[1] // 2 * 2 or 1
    return plain(q, k[:, :even], v[:, :even])


def wrong_past_a_block(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return plain(q, k[:, :1024], v[:, :1024])


def not_a_number(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return plain(q, k, v) * torch.nan


def wrong_layout(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return plain(q, k, v).transpose(1, 2)


def causal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)


def for_gpus_only(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    raise RuntimeError("expected a CUDA tensor\n  at kernel.cu:12")


def wrong_log_sum_exp(q: Tensor, k: Tensor, v: Tensor, with_lse: bool = False) -> Any:
    """In units of two, as kernels keep it inside."""
    out, lse = PlainLse().forward(q, k, v)
    return (out, lse / 0.6931) if with_lse else out

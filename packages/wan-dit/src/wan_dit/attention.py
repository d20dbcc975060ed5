"""Self-attention and cross-attention of a block (official `WanSelfAttention`, `WanT2VCrossAttention`, `WanI2VCrossAttention`).

q, k, v and o have biases; q and k pass an RMS norm over the full width before they are split into heads; only
self-attention is rotated. Self-attention calls `attend`, which another function of the same signature may replace.

Shape suffixes: B batch, L tokens, M context rows, D width, N heads, H head width, P rotary pairs.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .contracts import KeysValues
from .layers import RMSNorm
from .rope import rotate

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]


def sdpa(q_BLNH: Tensor, k_BMNH: Tensor, v_BMNH: Tensor, bias: Tensor | None = None) -> Tensor:
    """Softmax attention `[B, L, N, H]` by torch; `bias` is added to the logits and broadcast to `[B, N, L, M]`."""
    q, k, v = (x.transpose(1, 2) for x in (q_BLNH, k_BMNH, v_BMNH))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias).transpose(1, 2)


class _Attention(nn.Module):
    """The projections that both kinds share."""

    def __init__(self, dim: int, num_heads: int, qk_norm: bool, eps: float) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.q = nn.Linear(dim, dim)
        self.k = nn.Linear(dim, dim)
        self.v = nn.Linear(dim, dim)
        self.o = nn.Linear(dim, dim)
        self.norm_q = RMSNorm(dim, eps) if qk_norm else nn.Identity()
        self.norm_k = RMSNorm(dim, eps) if qk_norm else nn.Identity()

    def heads(self, x_BLD: Tensor) -> Tensor:
        return x_BLD.unflatten(-1, (self.num_heads, -1))


class SelfAttention(_Attention):
    """Attention among all tokens; `attend` is `(q_BLNH, k_BLNH, v_BLNH) -> out_BLNH`."""

    def __init__(self, dim: int, num_heads: int, qk_norm: bool, eps: float) -> None:
        super().__init__(dim, num_heads, qk_norm, eps)
        self.attend: Attention = sdpa

    def forward(self, x_BLD: Tensor, rope_LP: Tensor) -> Tensor:
        v_BLNH = self.heads(self.v(x_BLD))
        q_BLNH = rotate(self.heads(self.norm_q(self.q(x_BLD))), rope_LP).to(v_BLNH.dtype)
        k_BLNH = rotate(self.heads(self.norm_k(self.k(x_BLD))), rope_LP).to(v_BLNH.dtype)
        return self.o(self.attend(q_BLNH, k_BLNH, v_BLNH).flatten(2))


class CrossAttention(_Attention):
    """Attention to the context, whose keys and values are computed once per prompt.

    image: whether image tokens are read too, by an attention of their own with the same queries, whose result is added
    before `o` (official `WanI2VCrossAttention`)
    """

    def __init__(self, dim: int, num_heads: int, qk_norm: bool, eps: float, image: bool = False) -> None:
        super().__init__(dim, num_heads, qk_norm, eps)
        if image:
            self.k_img = nn.Linear(dim, dim)
            self.v_img = nn.Linear(dim, dim)
            self.norm_k_img = RMSNorm(dim, eps) if qk_norm else nn.Identity()

    def keys_values(self, text_BMD: Tensor, image_BMD: Tensor | None = None) -> KeysValues:
        """Keys and values of embedded text rows and, where there are any, of embedded image tokens."""
        value = self.heads(self.v(text_BMD))
        key = self.heads(self.norm_k(self.k(text_BMD))).to(value.dtype)
        if image_BMD is None:
            return KeysValues(key, value)
        image_value = self.heads(self.v_img(image_BMD))
        return KeysValues(key, value, self.heads(self.norm_k_img(self.k_img(image_BMD))).to(value.dtype), image_value)

    def forward(self, x_BLD: Tensor, context: KeysValues, bias: Tensor | None) -> Tensor:
        q_BLNH = self.heads(self.norm_q(self.q(x_BLD))).to(context.value.dtype)
        out_BLNH = sdpa(q_BLNH, context.key, context.value, bias)
        if context.image_key is not None and context.image_value is not None:
            out_BLNH = out_BLNH + sdpa(q_BLNH, context.image_key, context.image_value)
        return self.o(out_BLNH.flatten(2))


def pad_bias(lengths: list[int], rows: int, text_len: int, device: torch.device) -> Tensor | None:
    """Logit bias `[B, 1, 1, rows]` that lets few pad rows weigh as much as those up to `text_len`; None where all are there.

    Prompts are attended to with their zero padding. All pad rows have the same key and value, so n of them weigh as
    much in the softmax as m < n of them whose logits are raised by log(n / m).
    """
    if rows == text_len:
        return None
    lengths_B1 = torch.tensor(lengths, dtype=torch.float32, device=device)[:, None]
    raised_B1 = ((text_len - lengths_B1) / (rows - lengths_B1)).log()
    bias_BM = torch.where(torch.arange(rows, device=device) >= lengths_B1, raised_B1, 0.0)
    return bias_BM[:, None, None]

"""The umT5 encoder (Chung et al., UniMax, 2023; T5: Raffel et al., 2020, section 2.1), as in the reference's wan/modules/t5.py.

Shapes: B prompts, L tokens, D dim, N heads, H head width, F hidden width.
"""

from __future__ import annotations

import math
from functools import lru_cache

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from .config import UMT5Config


class RMSNorm(nn.Module):
    """RMS norm without mean or bias, its variance in float32."""

    def __init__(self, dim: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x_BLD: Tensor) -> Tensor:
        scale = torch.rsqrt(x_BLD.float().pow(2).mean(-1, keepdim=True) + self.eps)
        return self.weight * (x_BLD * scale).to(self.weight.dtype)


def _linear(inner: int, outer: int, std: float | None = None) -> nn.Linear:
    layer = nn.Linear(inner, outer, bias=False)
    nn.init.normal_(layer.weight, std=inner**-0.5 if std is None else std)
    return layer


def _embedding(rows: int, dim: int, std: float) -> nn.Embedding:
    table = nn.Embedding(rows, dim)
    nn.init.normal_(table.weight, std=std)
    return table


class Attention(nn.Module):
    """Self-attention without biases and without the 1/sqrt(H) scale (T5 folds it into the initialisation of q)."""

    def __init__(self, config: UMT5Config) -> None:
        super().__init__()
        self.heads = config.num_heads
        dim, dim_attn = config.dim, config.dim_attn
        self.q = _linear(dim, dim_attn, std=(dim * dim_attn // config.num_heads) ** -0.5)
        self.k = _linear(dim, dim_attn)
        self.v = _linear(dim, dim_attn)
        self.o = _linear(dim_attn, dim)

    def forward(self, x_BLD: Tensor, bias_BNLL: Tensor, exact: bool) -> Tensor:
        q_BNLH, k_BNLH, v_BNLH = (rearrange(f(x_BLD), "B L (N H) -> B N L H", N=self.heads) for f in (self.q, self.k, self.v))
        if exact:
            score_BNLL = q_BNLH @ k_BNLH.transpose(-1, -2) + bias_BNLL
            x_BNLH = score_BNLL.float().softmax(-1).to(score_BNLL.dtype) @ v_BNLH
        else:
            x_BNLH = F.scaled_dot_product_attention(q_BNLH, k_BNLH, v_BNLH, attn_mask=bias_BNLL, scale=1.0)
        return self.o(rearrange(x_BNLH, "B N L H -> B L (N H)"))


class FeedForward(nn.Module):
    """Gated feed-forward: down(gelu(gate x) * up x), no biases."""

    def __init__(self, config: UMT5Config) -> None:
        super().__init__()
        self.gate = _linear(config.dim, config.dim_ffn)
        self.up = _linear(config.dim, config.dim_ffn)
        self.down = _linear(config.dim_ffn, config.dim)

    def forward(self, x_BLD: Tensor, exact: bool) -> Tensor:
        gate_BLF = self.gate(x_BLD)
        gate_BLF = gelu_tanh(gate_BLF) if exact else F.gelu(gate_BLF, approximate="tanh")
        return self.down(gate_BLF * self.up(x_BLD))


class Block(nn.Module):
    """Pre-norm attention and feed-forward; umT5 gives every block its own table of position biases."""

    def __init__(self, config: UMT5Config) -> None:
        super().__init__()
        self.norm1 = RMSNorm(config.dim)
        self.attn = Attention(config)
        self.position_bias = _embedding(config.num_buckets, config.num_heads, std=config.dim**-0.5)
        self.norm2 = RMSNorm(config.dim)
        self.ffn = FeedForward(config)

    def forward(self, x_BLD: Tensor, bucket_LL: Tensor, masked_B11L: Tensor | None, exact: bool = False) -> Tensor:
        return self.feed(self.attend(x_BLD, bucket_LL, masked_B11L, exact), exact)

    def attend(self, x_BLD: Tensor, bucket_LL: Tensor, masked_B11L: Tensor | None, exact: bool = False) -> Tensor:
        """The attention half: each token takes from all others."""
        bias_BNLL = rearrange(self.position_bias(bucket_LL), "Q K N -> 1 N Q K")
        if masked_B11L is not None:
            bias_BNLL = bias_BNLL.masked_fill(masked_B11L, torch.finfo(bias_BNLL.dtype).min)
        return fp16_clamp(x_BLD + self.attn(self.norm1(x_BLD), bias_BNLL, exact))

    def feed(self, x_BLD: Tensor, exact: bool = False) -> Tensor:
        """The feed-forward half: each token by itself."""
        return fp16_clamp(x_BLD + self.ffn(self.norm2(x_BLD), exact))


class UMT5Encoder(nn.Module):
    """Token ids to hidden states.

    New weights are drawn as Mesh TensorFlow's T5 draws them: every product starts at unit variance, q with the scale folded in.
    """

    def __init__(self, config: UMT5Config) -> None:
        super().__init__()
        self.config = config
        self.token_embedding = _embedding(config.vocab_size, config.dim, std=1.0)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.num_layers))
        self.norm = RMSNorm(config.dim)

    def forward(self, ids: Tensor, mask: Tensor | None = None, *, exact: bool = False) -> Tensor:
        """Hidden states `[B, L, D]` after the last norm, pad rows included.

        ids: `[B, L]` int64; mask: `[B, L]`, nonzero where a token is real, or None where all are
        exact: the reference's order of operations (eager float32 softmax, written-out GELU) instead of the fused kernels
        """
        c = self.config
        bucket_LL = position_buckets(ids.shape[1], c.num_buckets, c.max_distance).to(ids.device)
        masked_B11L = None if mask is None else rearrange(mask == 0, "B L -> B 1 1 L")
        x_BLD = self.token_embedding(ids)
        for block in self.blocks:
            x_BLD = block(x_BLD, bucket_LL, masked_B11L, exact)
        return self.norm(x_BLD)


@lru_cache(maxsize=16)
def position_buckets(length: int, num_buckets: int, max_distance: int) -> Tensor:
    """Bucket of every (query, key) pair, `[L, L]` int64 on the CPU; the same in every block, so made once a length."""
    # never an inference tensor: the cache outlives the mode it was filled in, and training saves it for backward
    with torch.inference_mode(False):
        position = torch.arange(length, device="cpu")
        return relative_buckets(position[None, :] - position[:, None], num_buckets, max_distance)


def relative_buckets(distance: Tensor, num_buckets: int = 32, max_distance: int = 128, *, bidirectional: bool = True) -> Tensor:
    """T5's bucket of a distance (key index less query index): half of them exact, the rest logarithmic up to `max_distance`.

    Bidirectional, the upper half of the buckets is for keys that follow the query; else those share bucket 0.
    """
    if bidirectional:
        num_buckets //= 2
        offset, distance = (distance > 0).long() * num_buckets, distance.abs()
    else:
        offset, distance = torch.zeros_like(distance), (-distance).clamp(min=0)
    exact = num_buckets // 2
    # float32 and in this order: the reference truncates the same value
    ratio = torch.log(distance.float() / exact) / math.log(max_distance / exact) * (num_buckets - exact)
    far = (exact + ratio.clamp(min=0).long()).clamp(max=num_buckets - 1)
    return offset + torch.where(distance < exact, distance, far)


def gelu_tanh(x: Tensor) -> Tensor:
    """The tanh form of GELU, written out as the reference has it."""
    return 0.5 * x * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * torch.pow(x, 3.0))))


def fp16_clamp(x: Tensor) -> Tensor:
    """In float16, pull everything to +-(max - 1000) where something overflowed; other types pass."""
    if x.dtype != torch.float16:
        return x
    limit = torch.finfo(torch.float16).max - 1000
    return torch.where(torch.isinf(x).any(), x.clamp(-limit, limit), x)

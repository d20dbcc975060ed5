"""Ulysses attention: an all-to-all turns a split of the tokens into a split of the heads, and another one back.

Jacobs et al., "DeepSpeed Ulysses: System Optimizations for Enabling Training of Extreme Long Sequence Transformer Models" (2023).

Shape suffixes: B batch, L tokens of this process, N heads, H head width, U processes.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from einops import rearrange
from torch import Tensor

from ..attention import Attention, sdpa
from .ring import Ring


class Ulysses:
    """Attention among tokens that are split evenly over a group, each process having some of them with all heads.

    attend: what runs in between, over all tokens and a part of the heads; a `Ring` over a second group makes it 2-D:
    Ulysses within a machine, the ring between machines
    The heads must divide by the size of the group. Differentiable where `attend` is.

    Example: `Ulysses(group)(q, k, v)`, each `[B, L / size, N, H]`; `Ulysses(group, Ring(other))` has `L / (size * other.size())`.
    """

    def __init__(self, group: dist.ProcessGroup, attend: Attention | Ring = sdpa) -> None:
        self.group, self.attend = group, attend

    def __call__(self, q_BLNH: Tensor, k_BLNH: Tensor, v_BLNH: Tensor, tokens: int | None = None) -> Tensor:
        """tokens: real ones among those of all processes; what stands behind them is padding, which is not attended to."""
        size = self.group.size()
        qkv = rearrange(torch.stack([q_BLNH, k_BLNH, v_BLNH]), "s b l (u n) h -> u s b l n h", u=size)
        q, k, v = rearrange(all_to_all(qkv, self.group), "u s b l n h -> s b (u l) n h").unbind()
        out = self.attend(q, k, v, tokens) if isinstance(self.attend, Ring) else self.attend(q, k[:, :tokens], v[:, :tokens])
        out = all_to_all(rearrange(out, "b (u l) n h -> u b l n h", u=size), self.group)
        return rearrange(out, "u b l n h -> b l (u n) h")


def all_to_all(parts: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Give part i of the first axis to process i of the group, and get one from each; differentiable."""
    got: Tensor = _AllToAll.apply(parts, group)
    return got


class _AllToAll(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, parts: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        parts = parts.contiguous()
        got = torch.empty_like(parts)
        dist.all_to_all_single(got, parts, group=group)
        return got

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return all_to_all(grad, ctx.group), None

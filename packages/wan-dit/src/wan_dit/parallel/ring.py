"""Ring attention: queries stay, keys and values travel from neighbour to neighbour while attention runs.

Liu et al., "Ring Attention with Blockwise Transformers for Near-Infinite Context" (2023), without the causal mask.

Shape suffixes: B batch, L tokens of this process, M real tokens of a part, N heads, H head width, K the pair of key and value.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from .lse import LseAttention, lse_attention, merge


class Ring:
    """Attention among tokens that are split evenly over a group, each process having some of them with all heads.

    kernel: attention with its log-sum-exp; None for the one that suits the tensors
    A process sends its keys and values on while it computes with them, and never holds more than two parts. Results are
    merged in fp32. Differentiable once.

    Example: `Ring(group)(q, k, v)`, each `[B, L / size, N, H]`.
    """

    def __init__(self, group: dist.ProcessGroup, kernel: LseAttention | None = None) -> None:
        self.group, self.kernel = group, kernel

    def __call__(self, q_BLNH: Tensor, k_BLNH: Tensor, v_BLNH: Tensor, tokens: int | None = None) -> Tensor:
        """tokens: real ones among those of all processes; what stands behind them is padding, which is not attended to."""
        tokens = self.group.size() * q_BLNH.shape[1] if tokens is None else tokens
        out: Tensor = _RingAttention.apply(q_BLNH, k_BLNH, v_BLNH, tokens, self.group, self.kernel or lse_attention(q_BLNH))
        return out


class _RingAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q_BLNH: Tensor, k_BLNH: Tensor, v_BLNH: Tensor, *given: Any) -> Tensor:
        tokens, group, kernel = given
        kv_KBLNH, out_BLNH = torch.stack([k_BLNH, v_BLNH]), torch.zeros_like(q_BLNH, dtype=torch.float32)
        lse_BLN = torch.full(q_BLNH.shape[:3], -torch.inf, device=q_BLNH.device)
        for step in range(group.size()):
            travel = _Hop(kv_KBLNH, group) if step + 1 < group.size() else None
            if real := _real_tokens(step, q_BLNH.shape[1], tokens, group):
                out_BLNH, lse_BLN = merge(out_BLNH, lse_BLN, *kernel.forward(q_BLNH, *kv_KBLNH[:, :, :real]))
            kv_KBLNH = travel.arrived() if travel else kv_KBLNH
        out_BLNH = out_BLNH.to(q_BLNH.dtype)
        ctx.given = given
        ctx.save_for_backward(q_BLNH, k_BLNH, v_BLNH, out_BLNH, lse_BLN)
        return out_BLNH

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_BLNH: Tensor) -> tuple[Any, ...]:
        """Keys and values make the round again; their gradients follow them a step behind, and one step further: home."""
        tokens, group, kernel = ctx.given
        q_BLNH, k_BLNH, v_BLNH, out_BLNH, lse_BLN = ctx.saved_tensors
        kv_KBLNH, dq_BLNH = torch.stack([k_BLNH, v_BLNH]), torch.zeros_like(q_BLNH, dtype=torch.float32)
        following: _Hop | None = None
        for step in range(group.size()):
            travel = _Hop(kv_KBLNH, group) if step + 1 < group.size() else None
            dkv_KBLNH = torch.zeros_like(kv_KBLNH, dtype=torch.float32)
            if real := _real_tokens(step, q_BLNH.shape[1], tokens, group):
                dq, dk, dv = kernel.backward(grad_BLNH, q_BLNH, *kv_KBLNH[:, :, :real], out_BLNH, lse_BLN)
                dq_BLNH += dq
                dkv_KBLNH[0, :, :real], dkv_KBLNH[1, :, :real] = dk, dv
            if following:
                dkv_KBLNH += following.arrived()
            following = _Hop(dkv_KBLNH, group)
            kv_KBLNH = travel.arrived() if travel else kv_KBLNH
        assert following is not None
        dk_BLNH, dv_BLNH = following.arrived().to(k_BLNH.dtype)
        return dq_BLNH.to(q_BLNH.dtype), dk_BLNH, dv_BLNH, None, None, None


def _real_tokens(step: int, length: int, tokens: int, group: dist.ProcessGroup) -> int:
    """Real tokens of the part that has arrived after `step` hops; parts are `length` long, padding stands at the very end."""
    source = (group.rank() - step) % group.size()
    return min(max(tokens - source * length, 0), length)


class _Hop:
    """A tensor on its way to the next process, and that of the one before on its way here."""

    def __init__(self, sent: Tensor, group: dist.ProcessGroup) -> None:
        rank, size = group.rank(), group.size()
        after, before = (dist.get_global_rank(group, (rank + step) % size) for step in (1, -1))
        self.sent, self.received = sent, torch.empty_like(sent)  # both must live until the transfer is over
        exchange = [dist.P2POp(dist.isend, sent, after, group), dist.P2POp(dist.irecv, self.received, before, group)]
        self.requests = dist.batch_isend_irecv(exchange)

    def arrived(self) -> Tensor:
        for request in self.requests:
            request.wait()
        return self.received

"""Attention that also returns its log-sum-exp, which is what partial results over parts of the keys are merged by.

With the output and the log-sum-exp over *all* keys, the backward of attention to a part of them is exact by itself
(Liu et al., "Ring Attention with Blockwise Transformers", 2023; Dao, "FlashAttention-2", 2023). So nothing has to
differentiate a log-sum-exp: a kernel is a forward and that backward.

Shape suffixes: B batch, L queries, M keys, N heads, H head width.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor

from ..attention import sdpa

aten = torch.ops.aten
QUERIES = 1024  # that PlainLse holds the scores of at a time


class LseAttention(Protocol):
    """Attention with its log-sum-exp; inputs and outputs `[B, L, N, H]`, log-sum-exp fp32 `[B, L, N]`."""

    def forward(self, q_BLNH: Tensor, k_BMNH: Tensor, v_BMNH: Tensor) -> tuple[Tensor, Tensor]:
        """Output and log-sum-exp of the scaled logits, over the keys given."""

    def backward(
        self, grad_BLNH: Tensor, q_BLNH: Tensor, k_BMNH: Tensor, v_BMNH: Tensor, out_BLNH: Tensor, lse_BLN: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of q, k and v for a part of the keys; `out` and `lse` are those over all keys."""


class CpuFlash:
    """torch's flash attention for CPUs."""

    def forward(self, q_BLNH: Tensor, k_BMNH: Tensor, v_BMNH: Tensor) -> tuple[Tensor, Tensor]:
        out, lse = aten._scaled_dot_product_flash_attention_for_cpu(*_heads_first(q_BLNH, k_BMNH, v_BMNH))
        return out.transpose(1, 2), lse.transpose(1, 2)

    def backward(
        self, grad_BLNH: Tensor, q_BLNH: Tensor, k_BMNH: Tensor, v_BMNH: Tensor, out_BLNH: Tensor, lse_BLN: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        given = _heads_first(grad_BLNH, q_BLNH, k_BMNH, v_BMNH, out_BLNH)
        grads = aten._scaled_dot_product_flash_attention_for_cpu_backward(*given, lse_BLN.transpose(1, 2).contiguous(), 0.0, False)
        return _heads_second(grads)


class CudaFlash:
    """torch's flash attention for GPUs: half precision, head widths that are multiples of 8."""

    def forward(self, q_BLNH: Tensor, k_BMNH: Tensor, v_BMNH: Tensor) -> tuple[Tensor, Tensor]:
        out, lse = aten._scaled_dot_product_flash_attention(*_heads_first(q_BLNH, k_BMNH, v_BMNH))[:2]
        return out.transpose(1, 2), lse.transpose(1, 2)

    def backward(
        self, grad_BLNH: Tensor, q_BLNH: Tensor, k_BMNH: Tensor, v_BMNH: Tensor, out_BLNH: Tensor, lse_BLN: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        given = _heads_first(grad_BLNH, q_BLNH, k_BMNH, v_BMNH, out_BLNH)
        unused = torch.zeros(2, dtype=torch.int64, device=q_BLNH.device)  # state of the dropout there is none of
        grads = aten._scaled_dot_product_flash_attention_backward(
            *given, lse_BLN.transpose(1, 2).contiguous(), None, None, q_BLNH.shape[1], k_BMNH.shape[1], 0.0, False, unused, unused
        )
        return _heads_second(grads)


class PlainLse:
    """Matrix products in fp32, on any device, a slice of the queries at a time."""

    def forward(self, q_BLNH: Tensor, k_BMNH: Tensor, v_BMNH: Tensor) -> tuple[Tensor, Tensor]:
        parts = [self._forward(q, k_BMNH.float(), v_BMNH.float()) for q in q_BLNH.split(QUERIES, dim=1)]
        out, lse = (torch.cat(part, dim=1) for part in zip(*parts, strict=True))
        return out.to(q_BLNH.dtype), lse

    def _forward(self, q_BLNH: Tensor, k_BMNH: Tensor, v_BMNH: Tensor) -> tuple[Tensor, Tensor]:
        scores_BNLM = _scores(q_BLNH, k_BMNH)
        lse_BNL = scores_BNLM.logsumexp(-1)
        return torch.einsum("bnlm,bmnh->blnh", (scores_BNLM - lse_BNL[..., None]).exp(), v_BMNH), lse_BNL.transpose(1, 2)

    def backward(
        self, grad_BLNH: Tensor, q_BLNH: Tensor, k_BMNH: Tensor, v_BMNH: Tensor, out_BLNH: Tensor, lse_BLN: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        k, v, scale = k_BMNH.float(), v_BMNH.float(), q_BLNH.shape[-1] ** -0.5
        dq, dk, dv = [], torch.zeros_like(k), torch.zeros_like(v)
        for grad, q, out, lse in zip(*(x.split(QUERIES, dim=1) for x in (grad_BLNH, q_BLNH, out_BLNH, lse_BLN)), strict=True):
            grad, q = grad.float(), q.float()
            weights_BNLM = (_scores(q, k) - lse.transpose(1, 2)[..., None]).exp()
            rest_BNL1 = (grad * out.float()).sum(-1).transpose(1, 2)[..., None]
            ds_BNLM = weights_BNLM * (torch.einsum("blnh,bmnh->bnlm", grad, v) - rest_BNL1) * scale
            dq.append(torch.einsum("bnlm,bmnh->blnh", ds_BNLM, k))
            dk += torch.einsum("bnlm,blnh->bmnh", ds_BNLM, q)
            dv += torch.einsum("bnlm,blnh->bmnh", weights_BNLM, grad)
        return torch.cat(dq, dim=1).to(q_BLNH.dtype), dk.to(k_BMNH.dtype), dv.to(v_BMNH.dtype)


def lse_attention(q_BLNH: Tensor) -> LseAttention:
    """The kernel for queries of this device, type and head width."""
    if q_BLNH.device.type == "cpu":
        return CpuFlash()
    if q_BLNH.device.type == "cuda" and q_BLNH.dtype in (torch.float16, torch.bfloat16) and q_BLNH.shape[-1] % 8 == 0:
        return CudaFlash()
    return PlainLse()


class GivenLse:
    """An attention that returns its log-sum-exp, asked `with_lse=True`; its backward is that of torch's kernel."""

    def __init__(self, attend: Callable[..., tuple[Tensor, Tensor]]) -> None:
        self.attend = attend

    def forward(self, q_BLNH: Tensor, k_BMNH: Tensor, v_BMNH: Tensor) -> tuple[Tensor, Tensor]:
        return self.attend(q_BLNH, k_BMNH, v_BMNH, with_lse=True)

    def backward(
        self, grad_BLNH: Tensor, q_BLNH: Tensor, k_BMNH: Tensor, v_BMNH: Tensor, out_BLNH: Tensor, lse_BLN: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        return lse_attention(q_BLNH).backward(grad_BLNH, q_BLNH, k_BMNH, v_BMNH, out_BLNH, lse_BLN)


def returns_lse(attend: Callable[..., Any]) -> bool:
    """Whether an attention can be asked `with_lse=True`."""
    return "with_lse" in inspect.signature(attend).parameters


def ring_kernel(attend: Callable[..., Any]) -> LseAttention | None:
    """The kernel of a ring in place of an attention; None for the one that suits the tensors, where that is the default attention.

    Raises ValueError where the attention returns no log-sum-exp: a ring could not merge its parts.
    """
    if attend is sdpa:
        return None
    if not returns_lse(attend):
        name = getattr(attend, "__qualname__", type(attend).__name__)
        raise ValueError(f"attention {name} takes no `with_lse`, and a ring merges parts by it: use the default attention, or Ulysses")
    return GivenLse(attend)


def merge(out_BLNH: Tensor, lse_BLN: Tensor, part_BLNH: Tensor, part_lse_BLN: Tensor) -> tuple[Tensor, Tensor]:
    """Attention over two sets of keys, in fp32, out of that over each of them."""
    both_BLN = torch.logaddexp(lse_BLN, part_lse_BLN)
    kept, added = (lse_BLN - both_BLN).exp()[..., None], (part_lse_BLN - both_BLN).exp()[..., None]
    return out_BLNH * kept + part_BLNH.float() * added, both_BLN


def _scores(q_BLNH: Tensor, k_BMNH: Tensor) -> Tensor:
    return torch.einsum("blnh,bmnh->bnlm", q_BLNH.float(), k_BMNH) * q_BLNH.shape[-1] ** -0.5


def _heads_first(*tensors: Tensor) -> tuple[Tensor, ...]:
    return tuple(x.transpose(1, 2) for x in tensors)


def _heads_second(grads: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = grads
    return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)

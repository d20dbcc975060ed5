"""Sequence parallelism around a trunk, from outside: its tokens are split over processes, and gathered behind it.

Shape suffixes as in `model.py`: B batch, L tokens, D width, P rotary pairs, R timesteps.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any, cast

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from ..attention import Attention
from .lse import LseAttention, ring_kernel
from .ring import Ring
from .ulysses import Ulysses

TOKEN_AXIS = {"x_BLD": 1, "rope_LP": 0, "rows_BL": 1, "vace_BLD": 1}  # of what a trunk's forward takes


def sequence_parallel(
    trunk: nn.Module,
    *,
    ulysses: dist.ProcessGroup | None = None,
    ring: dist.ProcessGroup | None = None,
    kernel: LseAttention | None = None,
) -> None:
    """Split the tokens of a trunk over one group, or over the product of two: a ring of processes, each a Ulysses group.

    trunk: `wan_dit.model.Trunk`, or one like it: `blocks` (and `vace_blocks`) with `self_attn.attend`, and a forward with
    arguments of the names in `TOKEN_AXIS`
    kernel: of the ring; None for each block's own attention, where that returns its log-sum-exp too. Ulysses alone keeps it
    Every process calls the trunk with the same whole tensors and gets the whole result. Token counts that do not divide are
    padded; padding is not attended to.

    Gradients are those of the sum of the losses of all processes. Averaged over the group, as DDP and FSDP do, they are the
    gradients of one process, inside the trunk and outside.

    Raises ValueError where the heads do not divide by the Ulysses degree, or where a ring cannot use the blocks' attention.
    """
    ulysses, ring = (None if group is None or group.size() == 1 else group for group in (ulysses, ring))
    if ulysses is None and ring is None:
        return
    blocks = [*cast(nn.ModuleList, trunk.blocks), *getattr(trunk, "vace_blocks", ())]
    if ulysses is not None:
        check_heads(blocks[0].self_attn.num_heads, ulysses.size())
    attends = [block.self_attn.attend if ring is None else Ring(ring, kernel or ring_kernel(block.self_attn.attend)) for block in blocks]
    split = _Split(trunk, [group for group in (ulysses, ring) if group is not None])
    for block, attend in zip(blocks, attends, strict=True):
        block.self_attn.attend = split.attention(attend if ulysses is None else Ulysses(ulysses, attend))
    trunk.register_forward_pre_hook(split.before, with_kwargs=True)
    trunk.register_forward_hook(split.after)


def is_split(trunk: nn.Module) -> bool:
    """Whether `sequence_parallel` has been applied."""
    return any(isinstance(getattr(hook, "__self__", None), _Split) for hook in trunk._forward_pre_hooks.values())


def check_heads(heads: int, degree: int) -> None:
    """ValueError where Ulysses of this degree cannot split so many heads."""
    if heads % degree:
        fitting = ", ".join(str(size) for size in range(2, heads + 1) if heads % size == 0)
        raise ValueError(f"{heads} attention heads do not divide by a Ulysses degree of {degree}: use {fitting}, and a ring for the rest")


class _Split:
    """The hooks of one trunk, and the token count of the call that is being computed.

    groups: from the inner to the outer, in the order of the tokens
    """

    def __init__(self, trunk: nn.Module, groups: list[dist.ProcessGroup]) -> None:
        self.signature, self.groups = inspect.signature(trunk.forward), groups
        self.tokens, self.rank, self.size = 0, 0, 1
        for group in groups:
            self.rank, self.size = self.rank + self.size * group.rank(), self.size * group.size()

    def attention(self, parallel: Callable[..., Tensor]) -> Attention:
        return lambda q_BLNH, k_BLNH, v_BLNH: parallel(q_BLNH, k_BLNH, v_BLNH, self.tokens)

    def before(self, trunk: nn.Module, args: Any, kwargs: Any) -> tuple[Any, Any]:
        """Of everything with a token axis, the part of this process."""
        bound = self.signature.bind(*args, **kwargs)
        self.tokens = bound.arguments["x_BLD"].shape[1]
        for name, axis in TOKEN_AXIS.items():
            value = bound.arguments.get(name)
            if value is not None and (name != "rows_BL" or value.shape[axis] == self.tokens):  # rows may be one a sample
                bound.arguments[name] = self.part(value, axis)
        return bound.args, bound.kwargs

    def part(self, whole: Tensor, axis: int) -> Tensor:
        length = -(-self.tokens // self.size)
        start = min(self.rank * length, self.tokens)
        part = whole.narrow(axis, start, min(length, self.tokens - start))
        missing = length - part.shape[axis]
        return F.pad(part, (*(0, 0) * (part.ndim - 1 - axis), 0, missing)) if missing else part

    def after(self, trunk: nn.Module, args: Any, x_BLD: Tensor) -> Tensor:
        """All tokens, on every process."""
        if x_BLD.requires_grad:  # checkpointed blocks run again in the backward, perhaps after a call with other tokens
            x_BLD.register_hook(partial(self._resume, self.tokens))
        for group in self.groups:
            x_BLD = gather_tokens(x_BLD, group)
        return x_BLD[:, : self.tokens]

    def _resume(self, tokens: int, grad: Tensor) -> None:
        self.tokens = tokens


def gather_tokens(x_BLD: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Tokens of all processes of a group, one part after the other; its backward sums the gradients of all of them."""
    gathered: Tensor = _Gather.apply(x_BLD, group)
    return gathered


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_BLD: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        x_LBD = x_BLD.transpose(0, 1).contiguous()
        gathered = x_LBD.new_empty(group.size() * x_LBD.shape[0], *x_LBD.shape[1:])
        dist.all_gather(list(gathered.chunk(group.size())), x_LBD, group=group)
        return gathered.transpose(0, 1)

    @staticmethod
    def backward(ctx: Any, grad_BLD: Tensor) -> tuple[Tensor, None]:
        grad_LBD = grad_BLD.transpose(0, 1).contiguous()
        part = grad_LBD.new_empty(grad_LBD.shape[0] // ctx.group.size(), *grad_LBD.shape[1:])
        dist.reduce_scatter(part, list(grad_LBD.chunk(ctx.group.size())), group=ctx.group)
        return part.transpose(0, 1), None

"""Attention cache: self-attention is computed every few evaluations, and its output used again in between.

The Wan report (arXiv 2503.20314), section 4.4, whose CFG cache is `cfg-gate:after=0,every=N`. The output of every block is kept
for each branch: as much memory as the tokens, times the blocks. While the trunk runs, its blocks attend through the cache, so that
a backbone must not run in two threads at once.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

from torch import Tensor, nn

from ..attention import Attention
from .base import CacheRun, Forward, Group, Position, State


@dataclass(frozen=True)
class AttentionCache:
    """every: evaluations from one computed attention to the next; 1 never uses one again
    first: evaluations of each expert that are always computed, as is the last of a run
    """

    every: int = 2
    first: int = 5

    def start(self, timesteps: Tensor, boundary: float | None = None, group: Group = None) -> AttentionCacheRun:
        return AttentionCacheRun(self, timesteps, boundary, group)


class AttentionCacheRun(CacheRun):
    skips = "self-attention"

    def __init__(self, policy: AttentionCache, timesteps: Tensor, boundary: float | None, group: Group) -> None:
        super().__init__(timesteps, boundary, group)
        self.policy = policy

    def evaluate(self, state: State, branch: str, position: Position, forward: Forward, latents: Tensor) -> tuple[Tensor, bool]:
        fixed = position.last or position.index < self.policy.first or "outputs" not in state
        computed = self.agreed(fixed or state["age"] >= self.policy.every)
        state["age"] = 1 if computed else state["age"] + 1
        outputs: list[Tensor] = [] if computed else list(state["outputs"])

        def run_trunk(trunk: nn.Module, *given: Any) -> Tensor:
            with _attending(trunk, outputs, computed):
                out_BLD: Tensor = trunk(*given)
            return out_BLD

        velocity = forward(run_trunk=run_trunk)
        if computed:
            state["outputs"] = outputs
        return velocity, computed


@contextmanager
def _attending(trunk: nn.Module, outputs: list[Tensor], record: bool) -> Iterator[None]:
    """While it lasts, the attentions of all blocks leave their outputs in the list, or take them from it, in the order of their calls."""
    blocks = [*cast(nn.ModuleList, trunk.blocks), *getattr(trunk, "vace_blocks", ())]
    attends: list[Attention] = [block.self_attn.attend for block in blocks]

    def recording(attend: Attention) -> Attention:
        def call(q_BLNH: Tensor, k_BLNH: Tensor, v_BLNH: Tensor) -> Tensor:
            outputs.append(attend(q_BLNH, k_BLNH, v_BLNH))
            return outputs[-1]

        return call

    try:
        for block, attend in zip(blocks, attends, strict=True):
            block.self_attn.attend = recording(attend) if record else lambda *qkv: outputs.pop(0)
        yield
    finally:
        for block, attend in zip(blocks, attends, strict=True):
            block.self_attn.attend = attend

"""CFG gate: the forward of the negative prompt is left out, and its last difference to that of the prompt is used again.

The difference hardly changes in the later half of a run (the gate of FastVideo; the CFG cache of the Wan report, arXiv
2503.20314, section 4.4, which computes it anew every few evaluations, and corrects it besides, which is not done here).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..contracts import Backbone, Conditioning, Context
from ..guidance import guided_velocity
from .base import Branch, CacheRun, Forward, Group, Position, State


@dataclass(frozen=True)
class CfgGate:
    """after: part of each expert's evaluations after which the gate may close; 1 leaves it open
    every: evaluations from one difference to the next; 0 keeps the last one to the end
    """

    after: float = 0.5
    every: int = 0
    of_guidance: ClassVar[bool] = True

    def start(self, timesteps: Tensor, boundary: float | None = None, group: Group = None) -> CfgGateRun:
        return CfgGateRun(self, timesteps, boundary, group)


class CfgGateRun(CacheRun):
    """Every process of a group decides alike, since it is the place in the run that decides."""

    skips = "negative forward"
    needs_trunk = False

    def __init__(self, policy: CfgGate, timesteps: Tensor, boundary: float | None, group: Group) -> None:
        super().__init__(timesteps, boundary, group)
        self.policy = policy

    def velocity(
        self,
        backbone: Backbone,
        latents: Tensor,
        timestep: Tensor,
        context: Context,
        negative_context: Context | None,
        scale: float,
        conditioning: Conditioning | None = None,
        *,
        step: int,
        expert: str | int = 0,
        guided: Callable[..., Tensor] = guided_velocity,
    ) -> Tensor:
        if negative_context is None or scale in (0, 1):  # the difference has no part in it, or cannot be told
            given = backbone, latents, timestep, context, negative_context, scale, conditioning
            return super().velocity(*given, step=step, expert=expert, guided=guided)
        state, position = self.state_of("negative", step, expert), self.position(step)
        closed = position.index >= self.policy.after * position.count and "difference" in state
        computed = not closed or (self.policy.every > 0 and state["age"] >= self.policy.every)
        self.count("positive", True)
        self.count("negative", computed)
        if not computed:
            state["age"] += 1
            positive = guided(backbone, latents, timestep, context, None, 1.0, conditioning)
            return positive + (scale - 1) * state["difference"]
        branches = Branch("positive", context), Branch("negative", negative_context)
        both = guided(partial(_with_negative, backbone), latents, timestep, *branches, scale, conditioning)
        velocity, weighted = both.chunk(2)
        state.update(difference=(velocity - weighted / (1 - scale)) / scale, age=1)
        return velocity

    def evaluate(self, state: State, branch: str, position: Position, forward: Forward, latents: Tensor) -> tuple[Tensor, bool]:
        return forward(), True


def _with_negative(
    backbone: Callable[..., Tensor],
    latents: Tensor,
    timestep: Tensor,
    branch: Branch,
    conditioning: Conditioning | None = None,
    **more: Any,
) -> Tensor:
    """The velocity of a branch and, behind it on the batch axis, that of the negative one or zeros, which `guided` makes
    (1 - scale) * negative of. So both come out on every process, also where each has run one branch only."""
    velocity = backbone(latents, timestep, branch.context, conditioning, **more)
    return torch.cat([velocity, velocity if branch.name == "negative" else torch.zeros_like(velocity)])

"""First-block cache: only the first block runs while what it adds to the tokens has changed little.

The dynamic caching of ParaAttention (2024): the relative L1 change of the first block's residual since the last evaluation in
which all blocks ran decides; else what the other blocks added then is added again.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from .base import CacheRun, Forward, Group, Position, State, relative_change

FIRST, REST = slice(0, 1), slice(1, None)


@dataclass(frozen=True)
class FirstBlockCache:
    """threshold: of the change; 0 always runs all blocks. Reported as good are 0.06 for Wan2.1 14B and 0.03 for 1.3B
    first: evaluations of each expert that are always computed, as is the last of a run
    """

    threshold: float = 0.06
    first: int = 1

    def start(self, timesteps: Tensor, boundary: float | None = None, group: Group = None) -> FirstBlockRun:
        return FirstBlockRun(self, timesteps, boundary, group)


class FirstBlockRun(CacheRun):
    skips = "blocks after the first"

    def __init__(self, policy: FirstBlockCache, timesteps: Tensor, boundary: float | None, group: Group) -> None:
        super().__init__(timesteps, boundary, group)
        self.policy = policy

    def due(self, state: State, branch: str, position: Position, first: Tensor) -> bool:
        if "first" in state and (due := self.due_with_prompt(branch, position.step)) is not None:
            return due
        if "first" not in state or position.last or position.index < self.policy.first:
            return True
        return not relative_change(first, state["first"]) < self.policy.threshold

    def evaluate(self, state: State, branch: str, position: Position, forward: Forward, latents: Tensor) -> tuple[Tensor, bool]:
        computed = True

        def run_trunk(trunk: nn.Module, x_BLD: Tensor, *given: Any) -> Tensor:
            nonlocal computed
            *shared, vace_BLD, vace_scale = given
            first_BLD: Tensor = trunk(x_BLD, *shared, blocks=FIRST)
            state["due"] = computed = self.agreed(self.due(state, branch, position, first_BLD - x_BLD))
            if not computed:
                reused: Tensor = first_BLD + state["rest"]
                return reused
            # the hints of VACE are made of the tokens before the first block, which therefore has to run again
            whole = vace_BLD is not None
            out_BLD: Tensor = trunk(x_BLD, *shared, vace_BLD, vace_scale) if whole else trunk(first_BLD, *shared, blocks=REST)
            state["first"], state["rest"] = first_BLD - x_BLD, out_BLD - first_BLD
            return out_BLD

        return forward(run_trunk=run_trunk), computed

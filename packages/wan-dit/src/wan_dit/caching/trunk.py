"""Caches that leave out the whole trunk: what it adds to the tokens is taken from the last evaluation in which it ran."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from .base import CacheRun, Forward, Position, State


class TrunkRun(CacheRun):
    """A subclass writes `due`. The residual of the trunk, as large as its tokens, is kept for each branch."""

    skips = "trunk"

    def due(self, state: State, branch: str, position: Position, modulation: Tensor) -> bool:
        """Whether the trunk has to run. It runs in any case where there is no residual yet.

        modulation: `[R, 6, D]`, what time does to the blocks
        """
        raise NotImplementedError

    def ran(self, state: State) -> None:
        """Note that the trunk has run: what has been summed up since the last time begins at zero."""

    def evaluate(self, state: State, branch: str, position: Position, forward: Forward, latents: Tensor) -> tuple[Tensor, bool]:
        computed = True

        def run_trunk(trunk: nn.Module, x_BLD: Tensor, rope_LP: Tensor, modulation_R6D: Tensor, *rest: Any) -> Tensor:
            nonlocal computed
            due = self.due(state, branch, position, modulation_R6D)
            computed = self.agreed(due or position.last or "residual" not in state)
            if not computed:
                reused: Tensor = x_BLD + state["residual"]
                return reused
            out_BLD: Tensor = trunk(x_BLD, rope_LP, modulation_R6D, *rest)
            state["residual"] = out_BLD - x_BLD
            self.ran(state)
            return out_BLD

        return forward(run_trunk=run_trunk), computed

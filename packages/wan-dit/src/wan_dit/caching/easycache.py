"""EasyCache: the whole forward is left out while the velocity is expected to change little.

Zhou et al., "Less is Enough: Training-Free Video Diffusion Acceleration via Runtime-Adaptive Caching" (2025). How much the velocity
moves where the latents move is measured between the last two evaluations that were computed; the relative change that it
predicts is summed up until it passes a threshold. In between the velocity keeps its distance to the latents.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from .base import CacheRun, Forward, Group, Position, State


@dataclass(frozen=True)
class EasyCache:
    """threshold: of the summed relative change; 0 never leaves anything out
    first: evaluations of each expert that are always computed, as is the last of a run
    """

    threshold: float = 0.05
    first: int = 10

    def start(self, timesteps: Tensor, boundary: float | None = None, group: Group = None) -> EasyCacheRun:
        return EasyCacheRun(self, timesteps, boundary, group)


class EasyCacheRun(CacheRun):
    skips = "forward"
    needs_trunk = False

    def __init__(self, policy: EasyCache, timesteps: Tensor, boundary: float | None, group: Group) -> None:
        super().__init__(timesteps, boundary, group)
        self.policy = policy

    def due(self, state: State, branch: str, position: Position, latents: Tensor) -> bool:
        if (due := self.due_with_prompt(branch, position.step)) is not None:
            return due
        before, state["latents"] = state.get("latents"), latents
        if before is None or "rate" not in state or position.last or position.index < self.policy.first:
            return True
        moved = (latents - before).abs().mean()
        state["change"] = state.get("change", 0.0) + float(state["rate"] * moved / state["velocity"].abs().mean())
        return not state["change"] < self.policy.threshold

    def evaluate(self, state: State, branch: str, position: Position, forward: Forward, latents: Tensor) -> tuple[Tensor, bool]:
        latents = latents.float()
        state["due"] = self.agreed("velocity" not in state or self.due(state, branch, position, latents))
        if not state["due"]:
            return latents + (state["velocity"] - state["at"]), False
        velocity = forward()
        if "velocity" in state:
            state["rate"] = float((velocity - state["velocity"]).abs().mean() / (latents - state["at"]).abs().mean())
        state.update(velocity=velocity, at=latents, change=0.0)
        return velocity, True

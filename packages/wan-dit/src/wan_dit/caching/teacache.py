"""TeaCache: the trunk is left out while the time embedding has changed little.

Liu et al., "Timestep Embedding Tells: It's Time to Cache for Video Diffusion Model" (2024), in its form for Wan2.1: the
relative L1 change of the modulation from one evaluation to the next, which a polynomial turns into an estimate of how
much the output changes, is summed up until it passes a threshold.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ..contracts import Backbone
from .base import Group, Position, State, relative_change
from .tables import TEACACHE
from .trunk import TrunkRun

AUTO, RAW = "auto", "raw"


@dataclass(frozen=True)
class TeaCache:
    """threshold: of the summed estimate; 0 never leaves anything out
    coefficients: the model whose polynomial is taken, one of `wan_dit.caching.tables.TEACACHE`; `raw` for the change itself; `auto`
    for the polynomial of the backbone where it has that name, else `raw`
    first: evaluations of each expert that are always computed, as is the last of a run
    """

    threshold: float = 0.2
    coefficients: str = AUTO
    first: int = 5

    def __post_init__(self) -> None:
        if self.coefficients not in (known := (AUTO, RAW, *TEACACHE)):
            raise ValueError(f"teacache has no coefficients '{self.coefficients}': use one of {', '.join(known)}")

    def start(self, timesteps: Tensor, boundary: float | None = None, group: Group = None) -> TeaCacheRun:
        return TeaCacheRun(self, timesteps, boundary, group)


class TeaCacheRun(TrunkRun):
    def __init__(self, policy: TeaCache, timesteps: Tensor, boundary: float | None, group: Group) -> None:
        super().__init__(timesteps, boundary, group)
        self.policy, self.coefficients = policy, policy.coefficients

    def velocity(self, backbone: Backbone, *given: Any, **more: Any) -> Tensor:
        if self.coefficients == AUTO:
            name = getattr(getattr(backbone, "spec", None), "name", RAW)
            self.coefficients = name if name in TEACACHE else RAW
        return super().velocity(backbone, *given, **more)

    def due(self, state: State, branch: str, position: Position, modulation: Tensor) -> bool:
        before, state["modulation"] = state.get("modulation"), modulation
        if before is None:
            return True
        state["distance"] = state.get("distance", 0.0) + self.estimate(relative_change(modulation, before))
        return position.index < self.policy.first or not 0 < self.policy.threshold > state["distance"]

    def estimate(self, change: float) -> float:
        """How much the output changes where the modulation changes by so much."""
        if self.coefficients == RAW:
            return change
        total = 0.0
        for coefficient in TEACACHE[self.coefficients]:
            total = total * change + coefficient
        return total

    def ran(self, state: State) -> None:
        state["distance"] = 0.0

    def report(self) -> dict[str, Any]:
        return {**super().report(), "coefficients": self.coefficients}

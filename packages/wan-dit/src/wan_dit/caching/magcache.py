"""MagCache: the trunk is left out while the magnitude of what it adds is known to have changed little.

Ma et al., "MagCache: Fast Video Generation with Magnitude-Aware Cache" (2025). The mean ratio of that magnitude from one
evaluation to the next is nearly the same for all prompts. So it is measured once a model: some models are in
`wan_dit.caching.tables`, `calibrate` in `wan_dit.caching` measures others.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from .base import BRANCHES, CacheRun, Forward, Group, Position, State
from .tables import MAGCACHE
from .trunk import TrunkRun

Ratios = Mapping[str, tuple[float, ...]]  # by branch, one an evaluation


@dataclass(frozen=True)
class MagCache:
    """ratios: the model whose ratios are taken, one of `wan_dit.caching.tables.MAGCACHE`; or a JSON file that `calibrate` has written
    threshold: of the summed error; 0 never leaves anything out
    most: evaluations in a row that are left out at most
    retention: part of each expert's evaluations that is always computed, at its start; so is the last of a run
    """

    ratios: str
    threshold: float = 0.12
    most: int = 2
    retention: float = 0.2
    table: Ratios = field(init=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "table", MAGCACHE.get(self.ratios) or read_ratios(self.ratios))

    def start(self, timesteps: Tensor, boundary: float | None = None, group: Group = None) -> MagCacheRun:
        return MagCacheRun(self, timesteps, boundary, group)


class MagCacheRun(TrunkRun):
    def __init__(self, policy: MagCache, timesteps: Tensor, boundary: float | None, group: Group) -> None:
        super().__init__(timesteps, boundary, group)
        self.policy = policy
        self.ratios = {branch: nearest(policy.table[branch], self.steps) for branch in BRANCHES}

    def due(self, state: State, branch: str, position: Position, modulation: Tensor) -> bool:
        if "residual" not in state or position.index < int(self.policy.retention * position.count):
            return True
        state["ratio"] *= self.ratios[branch][position.step]
        state["error"] += abs(1 - state["ratio"])
        state["row"] += 1
        return not (state["error"] < self.policy.threshold and state["row"] <= self.policy.most)

    def ran(self, state: State) -> None:
        state.update(ratio=1.0, error=0.0, row=0)


class Calibration(CacheRun):
    """A run without a cache that measures ratios: `velocity` for every evaluation, then `ratios`."""

    def __init__(self, timesteps: Tensor, boundary: float | None = None, group: Group = None) -> None:
        super().__init__(timesteps, boundary, group)
        self.measured: dict[str, list[float]] = {branch: [] for branch in BRANCHES}

    def evaluate(self, state: State, branch: str, position: Position, forward: Forward, latents: Tensor) -> tuple[Tensor, bool]:
        def run_trunk(trunk: Any, x_BLD: Tensor, *given: Any) -> Tensor:
            out_BLD: Tensor = trunk(x_BLD, *given)
            before, state["norms"] = state.get("norms"), (out_BLD - x_BLD).float().norm(dim=-1)
            self.measured[branch].append(1.0 if before is None else float((state["norms"] / before).mean()))
            return out_BLD

        return forward(run_trunk=run_trunk), True

    @property
    def ratios(self) -> Ratios:
        """By branch; those of the prompt for both where there was no guidance."""
        positive = tuple(self.measured["positive"])
        return {"positive": positive, "negative": tuple(self.measured["negative"]) or positive}


def read_ratios(path: str) -> Ratios:
    """Ratios from a file `{"positive": [...], "negative": [...]}`; ValueError where it is none."""
    if not Path(path).is_file():
        raise ValueError(f"magcache has no ratios '{path}': use one of {', '.join(MAGCACHE)}, or a file that calibrate has written")
    try:
        read = json.loads(Path(path).read_text())
        ratios = {branch: tuple(float(ratio) for ratio in read[branch]) for branch in BRANCHES}
        if not all(ratios.values()):
            raise ValueError("no numbers")
        return ratios
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{path} holds no ratios, expected {{'positive': [numbers], 'negative': [numbers]}}") from error


def write_ratios(ratios: Ratios, path: str | Path) -> None:
    Path(path).write_text(json.dumps({branch: list(ratios[branch]) for branch in BRANCHES}) + "\n")


def nearest(ratios: tuple[float, ...], count: int) -> tuple[float, ...]:
    """So many of them, each the nearest of those that were measured at another number of evaluations."""
    stride = (len(ratios) - 1) / max(count - 1, 1)
    return tuple(ratios[round(i * stride)] for i in range(count))

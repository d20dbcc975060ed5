"""Two caches at once: one within the forwards, and one that chooses among the forwards of guidance."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor

from ..contracts import Cache, CacheRun
from ..guidance import guided_velocity
from .base import BRANCHES, Group


class Combined:
    """Example: `Combined(AttentionCache(every=2), CfgGate(after=0, every=2))`, the two caches of the Wan report.

    Raises ValueError where it is not one cache within the forwards and one of guidance.
    """

    def __init__(self, *caches: Cache) -> None:
        self.caches = sorted(caches, key=_of_guidance)
        if [_of_guidance(cache) for cache in self.caches] != [False, True]:
            names = " and ".join(type(cache).__name__ for cache in caches)
            raise ValueError(f"{names} do not go together: give at most one cache of the forward and one of guidance, such as cfg-gate")

    def start(self, timesteps: Tensor, boundary: float | None = None, group: Group = None) -> CombinedRun:
        return CombinedRun([cache.start(timesteps, boundary, group) for cache in self.caches])


class CombinedRun:
    def __init__(self, runs: list[CacheRun]) -> None:
        self.within, self.among = runs

    def velocity(self, *given: Any, step: int, expert: str | int = 0, guided: Callable[..., Tensor] = guided_velocity) -> Tensor:
        among = partial(self.among.velocity, step=step, expert=expert, guided=guided)
        return self.within.velocity(*given, step=step, expert=expert, guided=among)

    def report(self) -> dict[str, Any]:
        """What both have skipped; the one of guidance has seen every evaluation."""
        reports = [run.report() for run in (self.within, self.among)]
        branches = {
            branch: {
                "evaluations": reports[1]["branches"][branch]["evaluations"],
                "skipped": sum(report["branches"][branch]["skipped"] for report in reports),
            }
            for branch in BRANCHES
        }
        totals = {name: sum(counts[name] for counts in branches.values()) for name in ("evaluations", "skipped")}
        return {**totals, "skips": " and ".join(report["skips"] for report in reports), "branches": branches}

    def state_dict(self) -> dict[str, Any]:
        return {"within": self.within.state_dict(), "among": self.among.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.within.load_state_dict(state["within"])
        self.among.load_state_dict(state["among"])


def _of_guidance(cache: Cache) -> bool:
    return getattr(cache, "of_guidance", False)

"""What to do about a step whose loss or gradient norm is not a number, or far above those of the steps before."""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass
from enum import IntEnum
from statistics import median
from typing import Any

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from wan_dit.parallel import agree

MAD_TO_DEVIATION = 1.4826  # of a normal distribution


class Verdict(IntEnum):
    """In order of severity: go on; leave the weights as they are; take up an earlier checkpoint; end the run."""

    GO = 0
    SKIP = 1
    ROLLBACK = 2
    STOP = 3


@dataclass(frozen=True)
class Limits:
    """When a step is too far off.

    window: good steps that a new one is compared with; start: good steps before a spike is looked for
    spike: how many robust deviations above the median is a spike, 0 to look for none
    floor: the least deviation, as a share of the median, so that a flat history makes no spike of noise
    skips: bad steps in a row before a rollback; rollbacks: in a row, each with no `window` of good steps after it, before the end
    """

    window: int = 128
    start: int = 32
    spike: float = 20.0
    floor: float = 0.02
    skips: int = 3
    rollbacks: int = 2


class Guard:
    """Judges each step by its loss and gradient norm, before the weights are changed, against the median of the good steps before.

    Give it the figures of the whole step, the same on all processes; they act alike even where one of them has others. After a
    rollback go on with the next samples, not with those that led to it, and keep this guard, which counts rollbacks.
    `reason` says in words what was wrong with the last step that was not good.
    """

    def __init__(self, limits: Limits | None = None) -> None:
        self.limits = limits or Limits()
        self.reason = ""
        self._bad = self._rollbacks = self._good = 0
        self._losses: deque[float] = deque(maxlen=self.limits.window)
        self._norms: deque[float] = deque(maxlen=self.limits.window)

    def decide(self, loss: float, norm: float, group: dist.ProcessGroup | DeviceMesh | None = None) -> Verdict:
        """The verdict on a step; with a group the worst that any of its processes comes to."""
        verdict = self.judge(loss, norm)
        if group is not None:
            agreed = Verdict(int(agree(int(verdict), group)))
            self.reason = self.reason if agreed == verdict else "another process found it bad"
            verdict = agreed
        self._note(verdict, loss, norm)
        return verdict

    def judge(self, loss: float, norm: float) -> Verdict:
        """The verdict of this process alone; changes nothing but `reason`."""
        self.reason = self._fault("loss", loss, self._losses) or self._fault("gradient norm", norm, self._norms)
        if not self.reason:
            return Verdict.GO
        if self._bad < self.limits.skips:
            return Verdict.SKIP
        return Verdict.ROLLBACK if self._rollbacks < self.limits.rollbacks else Verdict.STOP

    def reset(self) -> None:
        """Forget the history: for a stage with another loss. Rollbacks count on, since one may cross the border of a stage again."""
        self._bad = self._good = 0
        self._losses.clear()
        self._norms.clear()

    def state(self) -> dict[str, Any]:
        """Plain values for a checkpoint."""
        return {"losses": list(self._losses), "norms": list(self._norms), "counts": [self._bad, self._rollbacks, self._good]}

    def load(self, state: dict[str, Any]) -> None:
        """Go on where `state` was taken."""
        self._losses = deque(state["losses"], self.limits.window)
        self._norms = deque(state["norms"], self.limits.window)
        self._bad, self._rollbacks, self._good = state["counts"]

    def _fault(self, name: str, value: float, history: deque[float]) -> str:
        if not math.isfinite(value):
            return f"the {name} is {value}"
        if not self.limits.spike or len(history) < self.limits.start:
            return ""
        middle = median(history)
        spread = MAD_TO_DEVIATION * median(abs(other - middle) for other in history)
        deviations = (value - middle) / max(spread, self.limits.floor * abs(middle), 1e-12)
        if deviations <= self.limits.spike:
            return ""
        return f"the {name} is {value:.4g}, {deviations:.0f} deviations above the median {middle:.4g} of {len(history)} steps"

    def _note(self, verdict: Verdict, loss: float, norm: float) -> None:
        if verdict is Verdict.GO:
            self._losses.append(loss)
            self._norms.append(norm)
            self._bad, self._good = 0, self._good + 1
            if self._good >= self.limits.window:
                self._rollbacks = 0
            return
        self._good = 0
        self._bad = self._bad + 1 if verdict is Verdict.SKIP else 0
        self._rollbacks += verdict is Verdict.ROLLBACK

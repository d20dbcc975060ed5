"""A learning rate that falls where a validation figure no longer gets better, as the report lowers it on FID and CLIP score."""

from __future__ import annotations

import math
from typing import Any

from .config import PlateauConfig


class Plateau:
    """Watches one figure; `share` is what the rate is multiplied by."""

    def __init__(self, config: PlateauConfig) -> None:
        self.config = config
        self.best, self.waited, self.share = math.nan, 0, 1.0

    def see(self, figures: dict[str, float]) -> None:
        """Take in the figures of a validation. ValueError where the one that is watched is not among them."""
        name, sign = self.config.figure, 1 if self.config.better == "higher" else -1
        if name not in figures:
            raise ValueError(f"optimiser.plateau.figure '{name}' is not measured: there are {', '.join(sorted(figures)) or 'none'}")
        value = figures[name]
        if math.isnan(self.best) or sign * (value - self.best) > self.config.least:
            self.best, self.waited = value, 0
            return
        self.waited += 1
        if self.waited > self.config.patience:
            self.waited, self.share = 0, max(self.share * self.config.factor, self.config.floor)

    @property
    def spent(self) -> bool:
        """Whether the rate is as low as it gets: the time for the next stage, or the end."""
        return self.share <= self.config.floor

    def state(self) -> dict[str, Any]:
        """Plain values for a checkpoint."""
        return {"best": None if math.isnan(self.best) else self.best, "waited": self.waited, "share": self.share}

    def load(self, state: dict[str, Any]) -> None:
        self.best = math.nan if state["best"] is None else state["best"]
        self.waited, self.share = state["waited"], state["share"]

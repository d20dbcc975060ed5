"""What the processes of the preview tests do: train to previews, at which one of them may fail or be slow."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import ExitStack
from datetime import timedelta
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import _set_pg_timeout
from wan_train.config import TrainConfig
from wan_train.copies import Template
from wan_train.tracker import Tracker
from wan_train.trainer import Trainer

PATCHED: dict[str, tuple[type, str]] = {"copies": (Template, "filled"), "grid": (Tracker, "grid")}


class Shown:
    """Takes what a tracker gets."""

    def __init__(self) -> None:
        self.figures: dict[str, float] = {}
        self.clips: Tensor | None = None

    def log(self, step: int, figures: dict[str, float]) -> None:
        self.figures = figures

    def grid(self, step: int, clips: Tensor) -> None:
        self.clips = clips


def first_preview(recipe: str, overrides: list[str]) -> dict[str, Any]:
    """A preview before any step: which clips this process was asked for, and what came of all."""
    trainer, shown, asked = Trainer(TrainConfig.from_toml(Path(recipe), overrides)), Shown(), []
    original = trainer.objective.preview

    def preview(modules: dict[str, Any], indices: Any) -> Tensor:
        asked.extend(indices)
        return original(modules, indices)

    trainer.objective.preview = preview  # type: ignore[method-assign]
    trainer._preview(shown)  # type: ignore[arg-type]
    return {"asked": asked, "figures": shown.figures, "clips": None if shown.clips is None else shown.clips.numpy()}


def plateau(recipe: str, overrides: list[str]) -> dict[str, Any]:
    """What the rate's plateau knows at the end of a run."""
    trainer = Trainer(TrainConfig.from_toml(Path(recipe), overrides))
    trainer.run()
    assert trainer.optimiser.plateau is not None
    return trainer.optimiser.plateau.state()


def failing(recipe: str, overrides: list[str], where: str, rank: int, error: Exception) -> tuple[str, str, str]:
    """How a run ends in which a process fails in its first preview: the error and its cause."""
    with ExitStack() as stack:
        if where in PATCHED and dist.get_rank() == rank:
            stack.enter_context(patch.object(*PATCHED[where], raising(error)))
        trainer = Trainer(TrainConfig.from_toml(Path(recipe), overrides))
        if where not in PATCHED and dist.get_rank() == rank:
            stack.enter_context(patch.object(trainer.objective if where == "preview" else trainer.objective.dataset, where, raising(error)))
        try:
            trainer.run()
        except Exception as caught:
            return type(caught).__name__, str(caught), repr(caught.__cause__)
    return "none", "", ""


def slow(recipe: str, overrides: list[str], training: float, meeting: float) -> list[str]:
    """The errors of a preview in which the second process takes 3 seconds longer; how long each group waits for a process."""
    trainer = Trainer(TrainConfig.from_toml(Path(recipe), overrides))
    dist.barrier()
    _set_pg_timeout(timedelta(seconds=training))
    _set_pg_timeout(timedelta(seconds=meeting), trainer.ranks.group)
    original = trainer.objective.preview

    def preview(modules: dict[str, Any], indices: Any) -> Tensor:
        time.sleep(3 if dist.get_rank() == 1 else 0)
        return original(modules, indices)

    trainer.objective.preview = preview  # type: ignore[method-assign]
    try:
        trainer._preview(Shown())  # type: ignore[arg-type]
    except RuntimeError as error:
        return [str(error)]
    finally:
        _set_pg_timeout(timedelta(seconds=60))
    return []


def raising(error: Exception) -> Callable[..., Any]:
    def fail(*given: Any, **named: Any) -> Any:
        raise error

    return fail

"""Where a run stands after a step: saved, and gone on with to the same bits."""

from __future__ import annotations

import io
import os
import pickle
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor

from ._shared.files import replacing
from .manifest import Run

FORMAT = "wan-dit-state/1"


@dataclass(frozen=True)
class RunState:
    """A run between two steps; its tensors are on the CPU where it was read from a file.

    run: what decides the pixels
    latents: `[1, C, T', H', W']` after the step
    scheduler: the state of the scheduler; cache: that of a cache, None where there is none
    generator: of the random numbers
    timings: seconds by phase so far
    """

    run: Run
    latents: Tensor = field(repr=False)
    scheduler: dict[str, Any] = field(repr=False)
    generator: Tensor = field(repr=False)
    timings: dict[str, float]
    cache: dict[str, Any] | None = field(default=None, repr=False)

    @property
    def steps_done(self) -> int:
        """Model evaluations that are done."""
        return int(self.scheduler["i"])

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write a file that appears whole or not at all; it is read without running code."""
        fields = {
            "latents": self.latents.cpu(), "scheduler": _on_cpu(self.scheduler), "generator": self.generator,
            "timings": dict(self.timings), "cache": _on_cpu(self.cache),
        }  # fmt: skip
        content = io.BytesIO()  # torch's own writer fails in other ways than OSError on a full disk
        torch.save({"format": FORMAT, "run": self.run.model_dump_json(), **fields}, content)
        with replacing(path) as scratch:
            scratch.write_bytes(content.getbuffer())
        return Path(path)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> RunState:
        """Read a file that `save` wrote; ValueError where it is none, or cut."""
        if not Path(path).is_file():
            raise FileNotFoundError(f"no run state at '{path}'")
        try:
            content = torch.load(path, map_location="cpu", weights_only=True)
            if content.pop("format") != FORMAT:
                raise ValueError("it is of another format")
            return cls(Run.model_validate_json(content.pop("run")), **content)
        except PermissionError:
            raise
        except (
            OSError,
            RuntimeError,
            EOFError,
            KeyError,
            ValueError,
            TypeError,
            AttributeError,
            ValidationError,
            pickle.UnpicklingError,
        ) as error:
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise ValueError(f"'{path}' is not the state of a run, or is damaged ({reason[:120]})") from error


def _on_cpu(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach().cpu()
    if isinstance(value, dict):
        return {key: _on_cpu(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_on_cpu(inner) for inner in value)
    return value

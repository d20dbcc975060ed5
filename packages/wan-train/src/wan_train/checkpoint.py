"""Checkpoints of a run: weights, averaged weights, optimiser, random state and step in one file, replaced atomically."""

from __future__ import annotations

import os
import pickle
from pathlib import Path
from typing import Any

import torch
from wan_dit._shared.files import replacing


def save(path: Path, state: dict[str, Any]) -> None:
    """Write `state` so that a kill at any moment leaves the previous file or the new one, never a part of it."""
    with replacing(path) as scratch, scratch.open("wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())


def load(path: Path) -> dict[str, Any]:
    """Read a checkpoint; FileNotFoundError says where it was looked for, ValueError that the file is none."""
    if not path.exists():
        raise FileNotFoundError(f"no checkpoint at '{path}': start the run without --resume")
    try:
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise ValueError(f"'{path}' is not a checkpoint: start the run without --resume") from error
    return state

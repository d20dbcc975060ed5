"""Weights that are read from their files while a model runs: what goes wrong there is told, by the name of the file or tensor."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

from ._shared.files import joined
from ._shared.weights import PICKLES

SUFFIXES = (".safetensors", ".gguf", *PICKLES)
W = TypeVar("W", bound=Mapping[str, Tensor])


class Watched:
    """The files of a checkpoint, which must stay as they are: a mapped file that is cut short would end the process."""

    def __init__(self, path: Path) -> None:
        self.path = path
        found = [part if part.is_file() else part.iterdir() for part in joined(path)]
        files = [file for entry in found for file in ([entry] if isinstance(entry, Path) else entry)]
        self._stamps = {file: _stamp(file) for file in files if file.suffix in SUFFIXES}

    def read(self, fetch: Callable[[str], W], name: str) -> W:
        """What `fetch` gives for a layer, with every number read by this thread: no later one waits for the disk.

        ValueError where a file was changed, or the numbers are NaN or infinite.
        """
        for file, stamp in self._stamps.items():
            if _stamp(file) != stamp:
                raise ValueError(f"'{file}' was changed, moved or deleted while the model was read from it: load the model again")
        weights = fetch(name)
        if not all(map(_finite, weights.values())):
            raise ValueError(f"'{self.path}': the weights of '{name}' hold NaN or infinite numbers: the file is damaged")
        return weights


def _stamp(file: Path) -> tuple[int, ...] | None:
    try:
        status = file.stat()
    except OSError:
        return None
    return status.st_ino, status.st_size, status.st_mtime_ns


def _finite(weight: Tensor) -> bool:
    numbers = weight.view(torch.int8) if weight.element_size() == 1 else weight  # what is in 8 bits has a scale that tells
    least, most = numbers.aminmax()
    return bool(least.isfinite() and most.isfinite())

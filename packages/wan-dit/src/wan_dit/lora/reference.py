"""How a LoRA is named on the command line: `PATH[:STRENGTH[:high|low]]`. Imports no torch."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, cast, get_args

if TYPE_CHECKING:
    from .read import Lora

Expert = Literal["high", "low"]
EXPERTS: tuple[str, ...] = get_args(Expert)
SUFFIXES = (".safetensors", ".pth", ".pt", ".bin", ".ckpt")


@dataclass(frozen=True)
class LoraSpec:
    """A LoRA to apply.

    lora: a file, a folder with one, `hub:org/repo/file`, or a loaded `Lora`
    strength: what its change is multiplied by, any finite number
    expert: the expert of Wan2.2 A14B that gets it, None for both
    """

    lora: str | Path | Lora
    strength: float = 1.0
    expert: Expert | None = None

    def __post_init__(self) -> None:
        if not math.isfinite(self.strength):
            raise ValueError(f"the strength of a LoRA is {self.strength}, expected a finite number")
        if self.expert is not None and self.expert not in EXPERTS:
            raise ValueError(f"the expert of a LoRA is '{self.expert}', expected high or low")


def parse_lora(text: str) -> LoraSpec:
    """Read `PATH[:STRENGTH[:high|low]]`; a path that exists is taken whole, whatever colons it has.

    Example:
        >>> parse_lora("style.safetensors:0.8:high")
        LoraSpec(lora='style.safetensors', strength=0.8, expert='high')
    """
    path, expert, strength = text, None, 1.0
    if (parts := _split(path)) and parts[1] in EXPERTS:
        path, expert = parts[0], cast(Expert, parts[1])
    if parts := _split(path):
        try:
            path, strength = parts[0], float(parts[1])
        except ValueError as error:
            if parts[0].endswith(SUFFIXES) or Path(parts[0]).exists():
                raise ValueError(f"LoRA '{text}': '{parts[1]}' is no strength, expected PATH[:STRENGTH[:high|low]]") from error
    if not path:
        raise ValueError(f"LoRA '{text}' names no file, expected PATH[:STRENGTH[:high|low]]")
    return LoraSpec(path, strength, expert)


def _split(text: str) -> tuple[str, str] | None:
    """What stands before and after the last colon; None where there is none, or the whole is a file."""
    head, colon, tail = text.rpartition(":")
    return (head, tail) if colon and not Path(text).exists() else None

"""What a pipeline reports while it runs: one stream that a progress bar, a callback and a server consume alike."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .pipeline import Result


@dataclass(frozen=True)
class Loading:
    """A part is about to be read from disk, on its first use only.

    part: `"text_encoder"`, `"backbone"` or `"vae"`
    """

    part: str
    name: str


@dataclass(frozen=True)
class Encoding:
    """Prompts are about to be turned into context."""

    prompts: tuple[str, ...]


@dataclass(frozen=True)
class Step:
    """One model evaluation is done.

    i: 1 to n
    seconds: this evaluation alone
    sigma: noise level after it; 0 at the last
    """

    i: int
    n: int
    seconds: float
    sigma: float


@dataclass(frozen=True)
class Decoding:
    """Latents are about to be decoded to `frames` frames."""

    frames: int


@dataclass(frozen=True)
class Done:
    """The video is there; the last event."""

    result: Result


Event = Loading | Encoding | Step | Decoding | Done

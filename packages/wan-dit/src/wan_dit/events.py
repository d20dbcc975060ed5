"""What a pipeline reports while it runs: one stream that a progress bar, a callback and a server consume alike."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

    from .result import Result
    from .state import RunState


@dataclass(frozen=True)
class Loading:
    """A part is about to be read from disk, on its first use only.

    part: `"text_encoder"`, `"image_encoder"`, `"vae"`, `"backbone"` or `"low_noise_backbone"`
    """

    part: str
    name: str


@dataclass(frozen=True)
class Encoding:
    """Prompts are about to be turned into context."""

    prompts: tuple[str, ...]


@dataclass(frozen=True)
class Preparing:
    """Images and videos that the task was given are about to be encoded.

    task: its name
    """

    task: str


@dataclass(frozen=True)
class Step:
    """One model evaluation is done.

    i: 1 to n
    seconds: this evaluation alone
    sigma: noise level after it; 0 at the last
    denoised: the video as predicted now, latents `[1, C, T', H', W']`, for `Pipeline.preview`
    state: what it takes to go on from here, for `RunState.save` and `Pipeline.stream(resume=)`
    """

    i: int
    n: int
    seconds: float
    sigma: float
    denoised: Tensor | None = field(default=None, repr=False, compare=False)
    state: RunState | None = field(default=None, repr=False, compare=False)


@dataclass(frozen=True)
class Decoding:
    """Latents are about to be decoded to `frames` frames."""

    frames: int


@dataclass(frozen=True)
class Done:
    """The video is there; the last event."""

    result: Result


Event = Loading | Encoding | Preparing | Step | Decoding | Done

"""The phases of a VAE's training: which clips, which of its parts, which losses, and until when."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from typing import TYPE_CHECKING, Annotated

import torch
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PositiveInt

if TYPE_CHECKING:
    from ..contracts import Draw

Several = Annotated[
    tuple[PositiveInt, ...],
    Field(min_length=1),
    BeforeValidator(lambda given: given if isinstance(given, list | tuple) else (given,)),
]


class Phase(BaseModel):
    """Until `until` (a share of the run): clips of `frames` frames, cropped to `size` pixels square, `batch` of them (0: the run's).

    frames, size: a number, or several, of which every step draws one
    inflate: the VAE has seen single frames alone, and is made one of videos as the phase begins (`inflation`)
    trains: the parts of the VAE's `parameter_groups()` that learn, all where none is named; the rest stays as it is
    adversary: how hard a discriminator pulls at each reconstruction, as a share of what the other terms do; 0 for none
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    until: float = Field(gt=0)
    frames: Several
    size: Several
    batch: int = Field(default=0, ge=0)
    inflate: bool = False
    trains: tuple[str, ...] = ()
    adversary: float = Field(default=0.0, ge=0)

    @property
    def shapes(self) -> list[tuple[int, int]]:
        """All frames and sizes that a step may have."""
        return list(product(self.frames, self.size))

    def shape(self, draw: Draw) -> tuple[int, int]:
        """Frames and size of a step: drawn once for all of its samples, so that it is one shape in every process."""
        shapes = self.shapes
        return shapes[int(torch.randint(len(shapes), (), generator=draw(0, "shape")))]


def phase_at(phases: Sequence[Phase], progress: float) -> int:
    """The number of the phase at a share of the run; the last one goes on to the end."""
    return next((i for i, phase in enumerate(phases) if progress < phase.until), len(phases) - 1)

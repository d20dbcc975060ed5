"""Classifier-free guidance: one velocity out of two, with the prompt and with the negative prompt.

Ho and Salimans, "Classifier-Free Diffusion Guidance" (2022). The two forwards run one after the other: contexts may differ
in length, and at the sizes of video a batch of two is no faster.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from .contracts import Backbone, Conditioning, Context


@dataclass(frozen=True)
class Guidance:
    """How strongly the prompt is followed.

    scale: 1 is the plain model, which costs one forward instead of two; Wan models use 3 to 6
    """

    scale: float

    def __post_init__(self) -> None:
        if not math.isfinite(self.scale) or self.scale < 0:
            raise ValueError(f"guidance scale is {self.scale}; it must be a number of at least 0: 1 is none, Wan models use 3 to 6")

    @property
    def active(self) -> bool:
        """Whether a step runs the model on the negative prompt too."""
        return self.scale != 1

    def combine(self, positive: Tensor, negative: Tensor) -> Tensor:
        """negative + scale * (positive - negative)."""
        return negative + self.scale * (positive - negative)


def guided_velocity(
    backbone: Backbone,
    latents: Tensor,
    timestep: Tensor,
    context: Context,
    negative_context: Context | None,
    scale: float,
    conditioning: Conditioning | None = None,
) -> Tensor:
    """Velocity `[B, C, T', H', W']` under guidance of `scale`; both forwards get the same `conditioning`.

    `negative_context` may be None where the scale is 1; ValueError where it is needed and missing.
    """
    guidance = Guidance(scale)
    if guidance.active and negative_context is None:
        raise ValueError(f"guidance scale {scale:g} needs the context of a negative prompt; encode one (it may be empty) or use scale 1")
    positive = backbone(latents, timestep, context, conditioning)
    if not guidance.active or negative_context is None:
        return positive
    return guidance.combine(positive, backbone(latents, timestep, negative_context, conditioning))

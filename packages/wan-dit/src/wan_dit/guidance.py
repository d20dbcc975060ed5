"""Classifier-free guidance: one velocity out of two, with the prompt and with the negative prompt.

Ho and Salimans, "Classifier-Free Diffusion Guidance" (2022). The two forwards run one after the other, since contexts may
differ in length.
"""

from __future__ import annotations

from torch import Tensor

from .contracts import Backbone, Conditioning, Context


def guided_velocity(
    backbone: Backbone,
    latents: Tensor,
    timestep: Tensor,
    context: Context,
    negative_context: Context | None,
    scale: float,
    conditioning: Conditioning | None = None,
) -> Tensor:
    """Velocity `[B, C, T', H', W']`: negative + scale * (positive - negative); both forwards get the same `conditioning`.

    scale: 1 is the plain model, which costs one forward instead of two and needs no `negative_context`; Wan models use 3 to 6
    Raises ValueError where the negative context is needed and missing.
    """
    if scale != 1 and negative_context is None:
        raise ValueError(f"guidance scale {scale:g} needs the context of a negative prompt; encode one (it may be empty) or use scale 1")
    positive = backbone(latents, timestep, context, conditioning)
    if scale == 1 or negative_context is None:
        return positive
    negative = backbone(latents, timestep, negative_context, conditioning)
    return negative + scale * (positive - negative)

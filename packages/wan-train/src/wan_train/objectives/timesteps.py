"""At which noise levels a flow is trained: the density of sigma, its shift, the side of an expert, and the weight of a sample's loss.

Logit-normal and mode densities and the weightings: Esser et al., arXiv 2403.03206, section 3.1. Sigma 1 is noise.
"""

from __future__ import annotations

import math
from typing import Literal, Self

import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor

BISECTIONS = 60  # more than the digits of a double
SMALLEST = 1e-3  # sigma of the last of 1000 timesteps: the weight of a sample stays finite


class TimestepSettings(BaseModel):
    """timesteps: density of sigma before its shift; mode_scale: of `mode`, 0 is uniform, 1.29 favours the middle and the ends.

    shift, logit_mean, logit_std: sigma = shifted sigmoid of a normal draw
    boundary, expert: a sigma, and the side of it that is trained: `high` at it and above, `low` below (Wan2.2 A14B: 0.875, I2V 0.9)
    weighting: of a sample's loss: `none`, `sigma_sqrt` (1 / sigma^2) or `cosmap` (2 / (pi (1 - 2 sigma + 2 sigma^2)))
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    timesteps: Literal["logit-normal", "uniform", "mode"] = "logit-normal"
    shift: float = Field(3.0, gt=0)
    logit_mean: float = 0.0
    logit_std: float = Field(1.0, ge=0)
    mode_scale: float = Field(1.29, ge=-1, le=1.75)  # beyond, the density is none: 2 / (pi - 2)
    boundary: float | None = Field(None, gt=0, lt=1)
    expert: Literal["high", "low"] | None = None
    weighting: Literal["none", "sigma_sqrt", "cosmap"] = "none"

    @model_validator(mode="after")
    def _check_expert(self) -> Self:
        if (self.boundary is None) != (self.expert is None):
            raise ValueError(
                f"expert and boundary go together, got expert {self.expert!r} and boundary {self.boundary!r}: give both or none"
            )
        low, high = _side(self)
        if not low < high:
            raise ValueError(f"no sigma of these timesteps is on the side of the expert of {self.expert} noise, boundary {self.boundary}")
        return self


def draw_sigmas(settings: TimestepSettings, count: int, generator: torch.Generator) -> Tensor:
    """Noise levels `[count]` in (0, 1), float32; with an expert those of its side alone, as often as they come without one."""
    low, high = _side(settings)
    share = torch.rand(count, generator=generator, dtype=torch.float64)
    sigma = quantile(settings, low + (high - low) * share).float()
    if settings.boundary is None:
        return sigma
    edge = torch.tensor(settings.boundary, dtype=torch.float32)
    return sigma.clamp(min=edge) if settings.expert == "high" else sigma.clamp(max=torch.nextafter(edge, torch.zeros(())))


def quantile(settings: TimestepSettings, share: Tensor) -> Tensor:
    """The sigma, in float64, below which this share of all draws without an expert lies."""
    share = share.double().clamp(1e-12, 1 - 1e-12)
    if settings.timesteps == "logit-normal":
        u = torch.sigmoid(settings.logit_mean + settings.logit_std * torch.special.ndtri(share))
    elif settings.timesteps == "uniform":
        u = share
    else:
        u = share - settings.mode_scale * (torch.cos(math.pi / 2 * (1 - share)).square() - share)
    return settings.shift * u / (1 + (settings.shift - 1) * u)


def share_below(settings: TimestepSettings, sigma: float) -> float:
    """The share of all draws without an expert that lies below sigma."""
    low, high = 0.0, 1.0
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        if quantile(settings, torch.tensor(middle, dtype=torch.float64)).item() < sigma:
            low = middle
        else:
            high = middle
    return high if high < 1 else low


def loss_weights(settings: TimestepSettings, sigma: Tensor) -> Tensor:
    """By which the loss of each sample is multiplied."""
    if settings.weighting == "sigma_sqrt":
        return sigma.clamp(min=SMALLEST).square().reciprocal()
    if settings.weighting == "cosmap":
        return 2 / (math.pi * (1 - 2 * sigma + 2 * sigma.square()))
    return torch.ones_like(sigma)


def _side(settings: TimestepSettings) -> tuple[float, float]:
    """The shares of all draws between which the expert's lie."""
    if settings.boundary is None:
        return 0.0, 1.0
    share = share_below(settings, settings.boundary)
    if min(share, 1 - share) < 1e-9:  # all on one side
        share = round(share)
    return (share, 1.0) if settings.expert == "high" else (0.0, share)

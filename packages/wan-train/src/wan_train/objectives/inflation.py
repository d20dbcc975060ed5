"""A VAE of pictures made one of videos: the first and the second phase of Wan's VAE (report, section 4.1.2)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

TOLERANCE = 1e-3  # of the pixels of a picture, by the largest of them: another order of sums


@torch.no_grad()
def inflate(vae: nn.Module, averages: Mapping[str, Tensor]) -> None:
    """Mute the temporal taps of `vae` that single frames never used, in its weights and in their averages, by name.

    A causal convolution pads time with zeros in front, so a picture meets its last tap alone. With the others at zero the VAE codes every
    frame of a video as it codes that picture. A convolution that is strided in time is bypassed by single frames, and stays as it is made:
    as one that takes every second frame.
    """
    for name, conv in _temporal(vae).items():
        for weight in (conv.weight, averages[f"{name}.weight"]):
            weight[:, :, :-1] = 0


@torch.no_grad()
def check_inflation(vae: Any, size: int) -> None:
    """ValueError where `inflate` would change what `vae` makes of a picture of `size` pixels square: its time is not zero-padded."""
    if not (convolutions := _temporal(vae)):
        raise ValueError("phases: inflate makes a VAE of pictures one of videos, and this VAE has no convolution over time")
    weights = [conv.weight for conv in convolutions.values()]
    picture = torch.linspace(-1, 1, 3 * size**2, device=weights[0].device).view(1, 3, 1, size, size)
    kept, mode = [weight[:, :, :-1].clone() for weight in weights], vae.training
    vae.eval()
    before = vae.reconstruct(picture)[0]
    for weight in weights:
        weight[:, :, :-1] = 0
    after = vae.reconstruct(picture)[0]
    for weight, taps in zip(weights, kept, strict=True):
        weight[:, :, :-1] = taps
    vae.train(mode)
    if (after - before).abs().max() > TOLERANCE * before.abs().max():
        raise ValueError("phases: inflate needs a VAE whose single frames meet the last tap of a convolution over time alone, not this one")


def _temporal(vae: nn.Module) -> dict[str, nn.Conv3d]:
    """The convolutions over time, by name, but for those that are strided in it."""
    named = vae.named_modules()
    return {name: conv for name, conv in named if isinstance(conv, nn.Conv3d) and conv.kernel_size[0] > 1 and conv.stride[0] == 1}

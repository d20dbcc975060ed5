"""A VAE of pictures made one of videos: the first and the second phase of Wan's VAE (report, section 4.1.2)."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn


@torch.no_grad()
def inflate(vae: nn.Module, averages: Mapping[str, Tensor]) -> None:
    """Mute the temporal taps of `vae` that single frames never used, in its weights and in their averages, by name.

    A causal convolution pads time with zeros in front, so a picture meets its last tap alone. With the others at zero the VAE codes every
    frame of a video as it codes that picture. A convolution that is strided in time is bypassed by single frames, and stays as it is made:
    as one that takes every second frame.
    """
    for name, module in vae.named_modules():
        if isinstance(module, nn.Conv3d) and module.kernel_size[0] > 1 and module.stride[0] == 1:
            for weight in (module.weight, averages[f"{name}.weight"]):
                weight[:, :, :-1] = 0

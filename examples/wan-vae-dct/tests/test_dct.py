"""The conformance kit of wan-vae, and what is particular to cosine transforms."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from wan_vae.testing import VAEContract
from wan_vae_dct.codec import DCT


class TestDCT(VAEContract):
    plugin = "dct"


def wave(frequency: int, frames: int) -> Tensor:
    """A wave down and across the blocks of a clip of 16 x 16 pixels."""
    places = torch.cos(frequency * (torch.arange(16) % 8 + 0.5) * math.pi / 8)
    return (places[:, None] * places).expand(1, 3, frames, 16, 16)


@pytest.mark.parametrize("frames", [1, 9])
def test_low_frequencies_come_back_and_high_ones_are_lost(frames: int) -> None:
    codec = DCT()
    for frequency in (0, 1):
        assert torch.allclose(codec.decode(codec.encode(wave(frequency, frames))), wave(frequency, frames), atol=1e-5)
    assert codec.decode(codec.encode(wave(7, frames))).abs().max() < 1e-5


def test_latents_that_it_makes_are_kept() -> None:
    """What is kept is orthonormal, so a second passage changes nothing."""
    latents = torch.randn(1, 48, 3, 2, 2, generator=torch.Generator().manual_seed(0)) / 20
    video = DCT().decode(latents)
    assert video.abs().max() < 1
    assert torch.allclose(DCT().encode(video), latents, atol=1e-5)

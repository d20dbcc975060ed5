"""The conformance kit: the built-in VAE passes it, and VAEs with planted faults do not."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from wan_vae.config import TINY
from wan_vae.model import WanVAE
from wan_vae.testing import VAEContract, randomise


class TestTiny(VAEContract):
    plugin = "tiny"


class Forgets(WanVAE):
    """Decodes every chunk of a stream as if it were the first."""

    def decode_stream(self, chunks: Iterable[Tensor]) -> Iterator[Tensor]:
        for i, chunk in enumerate(chunks):
            frames = [next(super(Forgets, self).decode_stream([chunk[:, :, t : t + 1]])) for t in range(chunk.shape[2])]
            yield torch.cat(frames, dim=2).repeat_interleave(4 if i else 1, dim=2)

    def decode(self, latents: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
        return torch.cat(list(super().decode_stream(latents.split(1, dim=2))), dim=2)


class Shares(WanVAE):
    """Keeps the running sum of all its streams in one place."""

    total: Tensor | float = 0.0

    def encode_stream(self, chunks: Iterable[Tensor]) -> Iterator[Tensor]:
        self.total = 0.0
        for latents in super().encode_stream(chunks):
            self.total = self.total + latents.mean()
            yield latents + self.total


class Unclamped(WanVAE):
    def decode(self, latents: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
        return 2 * super().decode(latents)


class Noisy(WanVAE):
    def encode(self, video: Tensor) -> Tensor:
        latents = super().encode(video)
        return latents + 0.1 * torch.randn_like(latents)


class Drops(WanVAE):
    """Silently cuts what does not divide."""

    def encode(self, video: Tensor) -> Tensor:
        time, height, width = self.config.stride
        frames = 1 + (video.shape[2] - 1) // time * time
        return super().encode(video[:, :, :frames, : video.shape[3] // height * height, : video.shape[4] // width * width])


class Transposed(WanVAE):
    def encode(self, video: Tensor) -> Tensor:
        return super().encode(video).transpose(3, 4)


class Scribbles(WanVAE):
    """Changes its input."""

    def encode(self, video: Tensor) -> Tensor:
        return super().encode(video.mul_(0.5))


class Misdescribed(WanVAE):
    @property
    def spec(self) -> Any:
        return replace(super().spec, latent_channels=TINY.z_dim + 1)


class Unsaved(WanVAE):
    """Loses its statistics on the way to disk."""

    def save_pretrained(self, folder: Any) -> None:
        fitted, self.config = self.config, TINY
        super().save_pretrained(folder)
        self.config = fitted


FAULTS = {
    Forgets: "test_decoding_in_chunks_equals_decoding_at_once",
    Shares: "test_streams_are_lazy_and_may_be_interleaved",
    Unclamped: "test_decode_is_clamped",
    Noisy: "test_the_same_input_gives_the_same_bits",
    Drops: "test_frames_that_do_not_divide_are_refused",
    Transposed: "test_encode_and_decode_follow_the_shape_law",
    Scribbles: "test_inputs_are_left_as_they_were",
    Misdescribed: "test_encode_and_decode_follow_the_shape_law",
    Unsaved: "test_saving_and_loading_keeps_every_bit",
}


def make(kind: type[WanVAE]) -> WanVAE:
    vae = kind(TINY).eval()
    randomise(vae)
    vae.config = TINY.model_copy(update={"latents_mean": (0.5,) * TINY.z_dim, "latents_std": (2.0,) * TINY.z_dim})
    return vae


@pytest.mark.parametrize("kind", FAULTS, ids=lambda kind: kind.__name__)
def test_a_planted_fault_is_found(kind: type[WanVAE], tmp_path: Path) -> None:
    check = getattr(VAEContract(), FAULTS[kind])
    given = {"tmp_path": tmp_path, "frames": "all"}
    given = {name: value for name, value in given.items() if name in inspect.signature(check).parameters}
    check(make(WanVAE), **given)
    with pytest.raises((AssertionError, pytest.fail.Exception)):
        check(make(kind), **given)

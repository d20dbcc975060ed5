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
    """Keeps nothing between the chunks of a stream."""

    def decode_stream(self, chunks: Iterable[Tensor]) -> Iterator[Tensor]:
        for i, chunk in enumerate(chunks):
            video = WanVAE.decode(self, chunk)
            yield video if i == 0 else video.repeat_interleave(4, dim=2)[:, :, : 4 * chunk.shape[2]]


class Shares(WanVAE):
    """Keeps the state of all its streams in one place."""

    last: Tensor | None = None

    def encode_stream(self, chunks: Iterable[Tensor]) -> Iterator[Tensor]:
        self.last = None
        for chunk in chunks:
            if self.last is None:
                latents = super().encode(chunk)
            else:
                latents = super().encode(torch.cat([self.last, chunk], dim=2))[:, :, 1:]
            self.last = chunk[:, :, -1:]
            yield latents

    def encode(self, video: Tensor) -> Tensor:
        time = self.config.stride[0]
        super()._check_video(video)
        sizes = [1, *[time] * ((video.shape[2] - 1) // time)]
        return torch.cat(list(Shares.encode_stream(self, video.split(sizes, dim=2))), dim=2)


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
        return replace(super().spec, latent_channels=16)


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


def failing(vae: WanVAE, tmp_path: Path) -> set[str]:
    """The checks of the kit that this VAE fails."""
    kit, failed = VAEContract(), set()
    for name, check in inspect.getmembers(kit, inspect.ismethod):
        if not name.startswith("test_"):
            continue
        wanted = inspect.signature(check).parameters
        choices: list[dict[str, Any]] = [{}]
        if "axis" in wanted:
            choices = [{"axis": axis} for axis in (3, 4)]
        if "frames" in wanted:
            choices = [{"frames": frames} for frames in ("one", "all")]
        for choice in choices:
            if "tmp_path" in wanted:
                choice["tmp_path"] = tmp_path
            try:
                check(vae, **choice)
            except (AssertionError, pytest.fail.Exception, ValueError):
                failed.add(name)
    return failed


def make(kind: type[WanVAE]) -> WanVAE:
    vae = kind(TINY).eval()
    randomise(vae)
    vae.config = TINY.model_copy(update={"latents_mean": (0.5,) * 8, "latents_std": (2.0,) * 8})
    return vae


def test_a_sound_vae_passes_every_check(tmp_path: Path) -> None:
    assert failing(make(WanVAE), tmp_path) == set()


@pytest.mark.parametrize("kind", FAULTS, ids=lambda kind: kind.__name__)
def test_a_planted_fault_is_found(kind: type[WanVAE], tmp_path: Path) -> None:
    assert FAULTS[kind] in failing(make(kind), tmp_path)

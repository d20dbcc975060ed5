"""Conformance kit for video VAEs, as a plain pytest class: subclass it, name your plugin, run pytest.

Example:
    >>> class TestMine(VAEContract):
    ...     plugin = "my-vae"
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

from .plugins import find_vae


def difference(got: Tensor, expected: Tensor) -> float:
    """Largest absolute difference over max(1, largest absolute value); infinite where shapes differ."""
    if got.shape != expected.shape:
        return float("inf")
    return float((got - expected).detach().abs().max() / expected.detach().abs().max().clamp(min=1))


def randomise(module: nn.Module, seed: int = 0) -> None:
    """Redraw every parameter but single numbers, so that no path is hidden by an initial zero or one: gains about 1, matrices by fan-in."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if name.endswith("gamma"):
                parameter.copy_(1 + 0.2 * noise)
            elif name.endswith("bias"):
                parameter.copy_(0.1 * noise)
            elif parameter.ndim:
                parameter.copy_(noise / parameter[0].numel() ** 0.5)


class VAEContract:
    """What every VAE must do. `plugin` is a name, path or import string; or override `vae`.

    steps: temporal strides after the first frame in the trial clip
    cells: latent height and width of the trial clip
    tolerance: on `difference`, in fp32 on a CPU, where two ways must agree
    """

    plugin: ClassVar[str]
    steps: ClassVar[int] = 3
    cells: ClassVar[tuple[int, int]] = (2, 3)
    tolerance: ClassVar[float] = 1e-5

    @pytest.fixture(scope="class")
    @classmethod
    def vae(cls) -> Any:
        return find_vae(cls.plugin).load(dtype=torch.float32)

    def video(self, vae: Any, batch: int = 1, seed: int = 0) -> Tensor:
        """A random clip `[B, 3, T, H, W]` in [-1, 1]."""
        time, height, width = vae.spec.stride
        shape = (batch, 3, 1 + self.steps * time, self.cells[0] * height, self.cells[1] * width)
        return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) * 2 - 1

    def latents(self, vae: Any, batch: int = 1, seed: int = 0) -> Tensor:
        """Random latents `[B, C, T', H', W']` of the trial clip's size."""
        shape = (batch, vae.spec.latent_channels, 1 + self.steps, *self.cells)
        return torch.randn(shape, generator=torch.Generator().manual_seed(seed))

    def test_spec_describes_the_model(self, vae: Any) -> None:
        assert vae.spec.latent_space
        assert len(vae.spec.stride) == 3
        assert all(step >= 1 for step in vae.spec.stride)
        if getattr(self, "plugin", None):
            listed = find_vae(self.plugin)
            for name in ("latent_space", "latent_channels", "stride"):
                assert getattr(vae.spec, name) == getattr(listed, name), f"{name} differs between the plugin's spec and the loaded model's"

    @pytest.mark.parametrize("frames", ["one", "all"])
    def test_encode_and_decode_follow_the_shape_law(self, vae: Any, frames: str) -> None:
        video = self.video(vae, batch=2)
        video = video[:, :, :1] if frames == "one" else video
        latents = vae.encode(video)
        steps = 1 + (video.shape[2] - 1) // vae.spec.stride[0]
        assert tuple(latents.shape) == (2, vae.spec.latent_channels, steps, *self.cells)
        assert vae.decode(latents).shape == video.shape

    def test_results_are_finite_fp32_on_the_device_of_the_input(self, vae: Any) -> None:
        video = self.video(vae)
        latents = vae.encode(video)
        for result in (latents, vae.decode(latents)):
            assert result.dtype == torch.float32
            assert result.device == video.device
            assert result.isfinite().all()

    def test_decode_is_clamped(self, vae: Any) -> None:
        assert vae.decode(30 * self.latents(vae)).abs().max() <= 1

    def test_inputs_are_left_as_they_were(self, vae: Any) -> None:
        video, latents = self.video(vae), self.latents(vae)
        vae.encode(video)
        vae.decode(latents)
        assert torch.equal(video, self.video(vae))
        assert torch.equal(latents, self.latents(vae))

    def test_the_same_input_gives_the_same_bits(self, vae: Any) -> None:
        latents = self.latents(vae)
        assert torch.equal(vae.encode(self.video(vae)), vae.encode(self.video(vae)))
        first, second = (vae.decode(latents, generator=torch.Generator().manual_seed(0)) for _ in range(2))
        assert torch.equal(first, second)

    def test_a_batch_equals_its_samples(self, vae: Any) -> None:
        video = self.video(vae, batch=2)
        together = vae.encode(video)
        for i in range(2):
            assert difference(together[i : i + 1], vae.encode(video[i : i + 1])) <= self.tolerance, f"sample {i} depends on its batch"

    def test_encoding_in_chunks_equals_encoding_at_once(self, vae: Any) -> None:
        video, time = self.video(vae), vae.spec.stride[0]
        for sizes in ([1, *[time] * self.steps], [1, self.steps * time]):
            chunked = torch.cat(list(vae.encode_stream(iter(video.split(sizes, dim=2)))), dim=2)
            assert difference(chunked, vae.encode(video)) <= self.tolerance, f"chunks of {sizes} frames"

    def test_decoding_in_chunks_equals_decoding_at_once(self, vae: Any) -> None:
        latents = self.latents(vae)
        for sizes in ([1] * (1 + self.steps), [1, self.steps]):
            chunked = torch.cat(list(vae.decode_stream(iter(latents.split(sizes, dim=2)))), dim=2)
            assert difference(chunked, vae.decode(latents)) <= self.tolerance, f"chunks of {sizes} latent frames"

    def test_streams_are_lazy_and_may_be_interleaved(self, vae: Any) -> None:
        videos = [self.video(vae, seed=seed) for seed in (1, 2)]
        sizes = [1, *[vae.spec.stride[0]] * self.steps]
        streams = [vae.encode_stream(iter(video.split(sizes, dim=2))) for video in videos]
        for video, chunks in zip(videos, _interleave(streams), strict=True):
            assert difference(torch.cat(chunks, dim=2), vae.encode(video)) <= self.tolerance, "encoding streams disturb each other"
        latents = [self.latents(vae, seed=seed) for seed in (1, 2)]
        for z, chunks in zip(latents, _interleave([vae.decode_stream(iter(z.split(1, dim=2))) for z in latents]), strict=True):
            assert difference(torch.cat(chunks, dim=2), vae.decode(z)) <= self.tolerance, "decoding streams disturb each other"

    def test_frames_that_do_not_divide_are_refused(self, vae: Any) -> None:
        if vae.spec.stride[0] > 1:
            with pytest.raises(ValueError, match=str(self.video(vae).shape[2] - 1)):
                vae.encode(self.video(vae)[:, :, 1:])

    @pytest.mark.parametrize("axis", [3, 4])
    def test_sizes_that_do_not_divide_are_refused(self, vae: Any, axis: int) -> None:
        if vae.spec.stride[axis - 2] > 1:
            size = self.video(vae).shape[axis] - 1
            with pytest.raises(ValueError, match=str(size)):
                vae.encode(self.video(vae).narrow(axis, 0, size))

    def test_latents_of_other_width_are_refused(self, vae: Any) -> None:
        with pytest.raises(ValueError, match=str(vae.spec.latent_channels)):
            vae.decode(torch.cat([self.latents(vae)] * 2, dim=1))

    def test_saving_and_loading_keeps_every_bit(self, vae: Any, tmp_path: Path) -> None:
        if hasattr(vae, "save_pretrained"):
            vae.save_pretrained(tmp_path / "saved")
            loaded = type(vae).from_pretrained(tmp_path / "saved", dtype=torch.float32)
            assert torch.equal(loaded.encode(self.video(vae)), vae.encode(self.video(vae)))
            assert torch.equal(loaded.decode(self.latents(vae)), vae.decode(self.latents(vae)))

    def test_a_trainable_vae_gives_gradients_and_groups(self, vae: Any) -> None:
        if hasattr(vae, "reconstruct"):
            video = self.video(vae).requires_grad_()
            output, mean, logvar = vae.reconstruct(video)
            assert output.shape == video.shape
            assert logvar is None or logvar.shape == mean.shape
            (slope,) = torch.autograd.grad(output.square().mean(), video)
            assert slope.abs().max() > 0
            groups = vae.parameter_groups()
            assert set(groups) == {"encoder", "encoder_head", "decoder_input", "decoder", "decoder_head"}
            grouped = [id(parameter) for group in groups.values() for parameter in group]
            assert sorted(grouped) == sorted(id(parameter) for parameter in vae.parameters()), "every parameter is in one group"
            assert any(parameter is vae.last_layer for parameter in groups["decoder_head"])


def _interleave(streams: list[Any]) -> list[list[Tensor]]:
    """One chunk of each stream in turn."""
    rounds = list(zip(*streams, strict=True))
    return [list(chunks) for chunks in zip(*rounds, strict=True)]

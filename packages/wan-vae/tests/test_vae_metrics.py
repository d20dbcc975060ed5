"""PSNR and SSIM are those of scikit-image, on random clips and on a real one."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from skimage.metrics import peak_signal_noise_ratio, structural_similarity
from torch import Tensor
from wan_vae.metrics import psnr, ssim
from wan_vae.video import read_frames, to_tensor

VARIANTS = {"uniform": {}, "gaussian": {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False}}


@pytest.fixture(params=["random", "real"])
def clips(request: pytest.FixtureRequest, real_clips: Path) -> tuple[Tensor, Tensor]:
    if request.param == "random":
        generator = torch.Generator().manual_seed(0)
        video = torch.rand(1, 3, 2, 19, 24, generator=generator) * 2 - 1
        return video, (video + 0.2 * torch.randn(video.shape, generator=generator)).clamp(-1, 1)
    a, b = (to_tensor(read_frames(real_clips / f"carphone_{kind}.mp4", limit=2)) for kind in ("pristine", "distorted"))
    return a, b


@pytest.mark.parametrize(("scale", "data_range"), [(1.0, 2.0), (127.5, 255.0)])
def test_psnr_is_scikit_images(clips: tuple[Tensor, Tensor], scale: float, data_range: float) -> None:
    a, b = (scale * clip for clip in clips)
    expected = peak_signal_noise_ratio(a.double().numpy(), b.double().numpy(), data_range=data_range)
    assert psnr(a, b, data_range=data_range) == pytest.approx(expected, abs=1e-9)
    by_frame = [peak_signal_noise_ratio(a[:, :, t].double().numpy(), b[:, :, t].double().numpy(), data_range=data_range) for t in range(2)]
    assert psnr(a, b, data_range=data_range, variant="frame") == pytest.approx(sum(by_frame) / 2, abs=1e-9)


@pytest.mark.parametrize("variant", VARIANTS)
def test_ssim_is_scikit_images(clips: tuple[Tensor, Tensor], variant: str) -> None:
    a, b = clips
    frames = [
        structural_similarity(a[0, :, t].double().numpy(), b[0, :, t].double().numpy(), data_range=2.0, channel_axis=0, **VARIANTS[variant])
        for t in range(2)
    ]
    assert ssim(a, b, variant=variant) == pytest.approx(sum(frames) / 2, abs=1e-9)
    assert ssim(a[0, 0, 0], b[0, 0, 0], variant=variant) != ssim(a, b, variant=variant)


def test_equal_videos() -> None:
    video = torch.rand(2, 3, 1, 12, 12)
    assert math.isinf(psnr(video, video))
    assert ssim(video, video) == pytest.approx(1.0)


def test_frames_count_alike_in_the_frame_variant() -> None:
    a = torch.zeros(1, 3, 2, 8, 8)
    b = a.clone()
    b[:, :, 0] += 0.2
    b[:, :, 1] += 0.02
    assert psnr(a, b, variant="frame") == pytest.approx((20 + 40) / 2, abs=1e-5)
    assert psnr(a, b) == pytest.approx(10 * math.log10(4 / ((0.04 + 0.0004) / 2)), abs=1e-5)


def test_bad_input() -> None:
    video = torch.rand(1, 3, 1, 12, 12)
    for metric in (psnr, ssim):
        with pytest.raises(ValueError, match="two videos of one shape"):
            metric(video, video[..., :6])
        with pytest.raises(ValueError, match="data_range must be positive"):
            metric(video, video, data_range=0)
        with pytest.raises(ValueError, match=r"unknown .* variant 'best'"):
            metric(video, video, variant="best")
    with pytest.raises(ValueError, match="at least 7x7"):
        ssim(video[..., :5], video[..., :5])
    with pytest.raises(ValueError, match="needs videos"):
        psnr(video[0, 0], video[0, 0], variant="frame")

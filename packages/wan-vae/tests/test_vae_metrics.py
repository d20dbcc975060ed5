"""PSNR and SSIM are those of scikit-image, MS-SSIM is the paper's on top of them, and a stream gives what a whole video gives."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from skimage.color import rgb2gray
from skimage.measure import block_reduce
from skimage.metrics import peak_signal_noise_ratio, structural_similarity
from torch import Tensor
from wan_vae.metrics import QualityMeter, ms_ssim, ms_ssim_size, psnr, ssim
from wan_vae.video import read_frames, to_tensor

VARIANTS = {"uniform": {}, "gaussian": {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False}}


def noisy(*shape: int, seed: int = 0, noise: float = 0.2) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    video = torch.rand(*shape, generator=generator) * 2 - 1
    return video, (video + noise * torch.randn(video.shape, generator=generator)).clamp(-1, 1)


@pytest.fixture(params=["random", "real"])
def clips(request: pytest.FixtureRequest, real_clips: Path) -> tuple[Tensor, Tensor]:
    if request.param == "random":
        return noisy(1, 3, 2, 19, 24)
    a, b = (to_tensor(read_frames(real_clips / f"carphone_{kind}.mp4", limit=2)) for kind in ("pristine", "distorted"))
    return a, b


@pytest.mark.parametrize(("scale", "data_range"), [(1.0, 2.0), (127.5, 255.0)])
def test_psnr_is_scikit_images(clips: tuple[Tensor, Tensor], scale: float, data_range: float) -> None:
    a, b = (scale * clip for clip in clips)
    expected = peak_signal_noise_ratio(a.double().numpy(), b.double().numpy(), data_range=data_range)
    assert psnr(a, b, data_range=data_range) == pytest.approx(expected, abs=1e-9)
    by_frame = [peak_signal_noise_ratio(a[:, :, t].double().numpy(), b[:, :, t].double().numpy(), data_range=data_range) for t in range(2)]
    assert psnr(a, b, data_range=data_range, variant="frame") == pytest.approx(sum(by_frame) / 2, abs=1e-9)


def test_psnr_of_luma(clips: tuple[Tensor, Tensor]) -> None:
    a, b = (clip.double() for clip in clips)
    weighted = [sum(w * clip[:, c] for c, w in enumerate((0.299, 0.587, 0.114))).numpy() for clip in (a, b)]
    assert psnr(a, b, variant="luma-bt601") == pytest.approx(peak_signal_noise_ratio(*weighted, data_range=2.0), abs=1e-9)
    gray = [rgb2gray(clip[0].permute(1, 2, 3, 0).numpy()) for clip in (a, b)]  # BT.709 in four digits: 0.2125, 0.7154, 0.0721
    assert psnr(a, b, variant="luma-bt709") == pytest.approx(peak_signal_noise_ratio(*gray, data_range=2.0), abs=0.01)


@pytest.mark.parametrize("variant", VARIANTS)
def test_ssim_is_scikit_images(clips: tuple[Tensor, Tensor], variant: str) -> None:
    a, b = clips
    frames = [
        structural_similarity(a[0, :, t].double().numpy(), b[0, :, t].double().numpy(), data_range=2.0, channel_axis=0, **VARIANTS[variant])
        for t in range(2)
    ]
    assert ssim(a, b, variant=variant) == pytest.approx(sum(frames) / 2, abs=1e-9)
    assert ssim(a[0, 0, 0], b[0, 0, 0], variant=variant) != ssim(a, b, variant=variant)


@settings(max_examples=60, deadline=None)
@given(
    size=st.tuples(st.integers(11, 40), st.integers(11, 40)),
    channels=st.integers(1, 4),
    seed=st.integers(0, 2**31),
    noise=st.sampled_from([0.0, 1e-3, 0.1, 3.0]),
    data_range=st.sampled_from([1.0, 2.0, 255.0]),
    flat=st.booleans(),
)
def test_any_shape_and_value_is_scikit_images(
    size: tuple[int, int], channels: int, seed: int, noise: float, data_range: float, flat: bool
) -> None:
    a, b = noisy(channels, 1, *size, seed=seed, noise=noise)
    if flat:
        a = torch.full_like(a, float(a.flatten()[0]))
    a, b = (data_range / 2 * x.double() for x in (a, b))
    images = [x[:, 0].numpy() for x in (a, b)]
    if not torch.equal(a, b):
        assert psnr(a, b, data_range=data_range) == pytest.approx(peak_signal_noise_ratio(*images, data_range=data_range), abs=1e-9)
    for variant, options in VARIANTS.items():
        expected = structural_similarity(*images, data_range=data_range, channel_axis=0, **options)
        assert ssim(a, b, data_range=data_range, variant=variant) == pytest.approx(expected, abs=1e-9)


def scikit_ms_ssim(x: np.ndarray, y: np.ndarray, variant: str) -> float:
    """Of one plane, from scikit-image's SSIM maps."""
    weights, product = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333), 1.0
    for scale, weight in enumerate(weights):
        options = {"data_range": 2.0, "full": True, **VARIANTS[variant]}
        if scale < 4:  # with K1 so large that the luminance factor is 1, SSIM is contrast and structure alone
            options["K1"] = 1e8
        border = 3 if variant == "uniform" else 5
        _, full = structural_similarity(x, y, **options)
        product *= max(full[border:-border, border:-border].mean(), 0) ** weight
        x, y = (block_reduce(np.pad(v, [(0, n % 2) for n in v.shape], mode="edge"), (2, 2), np.mean) for v in (x, y))
    return product


@pytest.mark.parametrize(("variant", "size"), [("gaussian", (161, 200)), ("gaussian", (176, 163)), ("uniform", (97, 130))])
@pytest.mark.parametrize("noise", [0.05, 0.6])
def test_ms_ssim_is_the_papers(variant: str, size: tuple[int, int], noise: float) -> None:
    a, b = noisy(1, 2, 1, *size, noise=noise)
    expected = np.mean([scikit_ms_ssim(a[0, c, 0].double().numpy(), b[0, c, 0].double().numpy(), variant) for c in range(2)])
    assert 0 < expected < 0.9999
    assert ms_ssim(a, b, variant=variant) == pytest.approx(expected, abs=1e-9)


def test_ms_ssim_of_a_real_clip_orders_distortions(real_clips: Path) -> None:
    clip = to_tensor(read_frames(real_clips / "bikes.mp4", limit=1))[..., :200, :200]
    generator = torch.Generator().manual_seed(0)
    values = [ms_ssim(clip, clip + noise * torch.randn(clip.shape, generator=generator)) for noise in (0.0, 0.05, 0.2, 0.8)]
    assert values[0] == pytest.approx(1.0)
    assert values == sorted(values, reverse=True)
    assert ms_ssim(clip, -clip) == 0.0, "a negative contrast-structure counts as 0"


def test_ms_ssim_needs_its_five_scales() -> None:
    assert (ms_ssim_size(), ms_ssim_size("uniform")) == (161, 97)
    a, b = noisy(1, 1, 161, 160)
    with pytest.raises(ValueError, match=r"MS-SSIM needs at least 161x161 pixels for its 5 scales, got \[1, 1, 161, 160\]"):
        ms_ssim(a, b)
    with pytest.raises(ValueError, match="97x97"):
        ms_ssim(a[..., :96, :], b[..., :96, :], variant="uniform")


def test_equal_videos() -> None:
    video = torch.rand(2, 3, 1, 12, 12)
    assert math.isinf(psnr(video, video))
    assert math.isinf(psnr(video, video, variant="luma-bt709"))
    assert ssim(video, video) == pytest.approx(1.0)


def test_frames_count_alike_in_the_frame_variant() -> None:
    a = torch.zeros(1, 3, 2, 8, 8)
    b = a.clone()
    b[:, :, 0] += 0.2
    b[:, :, 1] += 0.02
    assert psnr(a, b, variant="frame") == pytest.approx((20 + 40) / 2, abs=1e-5)
    assert psnr(a, b) == pytest.approx(10 * math.log10(4 / ((0.04 + 0.0004) / 2)), abs=1e-5)


@pytest.mark.parametrize("size", [(20, 24), (161, 165)])
def test_a_stream_gives_what_the_whole_video_gives(size: tuple[int, int]) -> None:
    a, b = noisy(1, 3, 6, *size)
    meter = QualityMeter()
    for start, stop in ((0, 1), (1, 5), (5, 6)):
        meter.add(a[:, :, start:stop], b[:, :, start:stop])
    expected = {
        "psnr": psnr(a, b),
        "psnr_frame": psnr(a, b, variant="frame"),
        "psnr_luma_bt709": psnr(a, b, variant="luma-bt709"),
        "psnr_luma_bt601": psnr(a, b, variant="luma-bt601"),
        "ssim": ssim(a, b),
        "ssim_gaussian": ssim(a, b, variant="gaussian"),
        "ms_ssim": ms_ssim(a, b) if min(size) >= 161 else None,
    }
    assert meter.frames == 6
    assert meter.result() == pytest.approx(expected, abs=1e-9)


def test_a_stream_says_what_it_could_not_compute() -> None:
    meter = QualityMeter()
    with pytest.raises(ValueError, match="no frame was measured"):
        meter.result()
    meter.add(torch.zeros(1, 1, 1, 6, 6), torch.zeros(1, 1, 1, 6, 6))
    result = meter.result()
    assert (result.pop("psnr"), result.pop("psnr_frame")) == (math.inf, math.inf)
    assert set(result.values()) == {None}


def test_bad_input() -> None:
    video = torch.rand(1, 3, 1, 12, 12)
    for metric in (psnr, ssim, ms_ssim):
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
    with pytest.raises(ValueError, match="RGB videos"):
        psnr(video[:, :1], video[:, :1], variant="luma-bt709")
    with pytest.raises(ValueError, match="expected videos"):
        QualityMeter().add(video[0, 0], video[0, 0])

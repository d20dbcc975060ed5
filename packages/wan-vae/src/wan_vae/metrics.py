"""PSNR and SSIM with named variants, in float64; equal to scikit-image's `peak_signal_noise_ratio` and `structural_similarity`.

SSIM: Wang, Bovik, Sheikh, Simoncelli, "Image quality assessment: from error visibility to structural similarity", 2004.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

VIDEO_RANGE = 2.0  # of a video in [-1, 1]
K1, K2 = 0.01, 0.03  # the paper's constants
UNIFORM_WINDOW = 7  # scikit-image's default
GAUSSIAN_SIGMA, GAUSSIAN_RADIUS = 1.5, 5  # the paper's 11x11 window


def psnr(a: Tensor, b: Tensor, *, data_range: float = VIDEO_RANGE, variant: Literal["clip", "frame"] = "clip") -> float:
    """Peak signal-to-noise ratio in dB of videos `[..., C, T, H, W]`; infinite where they are equal.

    variant "clip": from one mean squared error over everything; "frame": the mean of every frame's own PSNR
    data_range: largest minus smallest possible value
    """
    _check(a, b, data_range)
    error = (a.double() - b.double()).square()
    if variant == "frame" and error.ndim < 4:
        raise ValueError(f"PSNR by frame needs videos [..., C, T, H, W], got {list(a.shape)}")
    if variant not in ("clip", "frame"):
        raise ValueError(f"unknown PSNR variant '{variant}', expected 'clip' or 'frame'")
    error = error.mean() if variant == "clip" else error.mean(dim=(-4, -2, -1))
    return float((10 * torch.log10(data_range**2 / error)).mean())


def ssim(a: Tensor, b: Tensor, *, data_range: float = VIDEO_RANGE, variant: Literal["uniform", "gaussian"] = "uniform") -> float:
    """Structural similarity of images or videos `[..., H, W]`: the mean over all frames, channels and interior pixels.

    variant "uniform": 7x7 box window with sample covariance, scikit-image's default;
    "gaussian": 11x11 Gaussian window of sigma 1.5 with population covariance, the paper's
    """
    _check(a, b, data_range)
    window, bias = _window(variant)
    if min(a.shape[-2:]) < len(window):
        raise ValueError(f"SSIM needs at least {len(window)}x{len(window)} pixels, got {list(a.shape)}")

    def mean(x: Tensor) -> Tensor:
        return F.conv2d(F.conv2d(x, window.view(1, 1, -1, 1)), window.view(1, 1, 1, -1))

    x, y = (value.double().cpu().reshape(-1, 1, *value.shape[-2:]) for value in (a, b))
    mean_x, mean_y = mean(x), mean(y)
    var_x = bias * (mean(x * x) - mean_x**2)
    var_y = bias * (mean(y * y) - mean_y**2)
    covariance = bias * (mean(x * y) - mean_x * mean_y)
    c1, c2 = (K1 * data_range) ** 2, (K2 * data_range) ** 2
    values = (2 * mean_x * mean_y + c1) * (2 * covariance + c2) / ((mean_x**2 + mean_y**2 + c1) * (var_x + var_y + c2))
    return float(values.mean())


def _window(variant: str) -> tuple[Tensor, float]:
    if variant == "uniform":
        pixels = UNIFORM_WINDOW**2
        return torch.full((UNIFORM_WINDOW,), 1 / UNIFORM_WINDOW, dtype=torch.float64), pixels / (pixels - 1)
    if variant == "gaussian":
        offsets = torch.arange(-GAUSSIAN_RADIUS, GAUSSIAN_RADIUS + 1, dtype=torch.float64)
        window = torch.exp(-0.5 * (offsets / GAUSSIAN_SIGMA) ** 2)
        return window / window.sum(), 1.0
    raise ValueError(f"unknown SSIM variant '{variant}', expected 'uniform' or 'gaussian'")


def _check(a: Tensor, b: Tensor, data_range: float) -> None:
    if a.shape != b.shape or a.ndim < 2 or not a.numel():
        raise ValueError(f"expected two videos of one shape [..., H, W], got {list(a.shape)} and {list(b.shape)}")
    if data_range <= 0:
        raise ValueError(f"data_range must be positive, got {data_range}")

"""PSNR, SSIM and MS-SSIM with named variants, in float64, of whole videos or streamed frame by frame.

PSNR and SSIM equal scikit-image's `peak_signal_noise_ratio` and `structural_similarity`.
SSIM: Wang, Bovik, Sheikh, Simoncelli, "Image quality assessment: from error visibility to structural similarity", 2004.
MS-SSIM: Wang, Simoncelli, Bovik, "Multi-scale structural similarity for image quality assessment", 2003.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

VIDEO_RANGE = 2.0  # of a video in [-1, 1]
K1, K2 = 0.01, 0.03  # the papers' constants
UNIFORM_WINDOW = 7  # scikit-image's default
GAUSSIAN_SIGMA, GAUSSIAN_RADIUS = 1.5, 5  # the papers' 11x11 window
SCALE_WEIGHTS = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)  # MS-SSIM, finest scale first
LUMA = {"luma-bt709": (0.2126, 0.7152, 0.0722), "luma-bt601": (0.299, 0.587, 0.114)}

PSNRVariant = Literal["clip", "frame", "luma-bt709", "luma-bt601"]
Window = Literal["uniform", "gaussian"]


def psnr(a: Tensor, b: Tensor, *, data_range: float = VIDEO_RANGE, variant: PSNRVariant = "clip") -> float:
    """Peak signal-to-noise ratio in dB of videos `[..., C, T, H, W]`; infinite where they are equal.

    variant "clip": from one mean squared error over everything; "frame": the mean of every frame's own PSNR;
    "luma-bt709", "luma-bt601": as "clip", of the luma that the standard's weights make of RGB (C = 3), full range
    data_range: largest minus smallest possible value
    """
    _check(a, b, data_range)
    if variant not in ("clip", "frame", *LUMA):
        raise ValueError(f"unknown PSNR variant '{variant}', expected 'clip', 'frame', 'luma-bt709' or 'luma-bt601'")
    if variant == "frame" and a.ndim < 4:
        raise ValueError(f"PSNR by frame needs videos [..., C, T, H, W], got {list(a.shape)}")
    if variant in LUMA and (a.ndim < 4 or a.shape[-4] != 3):
        raise ValueError(f"PSNR of luma needs RGB videos [..., 3, T, H, W], got {list(a.shape)}")
    difference = _reference(a) - _reference(b)
    if variant == "frame":
        errors = difference.square().mean(dim=(-4, -2, -1))
        return float((10 * torch.log10(data_range**2 / errors)).mean())
    if variant in LUMA:
        difference = _luma(difference, variant)
    return decibels(float(difference.square().mean()), data_range)


def ssim(a: Tensor, b: Tensor, *, data_range: float = VIDEO_RANGE, variant: Window = "uniform") -> float:
    """Structural similarity of images or videos `[..., H, W]`: the mean over all frames, channels and interior pixels.

    variant "uniform": 7x7 box window with sample covariance, scikit-image's default;
    "gaussian": 11x11 Gaussian window of sigma 1.5 with population covariance, the paper's
    """
    _check(a, b, data_range)
    window, _ = _window(variant)
    if min(a.shape[-2:]) < len(window):
        raise ValueError(f"SSIM needs at least {len(window)}x{len(window)} pixels, got {list(a.shape)}")
    similarity, _ = _similarity(_planes(a), _planes(b), data_range, variant)
    return float(similarity.mean())


def ms_ssim(a: Tensor, b: Tensor, *, data_range: float = VIDEO_RANGE, variant: Window = "gaussian") -> float:
    """Multi-scale structural similarity of images or videos `[..., H, W]`: the mean over all frames and channels.

    Five scales with the paper's weights: contrast and structure at every scale, luminance at the coarsest. From a scale to
    the next, 2x2 pixels become their mean; an odd last row or column is its own pair. Where the mean contrast-structure of a
    scale is negative it counts as 0, since a fractional power of it is not real.
    variant: the window, as in `ssim`; "gaussian" is the paper's
    Raises ValueError below `ms_ssim_size(variant)` pixels (161; "uniform": 97), where the window outgrows the coarsest scale.
    """
    _check(a, b, data_range)
    least = ms_ssim_size(variant)
    if min(a.shape[-2:]) < least:
        raise ValueError(f"MS-SSIM needs at least {least}x{least} pixels for its {len(SCALE_WEIGHTS)} scales, got {list(a.shape)}")
    return float(_scales(_planes(a), _planes(b), data_range, variant)[0].mean())


def ms_ssim_size(variant: Window = "gaussian") -> int:
    """The least height and width that `ms_ssim` takes."""
    return (len(_window(variant)[0]) - 1) * 2 ** (len(SCALE_WEIGHTS) - 1) + 1


class QualityMeter:
    """The metrics above over a video that comes in pieces, one frame in work at a time: memory does not grow with length.

    Example: `meter.add(original, reconstruction)` for every piece `[..., C, n, H, W]`, then `meter.result()`.
    """

    def __init__(self, *, data_range: float = VIDEO_RANGE) -> None:
        self.data_range, self.frames = data_range, 0
        self._sums: dict[str, float] = {}

    def add(self, a: Tensor, b: Tensor) -> None:
        """Take in the next frames of the two videos; what their size does not allow stays uncomputed."""
        _check(a, b, self.data_range)
        if a.ndim < 4:
            raise ValueError(f"expected videos [..., C, T, H, W], got {list(a.shape)}")
        for x, y in zip(a.unbind(-3), b.unbind(-3), strict=True):
            self._add_frame(_reference(x), _reference(y))
            self.frames += 1

    def result(self) -> dict[str, float | None]:
        """`psnr` (clip), `psnr_frame`, `psnr_luma_bt709`, `psnr_luma_bt601`, `ssim` (uniform), `ssim_gaussian`, `ms_ssim`.

        None is what was not computed: SSIM of frames smaller than its window, MS-SSIM below 161 pixels, luma of other than RGB.
        """
        if not self.frames:
            raise ValueError("no frame was measured")
        means = {key: total / self.frames for key, total in self._sums.items()}
        for key in ("psnr", "psnr_luma_bt709", "psnr_luma_bt601"):
            if key in means:
                means[key] = decibels(means[key], self.data_range)
        keys = ("psnr", "psnr_frame", "psnr_luma_bt709", "psnr_luma_bt601", "ssim", "ssim_gaussian", "ms_ssim")
        return {key: means.get(key) for key in keys}

    def _add_frame(self, x: Tensor, y: Tensor) -> None:
        difference = y - x
        error = float(difference.square().mean())
        values = {"psnr": error, "psnr_frame": decibels(error, self.data_range)}
        if x.shape[-3] == 3:
            for variant in LUMA:
                luma = _luma(difference.unsqueeze(-3), variant)
                values["psnr_" + variant.replace("-", "_")] = float(luma.square().mean())
        size = min(x.shape[-2:])
        x, y = _planes(x), _planes(y)
        if size >= UNIFORM_WINDOW:
            values["ssim"] = float(_similarity(x, y, self.data_range, "uniform")[0].mean())
        if size >= ms_ssim_size():
            by_scale, finest = _scales(x, y, self.data_range, "gaussian")
            values["ms_ssim"], values["ssim_gaussian"] = float(by_scale.mean()), float(finest.mean())
        elif size >= 2 * GAUSSIAN_RADIUS + 1:
            values["ssim_gaussian"] = float(_similarity(x, y, self.data_range, "gaussian")[0].mean())
        for key, value in values.items():
            self._sums[key] = self._sums.get(key, 0.0) + value


def decibels(error: float, data_range: float = VIDEO_RANGE) -> float:
    """The PSNR that a mean squared error makes; infinite for 0."""
    return 10 * math.log10(data_range**2 / error) if error else math.inf


def _scales(x: Tensor, y: Tensor, data_range: float, variant: Window) -> tuple[Tensor, Tensor]:
    """MS-SSIM of every plane, and the SSIM of its finest scale."""
    product, finest = torch.ones(len(x), dtype=x.dtype, device=x.device), None
    for scale, weight in enumerate(SCALE_WEIGHTS):
        if scale:
            x, y = (F.avg_pool2d(value, 2, ceil_mode=True, count_include_pad=False) for value in (x, y))
        similarity, contrast = _similarity(x, y, data_range, variant)
        finest = similarity if finest is None else finest
        factor = similarity if scale == len(SCALE_WEIGHTS) - 1 else contrast
        product = product * factor.clamp(min=0) ** weight
    assert finest is not None
    return product, finest


def _similarity(x: Tensor, y: Tensor, data_range: float, variant: Window) -> tuple[Tensor, Tensor]:
    """SSIM and its contrast-structure part of planes `[N, 1, H, W]`, each the mean over interior pixels, `[N]`."""
    window, bias = _window(variant)
    window = window.to(x.device)

    def mean(values: Tensor) -> Tensor:
        return F.conv2d(F.conv2d(values, window.view(1, 1, -1, 1)), window.view(1, 1, 1, -1))

    mean_x, mean_y = mean(x), mean(y)
    var_x = bias * (mean(x * x) - mean_x**2)
    var_y = bias * (mean(y * y) - mean_y**2)
    covariance = bias * (mean(x * y) - mean_x * mean_y)
    c1, c2 = (K1 * data_range) ** 2, (K2 * data_range) ** 2
    contrast = (2 * covariance + c2) / (var_x + var_y + c2)
    luminance = (2 * mean_x * mean_y + c1) / (mean_x**2 + mean_y**2 + c1)
    return (luminance * contrast).mean(dim=(1, 2, 3)), contrast.mean(dim=(1, 2, 3))


def _window(variant: str) -> tuple[Tensor, float]:
    if variant == "uniform":
        pixels = UNIFORM_WINDOW**2
        return torch.full((UNIFORM_WINDOW,), 1 / UNIFORM_WINDOW, dtype=torch.float64), pixels / (pixels - 1)
    if variant == "gaussian":
        offsets = torch.arange(-GAUSSIAN_RADIUS, GAUSSIAN_RADIUS + 1, dtype=torch.float64)
        window = torch.exp(-0.5 * (offsets / GAUSSIAN_SIGMA) ** 2)
        return window / window.sum(), 1.0
    raise ValueError(f"unknown SSIM variant '{variant}', expected 'uniform' or 'gaussian'")


def _luma(rgb: Tensor, variant: str) -> Tensor:
    return torch.einsum("...cthw,c->...thw", rgb, torch.tensor(LUMA[variant], dtype=rgb.dtype, device=rgb.device))


def _planes(x: Tensor) -> Tensor:
    return _reference(x).reshape(-1, 1, *x.shape[-2:])


def _reference(x: Tensor) -> Tensor:
    return (x if x.device.type in ("cpu", "cuda") else x.cpu()).double()  # other devices have no float64


def _check(a: Tensor, b: Tensor, data_range: float) -> None:
    if a.shape != b.shape or a.ndim < 2 or not a.numel():
        raise ValueError(f"expected two videos of one shape [..., H, W], got {list(a.shape)} and {list(b.shape)}")
    if data_range <= 0:
        raise ValueError(f"data_range must be positive, got {data_range}")

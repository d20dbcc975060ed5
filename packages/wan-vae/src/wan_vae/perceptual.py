"""LPIPS and rFVD with networks that the user gives: this package ships and fetches none.

LPIPS: Zhang et al., "The unreasonable effectiveness of deep features as a perceptual metric", 2018.
FVD: Unterthiner et al., "Towards accurate generative models of video", 2018; "r" is of reconstructions.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .video import PathLike

EXPORTED = ".pt2"  # the suffix of torch.export
WINDOW = 16  # frames that FVD's feature extractor sees at a time
Network = Callable[..., Any]


def load_network(path: PathLike, device: torch.device | str = "cpu") -> Network:
    """A network saved by `torch.export.save` (.pt2) or `torch.jit.save` (any other suffix).

    Raises FileNotFoundError, and ValueError where the file is neither.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"no network at '{path}'")
    log = logging.getLogger("torch.export")
    level = log.level
    try:
        log.setLevel(logging.CRITICAL)  # it logs the traceback of the error that it raises
        if Path(path).suffix == EXPORTED:
            exported: Network = torch.export.load(path).module().to(device)
            return exported
        script: Network = torch.jit.load(str(path), map_location=device).eval()
    except Exception as error:  # what a damaged archive raises is not told
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ValueError(f"'{path}' is no network saved by torch.jit.save or torch.export.save (.pt2): {reason}") from error
    finally:
        log.setLevel(level)
    return script


class LPIPSMeter:
    """The mean distance over frames that `network(a, b)` gives for two batches `[N, 3, H, W]` in [-1, 1]: `[N]`, or `[N, 1, 1, 1]`."""

    def __init__(self, network: Network) -> None:
        self.network, self.total, self.frames = network, 0.0, 0

    def add(self, a: Tensor, b: Tensor) -> None:
        """Take in the next frames of two videos `[1, 3, n, H, W]`; ValueError where the network gives no distance a frame."""
        for x, y in zip(a[0].float().unbind(1), b[0].float().unbind(1), strict=True):
            distance = _run(self.network, "LPIPS", x[None], y[None])
            if distance.numel() != 1:
                raise ValueError(f"the LPIPS network gave {list(distance.shape)} for one frame, expected one distance")
            self.total += float(distance)
            self.frames += 1

    def result(self) -> float | None:
        return self.total / self.frames if self.frames else None


class FeatureMeter:
    """Features `[1, D]` of windows of 16 frames, `network(video)` of a video `[1, 3, 16, H, W]` in [-1, 1].

    Windows do not overlap; the frames at the end of a clip that fill none do not count.
    """

    def __init__(self, network: Network) -> None:
        self.network = network
        self.features: list[Tensor] = []
        self._held: list[Tensor] = []

    def add(self, video: Tensor) -> None:
        """Take in the next frames `[1, 3, n, H, W]` of a clip."""
        for frame in video.float().split(1, dim=2):
            self._held.append(frame)
            if len(self._held) == WINDOW:
                features = _run(self.network, "FVD", torch.cat(self._held, dim=2))
                self.features.append(features.reshape(-1).double().cpu())
                self._held.clear()


def frechet(a: list[Tensor], b: list[Tensor]) -> float | None:
    """The Fréchet distance of two sets of features `[D]`; None where one has fewer than 2, which have no covariance."""
    if min(len(a), len(b)) < 2:
        return None
    return frechet_distance(*_moments(torch.stack(a)), *_moments(torch.stack(b)))


def frechet_distance(mean_a: Tensor, covariance_a: Tensor, mean_b: Tensor, covariance_b: Tensor) -> float:
    """Of two Gaussians with means `[D]` and covariances `[D, D]`: |m - n|^2 + tr(A + B - 2 (A B)^(1/2)), in float64.

    The trace of the root is the sum of the roots of the eigenvalues of A^(1/2) B A^(1/2), which is symmetric and has those of A B.
    """
    mean_a, covariance_a, mean_b, covariance_b = (x.double().cpu() for x in (mean_a, covariance_a, mean_b, covariance_b))
    values, vectors = torch.linalg.eigh(covariance_a)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T
    cross = torch.linalg.eigvalsh(root @ covariance_b @ root).clamp(min=0).sqrt().sum()
    distance = (mean_a - mean_b).square().sum() + covariance_a.trace() + covariance_b.trace() - 2 * cross
    return max(0.0, float(distance))


def _moments(features: Tensor) -> tuple[Tensor, Tensor]:
    mean = features.double().mean(dim=0)
    centred = features.double() - mean
    return mean, centred.T @ centred / (len(features) - 1)


def _run(network: Network, name: str, *inputs: Tensor) -> Tensor:
    try:
        with torch.inference_mode():
            found = network(*inputs)
    except RuntimeError as error:
        shape = " and ".join(str(list(x.shape)) for x in inputs)
        raise ValueError(f"the {name} network does not take {shape}: {str(error).strip().splitlines()[-1]}") from error
    if not isinstance(found, Tensor) or not math.isfinite(float(found.sum())):
        raise ValueError(f"the {name} network gave no finite tensor")
    return found

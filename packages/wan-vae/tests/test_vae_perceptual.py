"""LPIPS and rFVD around networks of the user's: the distance is right, and what is no network is said to be none."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.linalg import sqrtm
from torch import Tensor, nn
from wan_vae.perceptual import WINDOW, FeatureMeter, LPIPSMeter, frechet, frechet_distance, load_network


class Distance(nn.Module):
    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return (a - b).square().mean(dim=(1, 2, 3), keepdim=True)


class Features(nn.Module):
    def forward(self, video: Tensor) -> Tensor:
        return video.mean(dim=(2, 3, 4))


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    torch.jit.script(Distance()).save(str(tmp_path / "lpips.pt"))
    torch.export.save(torch.export.export(Distance(), (torch.zeros(1, 3, 8, 8), torch.ones(1, 3, 8, 8))), tmp_path / "lpips.pt2")
    return tmp_path


def covariance(size: int, seed: int, rank: int | None = None) -> Tensor:
    factor = torch.randn(size, rank or 2 * size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return factor @ factor.T / size


def test_frechet_distance_of_diagonal_gaussians_has_a_closed_form() -> None:
    a, b = torch.tensor([1.0, 4.0, 9.0]), torch.tensor([4.0, 4.0, 1.0])
    distance = frechet_distance(torch.tensor([0.0, 1.0, 2.0]), a.diag(), torch.tensor([2.0, 1.0, -1.0]), b.diag())
    assert distance == pytest.approx(4 + 9 + (1 - 2) ** 2 + (3 - 1) ** 2, abs=1e-12)


@pytest.mark.parametrize("rank", [None, 3])
def test_frechet_distance_is_that_of_scipys_root(rank: int | None) -> None:
    a, b = covariance(8, 0), covariance(8, 1, rank)
    mean_a, mean_b = torch.arange(8.0), torch.arange(8.0).flip(0)
    expected = float((mean_a - mean_b).square().sum()) + float((a + b).trace()) - 2 * np.trace(sqrtm((a @ b).numpy())).real
    assert frechet_distance(mean_a, a, mean_b, b) == pytest.approx(expected, rel=1e-6)
    assert frechet_distance(mean_a, a, mean_a, a) == pytest.approx(0, abs=1e-9)


def test_frechet_of_features_takes_their_sample_covariance() -> None:
    a, b = (torch.randn(50, 4, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1))
    means, covariances = [x.double().mean(0) for x in (a, b)], [torch.from_numpy(np.cov(x.numpy().T)) for x in (a, b)]
    expected = frechet_distance(means[0], covariances[0], means[1], covariances[1])
    assert frechet(list(a), list(b)) == pytest.approx(expected, rel=1e-6)
    assert frechet(list(a[:1]), list(b[:1])) is None


def test_features_are_of_whole_windows() -> None:
    meter = FeatureMeter(Features())
    video = torch.arange(2.0 * WINDOW + 3).view(1, 1, -1, 1, 1).expand(-1, 3, -1, 4, 4)
    for piece in video.split(5, dim=2):
        meter.add(piece)
    assert [features.tolist() for features in meter.features] == [[7.5] * 3, [23.5] * 3]


@pytest.mark.parametrize("name", ["lpips.pt", "lpips.pt2"])
def test_lpips_is_the_mean_over_frames(saved: Path, name: str) -> None:
    meter = LPIPSMeter(load_network(saved / name))
    assert meter.result() is None
    b = torch.zeros(1, 3, 2, 8, 8)
    b[:, :, 1] = 2.0
    meter.add(torch.zeros(1, 3, 2, 8, 8), b)
    assert meter.result() == pytest.approx(2.0)


def test_bad_networks(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no network at"):
        load_network(tmp_path / "nothing.pt")
    for name in ("words.pt", "words.pt2"):
        (tmp_path / name).write_text("words")
        with pytest.raises(ValueError, match=rf"{name}' is no network saved by torch.jit.save or torch.export.save"):
            load_network(tmp_path / name)
    frames = torch.zeros(1, 3, 1, 8, 8)
    with pytest.raises(ValueError, match=r"gave \[1, 3, 8, 8\] for one frame, expected one distance"):
        LPIPSMeter(torch.sub).add(frames, frames)
    with pytest.raises(ValueError, match=r"LPIPS network does not take \[1, 3, 8, 8\] and \[1, 3, 8, 8\]"):
        LPIPSMeter(lambda a, b: a @ b[..., :3, :3]).add(frames, frames)
    with pytest.raises(ValueError, match="no finite tensor"):
        LPIPSMeter(lambda a, b: (a - b).sum() / 0).add(frames, frames)

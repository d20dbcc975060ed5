"""The wavelet term of a VAE's loss: the transform is orthonormal, its sub-bands are Haar's, and the loss is L1 on them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from wan_train.data.shapes import Shapes
from wan_train.objectives.vae import VAEObjective
from wan_train.objectives.wavelet import haar, wavelet_distance
from wan_train.plugins import plugin_manager
from wan_train.randomness import generator

NARROW = {"base_dim": 4, "decoder_base_dim": 4, "z_dim": 4}


def clip(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def flat(bands: list[Tensor]) -> Tensor:
    return torch.cat([band.flatten() for band in bands])


@settings(max_examples=60, deadline=None)
@given(frames=st.integers(1, 9), height=st.integers(1, 8), width=st.integers(1, 8), levels=st.integers(1, 4), seed=st.integers(0, 9))
def test_the_transform_is_orthonormal_so_that_its_transpose_reconstructs(
    frames: int, height: int, width: int, levels: int, seed: int
) -> None:
    video = clip(2, 3, frames, height, width, seed=seed).requires_grad_()
    bands = flat(haar(video, levels))
    assert bands.numel() == video.numel()
    (back,) = torch.autograd.grad(bands, video, bands.detach())
    assert torch.allclose(back, video, atol=1e-12)
    assert torch.isclose(bands.square().sum(), video.square().sum())


def test_the_sub_bands_of_a_cube_are_its_signed_sums() -> None:
    """Of the 2x2x2 pixels x[t, y, x], a band has a minus for every 1 along an axis that it is high along."""
    video = clip(1, 1, 2, 2, 2)
    found = haar(video)
    order = [(0, 0, 1), (0, 1, 0), (0, 1, 1), (1, 0, 0), (1, 0, 1), (1, 1, 0), (1, 1, 1), (0, 0, 0)]
    assert len(found) == 8
    for band, high in zip(found, order, strict=True):
        signed = sum(
            (-1) ** (t * high[0] + y * high[1] + x * high[2]) * float(video[0, 0, t, y, x])
            for t in range(2) for y in range(2) for x in range(2)
        )  # fmt: skip
        assert band.shape == (1, 1, 1, 1, 1)
        assert float(band) == pytest.approx(signed / 8**0.5, abs=1e-12)


def test_the_next_level_transforms_what_is_low_and_the_first_frame_of_an_odd_number_stays_alone() -> None:
    """Of 1 + 4 frames the first is transformed in 2D alone, twice; the others in 3D."""
    video = clip(2, 3, 5, 8, 12)
    first, rest = haar(video[:, :, :1], 2), haar(video[:, :, 1:], 2)
    empty = [band.numel() == 0 for band in first]
    assert empty == 2 * [False, False, False, True, True, True, True] + [False]
    for both, one, other in zip(haar(video, 2), first, rest, strict=True):
        assert torch.equal(both, torch.cat([one, other], dim=2))
    once = haar(video)
    assert all(torch.equal(a, b) for a, b in zip(haar(video, 2), [*once[:-1], *haar(once[-1])], strict=True))
    still = clip(1, 1, 1, 4, 4).expand(1, 1, 5, 4, 4)
    assert not flat(haar(still, 2)[3:7]).any(), "what does not move has nothing that is high in time"


def test_the_distance_is_the_mean_size_of_the_numbers_of_each_clip() -> None:
    difference = clip(2, 3, 5, 8, 8)
    for levels in (1, 3):
        found = wavelet_distance(difference, levels)
        expected = [flat(haar(one[None], levels)).abs().mean() for one in difference]
        assert torch.allclose(found, torch.stack(expected))
    assert torch.allclose(wavelet_distance(2 * difference), 2 * wavelet_distance(difference))
    row = torch.tensor([1.0, 3.0, -2.0, 5.0]).view(1, 1, 1, 1, 4)
    assert float(wavelet_distance(row, 1)) == pytest.approx((4 + 2 + 3 + 7) / 2**0.5 / 4)
    assert float(wavelet_distance(row, 2)) == pytest.approx(((2 + 7) / 2**0.5 + (4 + 3) / 2 + (4 - 3) / 2) / 4)


def made(tmp_path: Path, **settings: Any) -> VAEObjective:
    torch.manual_seed(0)
    fields = {"architecture": NARROW, "phases": [{"until": 1.0, "frames": 5, "size": 16}], **settings}
    return VAEObjective(fields, Shapes(frames=5, size=(16, 16), length=4), tmp_path, "cpu", plugin_manager())


def test_the_term_is_weighted_logged_and_reaches_the_vae(tmp_path: Path) -> None:
    def losses(objective: VAEObjective) -> tuple[Tensor, dict[str, Tensor]]:
        return objective.losses(objective.batch((0, 1), lambda sample, stream: generator(0, 0, sample, stream), 0.0))

    plain, objective = made(tmp_path), made(tmp_path, wavelet=0.5, wavelet_levels=2)
    batch = plain.batch((0, 1), lambda sample, stream: generator(0, 0, sample, stream), 0.0)
    expected = wavelet_distance(plain.vae.reconstruct(batch.video, batch.generators)[0] - batch.video, 2)
    without, facts = losses(plain)
    found, figures = losses(objective)
    assert torch.allclose(found - without, 0.5 * expected, atol=1e-6)
    assert torch.equal(figures["wavelet"], expected.detach())
    assert "wavelet" not in facts
    both, own, term = (
        torch.autograd.grad(loss.sum(), vae.last_layer)[0]
        for loss, vae in ((found, objective.vae), (without, plain.vae), (0.5 * expected, plain.vae))
    )
    assert torch.allclose(both - own, term, atol=1e-6)
    assert term.abs().max() > 1e-4


@pytest.mark.parametrize(("field", "value"), [("wavelet", -1.0), ("wavelet_levels", 0)])
def test_wrong_weights_and_levels_are_refused(tmp_path: Path, field: str, value: float) -> None:
    with pytest.raises(ValueError, match=rf"'objective\.settings': {field}: .*\(got {value}\)"):
        made(tmp_path, **{field: value})

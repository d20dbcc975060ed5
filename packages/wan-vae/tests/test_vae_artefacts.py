"""Each check answers to the defect that is planted for it, by the amount planted, and to nothing else."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from wan_vae.artefacts import ArtefactMeter

LEVEL = 1 / 127.5
NOISE = 6.0  # levels
FRAMES, GROUP, TILE = 13, 4, (16, 24)


def measure(original: Tensor, reconstruction: Tensor, *, pieces: int = 4) -> dict[str, float | None]:
    meter = ArtefactMeter(group=GROUP, tile=TILE)
    for a, b in zip(original.split(pieces, dim=2), reconstruction.split(pieces, dim=2), strict=True):
        meter.add(a, b)
    return meter.result()


@pytest.fixture
def original() -> Tensor:
    """A still left half and a right half that moves."""
    generator = torch.Generator().manual_seed(0)
    still = torch.rand(1, 3, 1, 64, 48, generator=generator).expand(-1, -1, FRAMES, -1, -1)
    return torch.cat([still, torch.rand(1, 3, FRAMES, 64, 48, generator=generator)], dim=-1) - 0.5


@pytest.fixture
def noise(original: Tensor) -> Tensor:
    return NOISE * LEVEL * torch.randn(original.shape, generator=torch.Generator().manual_seed(1))


def test_equal_videos_have_no_artefact(original: Tensor) -> None:
    assert set(measure(original, original).values()) == {0.0}


def test_noise_is_no_seam_no_tile_and_no_first_frame(original: Tensor, noise: Tensor) -> None:
    found = measure(original, original + noise)
    assert found["first_frame"] == pytest.approx(0, abs=0.2)
    for check in ("first_frame_colour", "seam", "tile_step", "tile_error"):
        assert found[check] == pytest.approx(0, abs=0.25), check
    for check in ("flicker", "flicker_static"):  # the mean absolute difference of two normal variables
        assert found[check] == pytest.approx(2 * NOISE / math.sqrt(math.pi), rel=0.02), check


def test_noise_that_stands_still_does_not_flicker(original: Tensor, noise: Tensor) -> None:
    found = measure(original, original + noise[:, :, :1])
    assert found["flicker"] == pytest.approx(0, abs=1e-4)
    assert found["flicker_static"] == pytest.approx(0, abs=1e-4)


def test_first_frame_of_another_colour(original: Tensor, noise: Tensor) -> None:
    broken = original + noise
    broken[:, 1, 0] -= 10 * LEVEL
    found = measure(original, broken)
    assert found["first_frame_colour"] == pytest.approx(-10, abs=0.3)
    expected = -10 * math.log10((NOISE**2 + 100 / 3) / NOISE**2)
    assert found["first_frame"] == pytest.approx(expected, abs=0.2)
    assert found["seam"] == pytest.approx(0, abs=0.25), "where frame 1 follows frame 0 is no seam"


def test_brightness_that_jumps_from_group_to_group(original: Tensor, noise: Tensor) -> None:
    broken = original + noise
    for index in range(FRAMES):
        group = (index + GROUP - 1) // GROUP
        broken[:, :, index] += (4 * LEVEL) * (group % 2)
    found = measure(original, broken)
    assert 3 < found["seam"] < 4.2
    assert found["tile_step"] == pytest.approx(0, abs=0.25)
    assert measure(original, broken.roll(1, dims=2))["seam"] < 0, "the same jumps inside groups are none"


def test_alternating_brightness(original: Tensor) -> None:
    broken = original.clone()
    broken[:, :, ::2] += 3 * LEVEL
    found = measure(original, broken)
    assert found["flicker"] == pytest.approx(3, abs=1e-3)
    assert found["flicker_static"] == pytest.approx(3, abs=1e-3)
    assert found["seam"] == pytest.approx(0, abs=1e-3)


def test_flicker_of_what_stands_still_is_told_apart(original: Tensor) -> None:
    broken = original.clone()
    broken[:, :, ::2, :, :48] += 3 * LEVEL
    assert measure(original, broken)["flicker_static"] == pytest.approx(3, abs=0.01)
    assert measure(original, broken)["flicker"] == pytest.approx(1.5, abs=0.01)
    broken = original.clone()
    broken[:, :, ::2, :, 48:] += 3 * LEVEL
    assert measure(original, broken)["flicker_static"] == pytest.approx(0, abs=0.01)


@pytest.mark.parametrize("axis", [-2, -1])
def test_tiles_of_unlike_brightness(original: Tensor, noise: Tensor, axis: int) -> None:
    broken = original + noise
    tile = TILE[axis]
    index = torch.arange(original.shape[axis]) // tile % 2
    broken += (8 * LEVEL) * (index if axis == -1 else index[:, None])
    found = measure(original, broken)
    assert 0.5 < found["tile_step"] < 8
    assert found["seam"] == pytest.approx(0, abs=0.25)


def test_error_that_grows_at_tile_borders(original: Tensor) -> None:
    error = torch.zeros_like(original)
    for border in range(TILE[1], original.shape[-1], TILE[1]):
        error[..., border - 1 : border + 1] = 5 * LEVEL
    assert measure(original, original + error)["tile_error"] > 1.5
    assert measure(original, original + error.roll(8, dims=-1))["tile_error"] < 0, "the same error elsewhere is none"


def test_pieces_make_no_difference(original: Tensor, noise: Tensor) -> None:
    whole, pieces = (measure(original, original + noise, pieces=size) for size in (FRAMES, 1))
    assert whole == pytest.approx(pieces, abs=1e-9)


def test_what_a_clip_is_too_short_or_small_for_is_not_computed() -> None:
    meter = ArtefactMeter(group=4)
    with pytest.raises(ValueError, match="no frame was measured"):
        meter.result()
    meter.add(torch.zeros(1, 3, 1, 8, 8), torch.zeros(1, 3, 1, 8, 8))
    assert set(meter.result().values()) == {None}
    meter.add(torch.zeros(1, 3, 2, 8, 8), torch.zeros(1, 3, 2, 8, 8))
    found = meter.result()
    assert found["flicker"] == found["first_frame"] == 0.0
    assert found["seam"] is None, "there is one group"
    assert found["tile_step"] is None
    meter = ArtefactMeter(group=4, tile=(8, 9))
    meter.add(torch.zeros(1, 3, 1, 8, 8), torch.zeros(1, 3, 1, 8, 8))
    assert meter.result()["tile_step"] is None, "one tile has no border"


def test_bad_input() -> None:
    with pytest.raises(ValueError, match="group of at least 1 frame"):
        ArtefactMeter(group=0)
    with pytest.raises(ValueError, match="tiles of at least 2x2"):
        ArtefactMeter(group=1, tile=(1, 8))
    with pytest.raises(ValueError, match=r"two videos of one shape \[1, 3, T, H, W\]"):
        ArtefactMeter(group=1).add(torch.zeros(1, 3, 1, 8, 8), torch.zeros(1, 3, 2, 8, 8))

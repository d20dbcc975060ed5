"""The data set natural: clips fixed by their number, with the statistics of film."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from wan_train.data.buckets import Bucket
from wan_train.data.mix import Mix
from wan_train.data.natural import Natural, _motion
from wan_train.data.scenes import generator
from wan_train.data.shapes import Shapes
from wan_train.plugins import find


@pytest.fixture(scope="module")
def clips() -> Tensor:
    return Natural().video(range(48))


def test_clips_are_found_by_name_and_depend_on_nothing_but_their_number(clips: Tensor) -> None:
    natural = find("wan_datasets", "natural").resolve()(length=10)
    assert len(natural) == 10
    assert torch.equal(natural.video([31, 5]), clips[[31, 5]])
    assert not torch.equal(Natural(seed=1).video([5]), clips[[5]])
    assert natural.key() != Natural(seed=1).key()
    assert natural.clip(3, Bucket(5, 32, 48)).shape == (3, 5, 32, 48)


def test_clips_are_varied_pictures_in_range(clips: Tensor) -> None:
    assert clips.shape == (48, 3, 17, 64, 64)
    assert clips.dtype == torch.float32
    assert clips.min() >= -1
    assert clips.max() <= 1
    assert clips.std() > 0.3
    assert len({round(float(clip.mean()), 3) for clip in clips}) == 48
    grey = (clips - clips.mean(1, keepdim=True)).abs().amax((1, 2, 3, 4)) < 0.06  # grain alone
    assert 0 < grey.sum() < 16


def test_the_spectrum_falls_as_that_of_photographs(clips: Tensor) -> None:
    """Amplitude about 1 / f: power falls with an exponent near 2 (Field 1987: 1.6 to 2.6)."""
    pictures = clips[:, :, 8].mean(1)
    window = torch.hann_window(64, periodic=False)
    power = torch.fft.fft2((pictures - pictures.mean((1, 2), keepdim=True)) * window * window[:, None]).abs().square().mean(0)
    frequency = torch.hypot(*torch.meshgrid(torch.fft.fftfreq(64) * 64, torch.fft.fftfreq(64) * 64, indexing="ij"))
    rings = torch.arange(3, 20)
    mean = torch.stack([power[(frequency >= ring) & (frequency < ring + 1)].mean() for ring in rings])
    x, y = (rings + 0.5).log(), mean.log()
    slope = ((x - x.mean()) * (y - y.mean())).sum() / (x - x.mean()).square().sum()
    assert 1.6 < -slope < 3.2


def test_most_clips_move_and_next_frames_are_alike(clips: Tensor) -> None:
    change = (clips[:, :, 1:] - clips[:, :, :-1]).square().mean((1, 2, 3, 4))
    spread = clips.flatten(1).var(1)
    assert (change > 1e-5).float().mean() > 0.6
    assert (change < spread).float().mean() > 0.9


def test_a_camera_goes_as_many_pixels_a_frame_as_it_is_told() -> None:
    paths = torch.stack([_motion(generator(0, index, 99), 17, 2.0) for index in range(400)])
    speed = (paths[:, -1] - paths[:, 0]) / 16
    assert speed[:, :2].std(0).tolist() == pytest.approx([2.0, 2.0], rel=0.15)
    assert not _motion(generator(0, 1, 99), 1, 2.0)[:, :2].abs().gt(1).any(), "a picture is seen from the middle"


def test_what_is_wrong_is_said() -> None:
    with pytest.raises(ValueError, match="length and frames must be 1 or more"):
        Natural(frames=0)


def test_a_mix_has_clips_beyond_its_length_of_each_data_set_in_turn() -> None:
    natural, shapes = Natural(length=4), Shapes(length=6)
    mix = Mix({"data": natural, "shapes": shapes})
    assert torch.equal(mix.video([10, 11, 12]), torch.cat([natural.video([4]), shapes.video([6]), natural.video([5])]))
    with pytest.raises(IndexError):
        mix.video([-1])

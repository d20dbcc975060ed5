"""The data set shapes: scenes drawn by counter, what is held out, and how clips are rendered."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from dataclasses import replace

import pytest
import torch
from wan_train.data.buckets import Bucket
from wan_train.data.scenes import BACKGROUNDS, COLOURS, MOTIONS, SHAPES, Scene, combinations, held_out, sample_scenes, scene_at
from wan_train.data.shapes import Shapes, render
from wan_train.plugins import find

STILL = Scene("blue", "square", "still", "black", 0.5, 0.5, 0.2, 0.0)


def test_a_fifth_of_the_combinations_is_held_out_evenly():
    out = combinations("heldout")
    assert (len(out), len(combinations("train")), len(combinations())) == (24, 96, 120)
    assert not set(out) & set(combinations("train"))
    assert all(held_out(*triple) for triple in out)
    assert set(Counter((colour, shape) for colour, shape, _ in out).values()) == {1}
    assert len({motion for *_, motion in out}) == 5


def test_held_out_names_what_is_known():
    with pytest.raises(ValueError, match=r"'pink'.*red, yellow"):
        held_out("pink", "circle", "left")


def test_a_scene_depends_on_nothing_but_its_number():
    first = sample_scenes(300, seed=3)
    assert scene_at(299, seed=3) == first[299]
    assert sample_scenes(10, seed=3) == first[:10]
    assert sample_scenes(10, seed=4) != first[:10]
    assert len({(scene.x, scene.y, scene.radius) for scene in first}) == 300


def test_splits_are_balanced_and_apart():
    train, unseen = sample_scenes(96 * 3, seed=1), sample_scenes(24 * 3, seed=1, split="heldout")
    assert not any(scene.held_out for scene in train)
    assert all(scene.held_out for scene in unseen)
    for scenes, count in ((train, 96), (unseen, 24)):
        assert set(Counter((s.colour, s.shape, s.motion) for s in scenes).values()) == {3}
        assert len({(s.colour, s.shape, s.motion) for s in scenes[:count]}) == count
    assert 0.4 < sum(scene.background == "black" for scene in train) / len(train) < 0.6


def test_clips_have_the_colours_of_their_scene_and_soft_edges():
    video = render([STILL], frames=1)
    assert video.shape == (1, 3, 1, 64, 64)
    assert video.dtype == torch.float32
    assert torch.allclose((video[0, :, 0, 32, 32] + 1) * 127.5, torch.tensor(COLOURS["blue"]).float(), atol=1e-3)
    assert torch.equal(video[0, :, 0, 0, 0], -torch.ones(3))
    moved = render([replace(STILL, x=0.5 + 0.25 / 64)], frames=1)
    covered = (video + 1).sum(), (moved + 1).sum()
    assert not torch.equal(video, moved)
    assert torch.isclose(*covered, rtol=1e-3)  # a quarter of a pixel to the right covers the same area


@pytest.mark.parametrize("shape", SHAPES)
def test_area_follows_the_square_of_the_size(shape):
    areas = [(render([replace(STILL, shape=shape)], frames=1, size=(side, side)) + 1)[:, 2].sum() for side in (64, 128)]
    assert torch.isclose(4 * areas[0], areas[1], rtol=0.01)


@pytest.mark.parametrize("size", [(64, 64), (96, 128)])
def test_shapes_stay_inside_the_frame(size):
    scenes = sample_scenes(120, seed=7, split="all")
    video = render(scenes, frames=3, size=size)
    ground = torch.tensor([BACKGROUNDS[scene.background][0] for scene in scenes]) / 127.5 - 1
    border = torch.cat([video[..., 0, :], video[..., -1, :], video[..., 0], video[..., -1]], -1)
    assert (border - ground.view(-1, 1, 1, 1)).abs().max() < 0.1  # at most the soft end of a star's tip


@pytest.mark.parametrize("motion", MOTIONS)
def test_a_shape_travels_its_speed(motion):
    scene = replace(STILL, motion=motion, speed=0.0 if motion == "still" else 0.3)
    ink = (render([scene])[0] + 1).sum(0)
    mass = ink.sum((1, 2))
    x, y = (ink.sum(1) @ torch.arange(64.0)) / mass, (ink.sum(2) @ torch.arange(64.0)) / mass
    path = torch.stack([x[-1] - x[0], y[-1] - y[0]])
    assert torch.allclose(path, 0.3 * 64 * torch.tensor(MOTIONS[motion]).float(), atol=0.05)


def test_the_data_set_is_found_by_name_and_repeats_itself():
    data = find("wan_datasets", "shapes").resolve()(split="heldout", seed=2, frames=5, size=[32, 32], length=50)
    assert isinstance(data, Shapes)
    assert len(data) == 50
    assert data.video([4, 9]).shape == (2, 3, 5, 32, 32)
    assert torch.equal(data.video([9]), data.video([4, 9])[1:])
    assert data.captions(9) == data.captions(9) != data.captions(10)
    assert data.video([60]).shape[0] == 1  # beyond the epoch, for validation
    assert data.key() != Shapes(split="heldout", seed=3, frames=5, size=(32, 32)).key()


def test_preview_prompts_are_half_held_out_and_are_read_back():
    data = Shapes(split="all", seed=5)
    prompts = data.evaluation_prompts(7)
    assert len(prompts) == 7
    scenes = data.scenes(range(12))
    asked = [f"a {scene.colour} {scene.shape} {scene.motion}" for scene in scenes]
    figures = data.evaluate(data.video(range(12)), asked)
    assert figures["colour"] == figures["shape"] == figures["motion"] == figures["all_right"] == 1


@pytest.mark.parametrize("settings", [{"split": "test"}, {"length": 0}, {"size": (64,)}])
def test_wrong_settings_are_refused(settings):
    with pytest.raises(ValueError, match=r"split|length"):
        Shapes(**settings)


def test_drawing_scenes_and_captions_imports_no_torch():
    code = "import sys, wan_train.data.captions; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_shape_in_focus_comes_three_times_as_often_and_the_others_stay_balanced() -> None:
    count = Counter(scene.shape for scene in Shapes(focus="star").scenes(range(144)))
    assert count == {"star": 72, "circle": 24, "square": 24, "triangle": 24}
    assert Shapes(focus="star").key() != Shapes().key()
    with pytest.raises(ValueError, match=r"no shape named 'cube' to focus on; there are circle, square, triangle, star"):
        Shapes(focus="cube")


def test_an_item_is_rendered_in_any_bucket() -> None:
    data = Shapes(frames=5, size=(32, 48))
    assert data.info(3) == (5, 32, 48, 8.0)
    assert torch.equal(data.clip(3, Bucket(5, 32, 48)), data.video([3])[0])
    still, larger = data.clip(3, Bucket(1, 32, 48)), data.clip(3, Bucket(9, 64, 96))
    assert (still.shape, larger.shape) == ((3, 1, 32, 48), (3, 9, 64, 96))
    halved = torch.nn.functional.avg_pool2d(larger.transpose(0, 1), 2).transpose(0, 1)
    assert float((halved[:, ::2] - data.clip(3, Bucket(5, 32, 48))).abs().mean()) < 0.03  # the same path in the same clip
    assert len({data.identity(3), data.identity(4), Shapes(seed=1).identity(3), Shapes(split="heldout").identity(3)}) == 4

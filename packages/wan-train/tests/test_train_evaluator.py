"""The evaluator of the shapes: exact on true clips, steady under a codec's blur, and not to be talked into anything."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from wan_train.data.scenes import Scene, sample_scenes
from wan_train.data.shapes import render
from wan_train.evaluation.shapes import Reading, accuracy_on_true_clips, evaluate, read

SCENE = Scene("red", "star", "left", "white", 0.5, 0.5, 0.21, 0.3)


def prompt_of(scene: Scene) -> str:
    return f"a {scene.colour} {scene.shape} {scene.motion} on {scene.background}"


def blurred(video: torch.Tensor, sigma: float, noise: float) -> torch.Tensor:
    """About what a codec of 28 dB leaves at sigma 1 and noise 0.06 (0.03 of the range)."""
    place = torch.arange(float(video.shape[-1]))
    spread = torch.exp(-((place[:, None] - place) ** 2) / (2 * sigma**2))
    spread = spread / spread.sum(1, keepdim=True)
    out = spread @ video @ spread.T
    return (out + noise * torch.randn(out.shape, generator=torch.Generator().manual_seed(0))).clamp(-1, 1)


def test_true_clips_are_read_right():
    report = accuracy_on_true_clips(240, seed=11)
    assert report.overall.count == report.overall.named == 240
    assert [part.count for part in (report.seen, report.held_out) if part] == [192, 48]
    for name, rate in report.figures().items():
        assert rate >= 0.99, name


@pytest.mark.parametrize(("sigma", "noise"), [(1.0, 0.06), (1.5, 0.1)])
def test_blurred_and_noisy_clips_are_read_right(sigma, noise):
    scenes = sample_scenes(120, seed=12, split="all")
    report = evaluate(blurred(render(scenes), sigma, noise), [prompt_of(scene) for scene in scenes])
    for name, rate in report.figures().items():
        assert rate >= 0.97, name


@pytest.mark.parametrize(("size", "frames"), [((128, 128), 9), ((64, 96), 33)])
def test_other_sizes_are_read_too(size, frames):
    scenes = sample_scenes(24, seed=13, split="heldout")
    assert evaluate(render(scenes, frames, size), [prompt_of(scene) for scene in scenes]).overall.all_right == 1


@pytest.mark.parametrize(
    ("field", "value"),
    [("colour", "orange"), ("shape", "circle"), ("shape", "triangle"), ("motion", "right"), ("motion", "still"), ("background", "black")],
)
def test_one_wrong_property_is_found_and_only_that(field, value):
    rates = evaluate(render([SCENE]), [prompt_of(replace(SCENE, **{field: value}))]).overall
    wrong = {name for name in ("colour", "shape", "motion", "background") if getattr(rates, name) == 0}
    assert wrong == {field}
    assert rates.all_right == 0


def test_a_background_counts_only_where_it_is_named():
    clips = render([SCENE, SCENE])
    rates = evaluate(clips, ["a red star moves left", "a red star moves left on black"]).overall
    assert (rates.named, rates.background, rates.all_right) == (1, 0.0, 0.5)
    assert evaluate(clips[:1], ["a red star moves left"]).overall.background is None


@pytest.mark.parametrize("value", [-1.0, 0.0, 1.0, float("nan")])
def test_an_empty_clip_shows_nothing(value):
    report = evaluate(torch.full((1, 3, 17, 64, 64), value), ["a red star stays still"])
    assert report.readings[0].shape is report.readings[0].colour is report.readings[0].motion is None
    assert report.overall.all_right == report.overall.colour == 0


def test_noise_is_no_shape():
    noise = torch.randn(4, 3, 17, 64, 64, generator=torch.Generator().manual_seed(1)).clamp(-1, 1)
    assert all(reading.shape is None for reading in read(noise))


def test_a_shape_that_vanishes_has_no_motion():
    clip = render([replace(SCENE, motion="still", speed=0.0)])
    clip[:, :, 10:] = 1
    assert read(clip)[0].motion is None


def test_a_diagonal_path_has_no_motion():
    frames = [render([replace(SCENE, motion="still", x=0.35 + 0.02 * t, y=0.35 + 0.02 * t)], frames=1) for t in range(17)]
    assert read(torch.cat(frames, 2)) == [Reading("red", "star", None, "white")]


def test_both_layouts_are_read_and_others_refused():
    clip = render([SCENE])[0]
    assert read([clip]) == read([clip.transpose(0, 1)]) == [Reading("red", "star", "left", "white")]
    with pytest.raises(ValueError, match=r"\[3, T, H, W\]"):
        read([clip[:2]])


def test_counts_must_agree():
    with pytest.raises(ValueError, match="1 clips and 2 prompts"):
        evaluate(render([SCENE]), ["a red star left", "a red star left"])
    with pytest.raises(ValueError, match="at least one"):
        evaluate([], [])

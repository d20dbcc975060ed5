"""Captions of the shapes: every wording says what the scene is, in known words."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from wan_train.data.captions import WORDS, caption, captions, evaluation_prompts, parse, unknown_words
from wan_train.data.scenes import BACKGROUNDS, COLOURS, MOTIONS, SHAPES, Scene, held_out
from wan_train.data.shapes import Shapes

scenes = st.builds(
    Scene,
    colour=st.sampled_from(list(COLOURS)),
    shape=st.sampled_from(SHAPES),
    motion=st.sampled_from(list(MOTIONS)),
    background=st.sampled_from(list(BACKGROUNDS)),
    x=st.just(0.5),
    y=st.just(0.5),
    radius=st.just(0.2),
    speed=st.just(0.3),
)
RED_CIRCLE = Scene("red", "circle", "left", "black", 0.5, 0.5, 0.2, 0.3)


@given(scenes)
def test_every_caption_reads_back_and_uses_known_words(scene):
    every = captions(scene)
    assert len(set(every)) == 240
    for text in every:
        wanted = parse(text)
        assert (wanted["colour"], wanted["shape"], wanted["motion"]) == (scene.colour, scene.shape, scene.motion)
        assert wanted["background"] == (scene.background if scene.background in text.lower() else None)
        assert unknown_words(text) == []
        assert " a orange" not in f" {text.lower()}"


@given(scenes, st.integers(0, 2**32))
def test_a_drawn_caption_is_one_of_them(scene, seed):
    text = caption(scene, np.random.default_rng(seed))
    assert text in captions(scene)
    assert text == caption(scene, np.random.default_rng(seed))


@pytest.mark.parametrize(
    "text",
    [
        "a red circle moves left",
        "red circle moving left",
        "a circle in red that goes left",
        "The red circle moves to the left on a black background.",
    ],
)
def test_the_word_orders_are_there(text):
    assert text in captions(RED_CIRCLE)


def test_a_quarter_of_the_captions_leaves_the_background_out():
    drawn = [text for index in range(200) for text in Shapes(seed=1).captions(index)]
    share = sum(parse(text)["background"] is None for text in drawn) / len(drawn)
    assert 0.22 < share < 0.28
    assert 0.3 < sum(text[0].isupper() for text in drawn) / len(drawn) < 0.5
    assert 0.2 < sum(text.endswith(".") for text in drawn) / len(drawn) < 0.4


def test_unknown_words_are_named_as_typed_and_once():
    assert unknown_words("A purple Elephant, and an elephant-like star, moves LEFT!") == ["Elephant", "and", "elephant-like"]
    assert unknown_words("") == []


@pytest.mark.parametrize(
    ("prompt", "problem"),
    [
        ("a circle moves left", "one colour, got none"),
        ("a red and blue circle moves left", "one colour, got blue, red"),
        ("a red circle", "one motion, got none"),
        ("a red moves left", "one shape, got none"),
        ("a red circle moves left on black and white", "one background, got black, white"),
    ],
)
def test_a_prompt_that_cannot_be_judged_is_refused(prompt, problem):
    with pytest.raises(ValueError, match=problem):
        parse(prompt)


def test_word_groups_do_not_overlap():
    assert set(Counter(word for group in WORDS.values() for word in group).values()) == {1}


@pytest.mark.parametrize("unseen", [False, True])
def test_evaluation_prompts_are_fixed_spread_and_half_with_background(unseen):
    prompts = evaluation_prompts(100, held_out=unseen, seed=0)
    assert prompts == evaluation_prompts(100, held_out=unseen, seed=0)
    assert prompts[:10] == evaluation_prompts(10, held_out=unseen, seed=0)
    assert prompts != evaluation_prompts(100, held_out=unseen, seed=1)
    wanted = [parse(prompt) for prompt in prompts]
    triples = [(want["colour"], want["shape"], want["motion"]) for want in wanted]
    assert all(held_out(*triple) == unseen for triple in triples)
    assert sum(want["background"] is not None for want in wanted) == 50
    counts = Counter(triples).values()
    assert (len(counts), max(counts)) == ((24, 5) if unseen else (96, 2))


def test_captions_of_single_frames_name_all_but_the_motion() -> None:
    pictures = Shapes(frames=1)
    for index in range(40):
        (scene,), texts = pictures.scenes([index]), pictures.captions(index)
        for text in texts:
            words = set(text.lower().replace(",", "").rstrip(".").split())
            assert {scene.colour, scene.shape} <= words
            assert not words & {*WORDS["motions"], "moves", "moving", "goes", "still", "stays", "stands"}
            assert unknown_words(text) == []
        assert all(parse(text)["motion"] == scene.motion for text in Shapes().captions(index)), "and those of clips name it"

"""Captions of the data set `shapes` in several wordings, the words they use, and prompts to evaluate with. Imports no torch."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import TypedDict

import numpy as np

from .scenes import BACKGROUNDS, COLOURS, MOTIONS, PROMPT, PROMPT_ORDER, RADIUS, SHAPES, SPEED, Scene, combinations, generator

_MOVES = (
    "a {c} {s} moves {d}",
    "a {c} {s} moving {d}",
    "{c} {s} moving {d}",
    "{c} {s} moves {d}",
    "the {c} {s} moves {to}",
    "a {c} {s} goes {d}",
    "a {s} in {c} that goes {d}",
    "a {s} in {c} moving {to}",
    "the {c} {s} is moving {d}",
    "a {c} {s} that moves {d}",
)
_STAYS = (
    "a {c} {s} stays still",
    "a still {c} {s}",
    "still {c} {s}",
    "{c} {s} staying still",
    "the {c} {s} stays still",
    "a {c} {s} stands still",
    "a {s} in {c} that stays still",
    "a {s} in {c} standing still",
    "the {c} {s} is still",
    "a {c} {s} that stands still",
)
_PICTURES = ("a {c} {s}", "{c} {s}", "the {c} {s}", "a {s} in {c}")
_PLACES = (
    "{} on a {b} background",
    "{} on {b}",
    "{} against a {b} background",
    "{} with a {b} background",
    "on a {b} background, {}",
)
_TOWARDS = {"left": "to the left", "right": "to the right", "up": "upward", "down": "downward"}
_MOTION_OF = {**{motion: motion for motion in MOTIONS}, "upward": "up", "downward": "down"}
_WORD = re.compile(r"[^\W_]+(?:['’-][^\W_]+)*")

BACKGROUND_SHARE = 0.75
CAPITAL_SHARE = 0.4
STOP_SHARE = 0.3


class Wanted(TypedDict):
    """What a prompt asks for; `background` is None where it names none."""

    colour: str
    shape: str
    motion: str
    background: str | None


def _words(text: str) -> list[str]:
    return _WORD.findall(text)


def _function_words() -> tuple[str, ...]:
    named = {"c", "s", "d", "b", "to", *_MOTION_OF}
    text = " ".join((*_MOVES, *_STAYS, *_PLACES, *_TOWARDS.values()))
    return tuple(sorted({"an", "to", *_words(re.sub(r"\{\w*\}", " ", text))} - (named - {"to"})))


WORDS: dict[str, tuple[str, ...]] = {
    "colours": tuple(COLOURS),
    "shapes": SHAPES,
    "motions": tuple(_MOTION_OF),
    "backgrounds": tuple(BACKGROUNDS),
    "others": _function_words(),
}
_KNOWN = frozenset(word for group in WORDS.values() for word in group)


def _phrase(scene: Scene, wording: int) -> str:
    wordings = _STAYS if scene.motion == "still" else _MOVES
    return wordings[wording].format(c=scene.colour, s=scene.shape, d=scene.motion, to=_TOWARDS.get(scene.motion))


def _finish(phrase: str, place: str, background: str, capital: bool, stop: bool) -> str:
    text = place.format(phrase, b=background)
    text = re.sub(r"\ba (?=[aeiou])", "an ", text)
    return (text[0].upper() + text[1:] if capital else text) + ("." if stop else "")


def captions(scene: Scene) -> list[str]:
    """Every caption of a scene: 10 wordings, without a background or with one of 5 phrases, with and without capital and full stop."""
    return [
        _finish(_phrase(scene, wording), place, scene.background, capital, stop)
        for wording in range(len(_MOVES))
        for place in ("{}", *_PLACES)
        for capital in (False, True)
        for stop in (False, True)
    ]


def caption(scene: Scene, rng: np.random.Generator, background: bool | None = None) -> str:
    """One caption of a scene. `background` says whether it names the background; None leaves it out of a quarter of captions."""
    wording, place = int(rng.integers(len(_MOVES))), str(rng.choice(_PLACES))
    named, capital, stop = rng.random(3)
    if background is None:
        background = bool(named < BACKGROUND_SHARE)
    return _finish(
        _phrase(scene, wording), place if background else "{}", scene.background, bool(capital < CAPITAL_SHARE), bool(stop < STOP_SHARE)
    )


def picture_caption(scene: Scene, rng: np.random.Generator) -> str:
    """One caption of a scene of which a single frame is seen: it names no motion."""
    phrase = str(rng.choice(_PICTURES)).format(c=scene.colour, s=scene.shape)
    named, capital, stop = rng.random(3)
    place = str(rng.choice(_PLACES)) if named < BACKGROUND_SHARE else "{}"
    return _finish(phrase, place, scene.background, bool(capital < CAPITAL_SHARE), bool(stop < STOP_SHARE))


def unknown_words(prompt: str) -> list[str]:
    """The words of a prompt that no caption has, as typed and each once; capitals do not matter."""
    return list(dict.fromkeys(word for word in _words(prompt) if word.lower() not in _KNOWN))


def parse(prompt: str) -> Wanted:
    """What a prompt asks for. ValueError where it does not name exactly one colour, shape and motion, or names two backgrounds."""
    words = [word.lower() for word in _words(prompt)]

    def pick(kind: str, names: dict[str, str]) -> list[str]:
        found = sorted({names[word] for word in words if word in names})
        if len(found) > 1 or not (found or kind == "background"):
            raise ValueError(f"the prompt {prompt!r} must name one {kind}, got {', '.join(found) or 'none'}; known are {', '.join(names)}")
        return found

    colour, shape = pick("colour", _same(COLOURS))[0], pick("shape", _same(SHAPES))[0]
    motion, background = pick("motion", _MOTION_OF)[0], pick("background", _same(BACKGROUNDS))
    return Wanted(colour=colour, shape=shape, motion=motion, background=background[0] if background else None)


def _same(names: Iterable[str]) -> dict[str, str]:
    return {name: name for name in names}


def evaluation_prompts(n: int, held_out: bool = False, seed: int = 0) -> list[str]:
    """`n` prompts of held-out or of trained combinations, as evenly over them as `n` allows; every second one names a background."""
    triples = combinations("heldout" if held_out else "train")
    prompts = []
    for index in range(n):
        block, place = divmod(index, len(triples))
        order = generator(seed, block, PROMPT_ORDER).permutation(len(triples))
        rng = generator(seed, index, PROMPT)
        background = str(rng.choice(list(BACKGROUNDS)))
        scene = Scene(*triples[int(order[place])], background, x=0.5, y=0.5, radius=RADIUS[0], speed=SPEED[0])
        prompts.append(caption(scene, rng, background=index % 2 == 0))
    return prompts

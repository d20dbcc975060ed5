"""The world of the data set `shapes`: its colours, shapes, motions and backgrounds, and scenes drawn from them.

Drawing is counter-based (Philox): scene i of a seed and split is the same whatever was drawn before it. Imports no torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from itertools import product
from typing import Literal

import numpy as np

Split = Literal["train", "heldout", "all"]
SPLITS: tuple[Split, ...] = ("train", "heldout", "all")

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (225, 25, 30),
    "yellow": (250, 225, 20),
    "green": (20, 175, 60),
    "blue": (25, 70, 235),
    "purple": (150, 35, 190),
    "orange": (250, 130, 10),
}
SHAPES = ("circle", "square", "triangle", "star")
MOTIONS: dict[str, tuple[int, int]] = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1), "still": (0, 0)}
BACKGROUNDS: dict[str, tuple[int, int, int]] = {"black": (0, 0, 0), "white": (255, 255, 255)}

RADIUS = (12 / 64, 15 / 64)  # smaller shapes drown in an 8-pixel latent grid at 64 pixels
SPEED = (16 / 64, 24 / 64)
MARGIN = 1 / 64

FOCUS = 3  # how many times as often a shape comes that a data set focuses on

SCENE, ORDER, CAPTION, PROMPT, PROMPT_ORDER = range(5)  # random streams


@dataclass(frozen=True)
class Scene:
    """One shape on a plain background.

    Lengths are fractions, so a scene fits every frame size and count: `x` and `y` (the middle of the path) of the width and the
    height, `radius` and `speed` (the path's length over the whole clip; 0 where still) of the shorter side.
    """

    colour: str
    shape: str
    motion: str
    background: str
    x: float
    y: float
    radius: float
    speed: float

    @property
    def held_out(self) -> bool:
        """Whether this combination is kept out of training."""
        return held_out(self.colour, self.shape, self.motion)


def held_out(colour: str, shape: str, motion: str) -> bool:
    """Whether the combination is kept out of training: 24 of the 120, one motion for each colour and shape."""
    try:
        index = list(COLOURS).index(colour) + SHAPES.index(shape) + list(MOTIONS).index(motion)
    except ValueError:
        raise ValueError(
            f"no such combination: {colour!r}, {shape!r}, {motion!r}; colours are {', '.join(COLOURS)}; shapes are {', '.join(SHAPES)}; "
            f"motions are {', '.join(MOTIONS)}"
        ) from None
    return index % len(MOTIONS) == 0


@lru_cache
def combinations(split: Split = "all") -> tuple[tuple[str, str, str], ...]:
    """Every (colour, shape, motion) of a split: 96 in train, 24 in heldout, 120 in all."""
    if split not in SPLITS:
        raise ValueError(f"no split named {split!r}; there are {', '.join(SPLITS)}")
    every = product(COLOURS, SHAPES, MOTIONS)
    return tuple(triple for triple in every if split == "all" or held_out(*triple) == (split == "heldout"))


def generator(seed: int, index: int, stream: int) -> np.random.Generator:
    """The random generator of item `index`: same arguments, same numbers. Streams are independent of each other."""
    if seed < 0 or index < 0:
        raise ValueError(f"seed and index must be 0 or more, got seed {seed} and index {index}")
    key, counter = np.array([seed, stream], dtype=np.uint64), np.array([0, 0, 0, index], dtype=np.uint64)
    return np.random.Generator(np.random.Philox(key=key, counter=counter))


@lru_cache
def _deck(split: Split, focus: str) -> tuple[tuple[str, str, str], ...]:
    return tuple(triple for triple in combinations(split) for _ in range(FOCUS if triple[1] == focus else 1))


@lru_cache(maxsize=4096)
def _order(block: int, seed: int, split: Split, focus: str) -> tuple[int, ...]:
    return tuple(int(i) for i in generator(seed, block, ORDER).permutation(len(_deck(split, focus))))


def scene_at(index: int, seed: int = 0, split: Split = "train", focus: str = "") -> Scene:
    """Scene `index` of a seed. Each run of len(combinations(split)) scenes has every combination once, so all are balanced.

    focus: a shape whose combinations come FOCUS times in each run instead
    """
    triples = _deck(split, focus)
    block, place = divmod(index, len(triples))
    colour, shape, motion = triples[_order(block, seed, split, focus)[place]]
    random = generator(seed, index, SCENE)
    background = str(random.choice(list(BACKGROUNDS)))
    radius = float(random.uniform(*RADIUS))
    speed = float(random.uniform(*SPEED)) if motion != "still" else 0.0
    x, y = (_inside(random, radius + abs(step) * speed / 2) for step in MOTIONS[motion])
    return Scene(colour, shape, motion, background, x, y, radius, speed)


def _inside(random: np.random.Generator, reach: float) -> float:
    low = reach + MARGIN
    return float(random.uniform(low, 1 - low))


def sample_scenes(n: int, seed: int = 0, split: Split = "train") -> list[Scene]:
    """The first `n` scenes of a seed."""
    return [scene_at(index, seed, split) for index in range(n)]

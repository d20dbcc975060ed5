"""The data set `shapes`: captioned clips of one moving shape, rendered on the fly from signed distances, anti-aliased."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import zip_longest

import torch
from torch import Tensor

from .buckets import Bucket, Info
from .captions import caption, evaluation_prompts, picture_caption
from .scenes import BACKGROUNDS, CAPTION, COLOURS, MOTIONS, SHAPES, SPLITS, Scene, Split, generator, held_out, sample_scenes, scene_at

__all__ = ["SHAPES", "Scene", "Shapes", "Split", "coverage", "held_out", "render", "sample_scenes"]

_CHUNK = 16  # clips rendered at once: temporaries stay in the tens of MB
_CAPTIONS = 16
FPS = 8.0


@dataclass(frozen=True)
class _Outline:
    """A closed line through `tips` outer and as many inner corners, at these multiples of the scene's radius; 0 tips is a circle.

    `drop` moves it down so that its bounding box is centred; every outline lies within 1 radius of that centre along both axes.
    """

    tips: int
    outer: float
    inner: float
    drop: float
    turn: float = -math.pi / 2  # the first tip points up

    @property
    def edge(self) -> tuple[float, float]:
        """Angle of the edge's normal, counted from the tip, and the edge's distance from the centre."""
        if not self.tips:
            return 0.0, self.outer
        half = math.pi / self.tips
        angle = math.atan2(self.outer - self.inner * math.cos(half), self.inner * math.sin(half))
        return angle, self.outer * math.cos(angle)


_OUTLINES = {
    "circle": _Outline(0, 1.0, 1.0, 0.0),
    "square": _Outline(4, 0.9 * math.sqrt(2), 0.9, 0.0, turn=math.pi / 4),
    "triangle": _Outline(3, 1.15, 0.575, 0.2875),
    "star": _Outline(5, 1.05, 0.45, 0.1),
}


def coverage(shapes: Sequence[str], x: Tensor, y: Tensor, radius: Tensor, size: tuple[int, int]) -> Tensor:
    """How much of each pixel a shape covers, [N, T, H, W] in [0, 1].

    `shapes` has N names; `x` and `y` [N, T] are centres and `radius` [N] radii, in pixels (a pixel's centre is at .5).
    """
    outlines = [_OUTLINES[shape] for shape in shapes]

    def column(values: list[float]) -> Tensor:
        return torch.tensor(values, dtype=torch.float32).view(-1, 1, 1, 1)

    r = radius.float().view(-1, 1, 1, 1)
    dx = torch.arange(size[1]) + 0.5 - x.float()[..., None, None]
    dy = torch.arange(size[0])[:, None] + 0.5 - y.float()[..., None, None] - r * column([o.drop for o in outlines])
    # An n-pointed outline repeats every 2 pi / n and mirrors within that, so one straight edge stands for all of them.
    period = column([2 * math.pi / o.tips if o.tips else math.inf for o in outlines])
    fold = torch.atan2(dy, dx) - column([o.turn for o in outlines])
    fold = torch.where(period.isinf(), 0.0, (fold - period * torch.round(fold / period)).abs())
    normal, offset = (column([o.edge[i] for o in outlines]) for i in (0, 1))
    distance = torch.hypot(dx, dy) * torch.cos(fold - normal) - r * offset
    return (0.5 - distance).clamp_(0, 1)


def render(scenes: Sequence[Scene], frames: int = 17, size: tuple[int, int] = (64, 64)) -> Tensor:
    """Clips of scenes: [N, 3, frames, height, width], float32 in [-1, 1]; `size` is (height, width)."""
    if frames < 1 or min(size) < 1:
        raise ValueError(f"frames and size must be positive, got {frames} frames of {size}")
    video = torch.empty(len(scenes), 3, frames, *size)
    for start in range(0, len(scenes), _CHUNK):
        part = scenes[start : start + _CHUNK]
        video[start : start + len(part)] = _render(part, frames, size)
    return video


def _render(scenes: Sequence[Scene], frames: int, size: tuple[int, int]) -> Tensor:
    side = min(size)
    along = torch.linspace(-0.5, 0.5, frames) if frames > 1 else torch.zeros(1)
    step = torch.tensor([[scene.speed * side * axis for axis in MOTIONS[scene.motion]] for scene in scenes])
    middle = torch.tensor([[scene.x * size[1], scene.y * size[0]] for scene in scenes])
    x, y = (middle[:, None] + step[:, None] * along[:, None]).unbind(-1)
    radius = torch.tensor([scene.radius * side for scene in scenes])
    covered = coverage([scene.shape for scene in scenes], x, y, radius, size)[:, None]
    colour, ground = (
        (torch.tensor(rgb) / 127.5 - 1)[..., None, None, None]
        for rgb in ([COLOURS[scene.colour] for scene in scenes], [BACKGROUNDS[scene.background] for scene in scenes])
    )
    return ground + covered * (colour - ground)


class Shapes:
    """Captioned clips by index; satisfies `wan_train.contracts.Dataset`.

    Item i of a seed and split (train, heldout or all) is always the same clip; the shape in `focus`, if any, comes more often than
    the others. Nothing is stored: `length` is what an epoch counts,
    and items beyond it exist too, so they can serve as clips that training never draws.
    """

    def __init__(
        self,
        split: Split = "train",
        seed: int = 0,
        frames: int = 17,
        size: Sequence[int] = (64, 64),
        length: int = 100_000,
        focus: str = "",
    ) -> None:
        if split not in SPLITS:
            raise ValueError(f"no split named {split!r}; there are {', '.join(SPLITS)}")
        if length < 1 or len(size) != 2:
            raise ValueError(f"length must be 1 or more and size (height, width), got length {length} and size {size!r}")
        if focus and focus not in SHAPES:
            raise ValueError(f"no shape named {focus!r} to focus on; there are {', '.join(SHAPES)}")
        self.split, self.seed, self.frames, self.size, self.length = split, seed, frames, (size[0], size[1]), length
        self.focus = focus

    def __len__(self) -> int:
        return self.length

    def key(self) -> str:
        """What a cache of the clips depends on."""
        return f"shapes/1 {self.split} {self.seed} {self.frames} {self.size} {self.focus}"

    def scenes(self, indices: Iterable[int]) -> list[Scene]:
        """The scenes of some items."""
        return [scene_at(int(index), self.seed, self.split, self.focus) for index in indices]

    def video(self, indices: Iterable[int]) -> Tensor:
        """The clips of some items, [N, 3, frames, height, width] in [-1, 1]."""
        return render(self.scenes(indices), self.frames, self.size)

    def info(self, index: int) -> Info:
        """Frames, height and width of the data set, and its rate."""
        return Info(self.frames, *self.size, FPS)

    def clip(self, index: int, bucket: Bucket) -> Tensor:
        """An item `[3, T, H, W]` rendered in another shape: lengths are fractions of the frame, and the path takes the whole clip."""
        return render(self.scenes([index]), bucket.frames, (bucket.height, bucket.width))[0]

    def identity(self, index: int) -> str:
        """What the pixels of an item depend on, besides the bucket."""
        return f"shapes/1 {self.split} {self.seed} {self.focus} {index}"

    def captions(self, index: int) -> list[str]:
        """16 captions of an item; a quarter of all leave the background out, those of single frames the motion."""
        scene, wording = scene_at(index, self.seed, self.split, self.focus), generator(self.seed, index, CAPTION)
        worded = caption if self.frames > 1 else picture_caption
        return [worded(scene, wording) for _ in range(_CAPTIONS)]

    def evaluation_prompts(self, n: int) -> list[str]:
        """Prompts for previews, half of them held-out combinations; those of seed 0 are kept for the final figures."""
        seen, unseen = evaluation_prompts(n - n // 2, held_out=False, seed=1), evaluation_prompts(n // 2, held_out=True, seed=1)
        return [prompt for pair in zip_longest(seen, unseen) for prompt in pair if prompt]

    def evaluate(self, clips: Tensor, prompts: Sequence[str]) -> dict[str, float]:
        """Shares of clips [N, 3, T, H, W] that show what the prompts ask for."""
        from ..evaluation.shapes import evaluate

        return evaluate(clips, prompts).figures()

"""The data set `natural`: procedural clips with the statistics of film: stills under camera motion, things that move before them.

What a VAE learns from them serves real film, of which they hold nothing. Each clip is fixed by seed and index, and drawn on the fly.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from .buckets import Bucket, Info
from .scenes import generator
from .textures import Picture, fractal, still

CLIP = 16  # random stream, apart from those of `scenes`
FPS = 16.0
MARGIN = 1.5  # side of a still over the side of the clip


class Natural:
    """Clips by index without captions; satisfies `wan_train.contracts.Dataset`.

    `length` is what an epoch counts; items beyond it exist too, and are never trained on.
    """

    def __init__(self, seed: int = 0, frames: int = 17, size: Sequence[int] = (64, 64), length: int = 100_000) -> None:
        if length < 1 or len(size) != 2 or min(size) < 1 or frames < 1:
            raise ValueError(f"length and frames must be 1 or more and size (height, width), got {length}, {frames} and {size!r}")
        self.seed, self.frames, self.size, self.length = seed, frames, (size[0], size[1]), length

    def __len__(self) -> int:
        return self.length

    def key(self) -> str:
        """What a cache of the clips depends on."""
        return f"natural/1 {self.seed} {self.frames} {self.size}"

    def identity(self, index: int) -> str:
        """What the pixels of an item depend on, besides the bucket."""
        return f"natural/1 {self.seed} {index}"

    def video(self, indices: Iterable[int]) -> Tensor:
        """The clips of some items, [N, 3, frames, height, width] in [-1, 1]."""
        return torch.stack([render(self.seed, int(index), self.frames, self.size) for index in indices])

    def info(self, index: int) -> Info:
        return Info(self.frames, *self.size, FPS)

    def clip(self, index: int, bucket: Bucket) -> Tensor:
        """An item `[3, T, H, W]` drawn in another shape."""
        return render(self.seed, index, bucket.frames, (bucket.height, bucket.width))

    def captions(self, index: int) -> list[str]:
        """None: there is nothing to name."""
        return [""]

    def evaluation_prompts(self, n: int) -> list[str]:
        return [""] * n

    def evaluate(self, clips: Tensor, prompts: Sequence[str]) -> dict[str, float]:
        """Nothing is known of what clips should show."""
        return {}


def render(seed: int, index: int, frames: int, size: tuple[int, int]) -> Tensor:
    """One clip `[3, frames, height, width]` in [-1, 1]: a background and up to two things before it, each with a motion of its own."""
    rng = generator(seed, index, CLIP)
    parts = [frames]
    if frames > 8 and rng.random() < 0.06:  # a cut
        first = int(rng.integers(1, frames))
        parts = [first, frames - first]
    clip = torch.cat([_shot(rng, count, size) for count in parts], 1)
    return _seen(rng, clip).mul_(2).sub_(1)


def _shot(rng: np.random.Generator, frames: int, size: tuple[int, int]) -> Tensor:
    """`[3, frames, height, width]` in [0, 1]."""
    side = 8 * math.ceil(MARGIN * max(size) / 8)
    camera = _motion(rng, frames, rng.choice([0.0, 0.5, 2.0], p=[0.25, 0.45, 0.3]))
    clip = _sampled(still(rng, side), camera, side, size)
    for _ in range(int(rng.choice([0, 1, 2], p=[0.4, 0.4, 0.2]))):
        reach, place = rng.uniform(0.1, 0.35), rng.uniform(-0.4, 0.4, 2)
        ramp = np.linspace(-0.75, 0.75, side, dtype=np.float32)
        inside = reach - np.hypot(ramp[:, None] - place[0], ramp[None] - place[1])[..., None]
        inside += reach * rng.uniform(0, 0.5) * fractal(rng, side, 2.0)
        mask = np.clip(inside * side * rng.uniform(0.2, 1.0) / 1.5 + 0.5, 0, 1)
        layer = np.concatenate([still(rng, side), mask], -1)
        *_, alpha = sampled = _sampled(layer, camera + _motion(rng, frames, rng.choice([0.5, 2.0, 4.0])), side, size)
        clip = clip + alpha * (sampled[:3] - clip)
    return clip


def _motion(rng: np.random.Generator, frames: int, most: float) -> Tensor:
    """Of each frame `[frames, 4]`: pixels to the right and down, radians, and the logarithm of the zoom; about `most` pixels a frame."""
    time = torch.arange(frames) - (frames - 1) / 2
    speed = torch.tensor(rng.normal(0, [most, most, most / 100, most / 150])).float()
    curve = torch.tensor(rng.normal(0, [most / 30, most / 30, 0, 0])).float()
    path = time[:, None] * speed + time[:, None].square() * curve
    if rng.random() < 0.2:  # held in the hand
        shake = torch.tensor(rng.normal(0, rng.uniform(0, 0.5), (frames, 4))).float() * torch.tensor([1.0, 1.0, 0.01, 0.005])
        path = path + shake.cumsum(0) - shake.cumsum(0).mean(0)
    return path


def _sampled(picture: Picture, path: Tensor, side: int, size: tuple[int, int]) -> Tensor:
    """The still `[side, side, C]` seen along a path: `[C, frames, height, width]`; beyond its borders it is mirrored."""
    frames, angle, zoom = len(path), path[:, 2], path[:, 3].clamp(-0.5, 0.5).exp()
    rows = torch.arange(size[0]) - (size[0] - 1) / 2
    columns = torch.arange(size[1]) - (size[1] - 1) / 2
    cos, sin = (zoom * angle.cos())[:, None, None], (zoom * angle.sin())[:, None, None]
    x = columns * cos - rows[:, None] * sin - path[:, 0, None, None]
    y = columns * sin + rows[:, None] * cos - path[:, 1, None, None]
    grid = torch.stack((x, y), -1) * (2 / side)
    given = torch.tensor(picture.transpose(2, 0, 1), dtype=torch.float32).expand(frames, -1, -1, -1)
    return F.grid_sample(given, grid, mode="bilinear", padding_mode="reflection", align_corners=False).transpose(0, 1)


def _seen(rng: np.random.Generator, clip: Tensor) -> Tensor:
    """As a camera has it: exposure, contrast, saturation, a fade, grain."""
    frames = clip.shape[1]
    grey = clip.mean(0, keepdim=True)
    clip = grey + rng.uniform(0.6, 1.3) * (clip - grey) if rng.random() < 0.9 else grey.expand(3, -1, -1, -1)
    clip = clip.clamp(0, 1) ** rng.uniform(0.7, 1.6) * rng.uniform(0.6, 1.1) + rng.uniform(0, 0.08)
    if rng.random() < 0.1:  # to or from black, or white
        first, last = rng.uniform(0, 1, 2).tolist()
        gain = torch.linspace(first, last, frames).view(1, -1, 1, 1)
        clip = clip * gain + (1 - gain) * float(rng.integers(2))
    if rng.random() < 0.3:
        grain = torch.from_numpy(rng.standard_normal(tuple(clip.shape), dtype=np.float32))
        clip = clip + rng.uniform(0, 0.02) * grain
    return clip.clamp(0, 1)

"""Buckets: the few shapes that clips of all sizes and lengths are brought to, and how many samples of one go through at once.

A shape has 1 + 4k frames and sides that are multiples of the model's grid; a batch holds samples of one shape. Imports no torch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

Grid = tuple[int, int, int]
GRID: Grid = (4, 16, 16)  # a VAE of 4 x 8 x 8 under patches of 1 x 2 x 2; TI2V-5B has 4 x 32 x 32


class Info(NamedTuple):
    """A clip as its data set has it: frames at its rate, upright size in pixels with square ones, frames a second (0 of a picture)."""

    frames: int
    height: int
    width: int
    fps: float


class Bucket(NamedTuple):
    """A shape in frames and pixels."""

    frames: int
    height: int
    width: int

    def __str__(self) -> str:
        return f"{self.frames}x{self.height}x{self.width}"


def tokens(bucket: Bucket, grid: Grid = GRID) -> int:
    """Tokens of one sample: latent frames x rows x columns of patches."""
    return ((bucket.frames - 1) // grid[0] + 1) * (bucket.height // grid[1]) * (bucket.width // grid[2])


def cost(bucket: Bucket, grid: Grid = GRID, knee: float = 20_000) -> float:
    """What a sample costs to train on, in tokens of short sequences: s + s^2 / knee.

    knee: tokens at which attention costs as much as all else: 3 dim + ffn_dim, 13,568 for 1.3B and 29,184 for 14B
    """
    count = tokens(bucket, grid)
    return count + count * count / knee


@dataclass(frozen=True)
class Budget:
    """What one micro-batch may hold, summed over its samples: `tokens`, and `squared`, tokens squared (0: no limit).

    Raises ValueError where a single sample is over it.
    """

    tokens: int
    squared: int = 0
    grid: Grid = GRID

    def __call__(self, bucket: Bucket) -> int:
        """Samples of `bucket` in a micro-batch."""
        count = tokens(bucket, self.grid)
        fits = self.tokens // count
        if self.squared:
            fits = min(fits, self.squared // count**2)
        if not fits:
            limit = f"{self.tokens} tokens" if self.tokens < count else f"{self.squared} tokens squared"
            raise ValueError(f"one sample of {bucket} (frames, height, width) has {count} tokens, more than the budget of {limit}")
        return fits


class Buckets:
    """The shapes of a stage, and which one a clip is brought to.

    image, video: (height, width) of pictures and films; it stands for its area: shapes of other proportions have no more of it
    frames: lengths of films; a clip takes the longest that it fills
    grid: frames, rows and columns of pixels that make one token
    ratio: the longest side over the shortest one
    Raises ValueError where a shape does not divide by the grid.
    """

    def __init__(
        self,
        *,
        video: Sequence[int] = (480, 832),
        image: Sequence[int] | None = None,
        frames: Sequence[int] = (81,),
        grid: Grid = GRID,
        ratio: float = 2.4,
    ) -> None:
        self.grid, self.frames = grid, tuple(sorted(set(frames)))
        if any(count < 1 or (count - 1) % grid[0] for count in self.frames) or not self.frames:
            raise ValueError(f"frames of buckets are 1 + {grid[0]}k, such as {1 + grid[0]} or {1 + 20 * grid[0]}, got {list(frames)}")
        self.video, self.image = (_shapes(size, grid, ratio) for size in (video, image or video))

    def of(self, info: Info) -> Bucket:
        """The bucket of a clip: the longest it fills, then the nearest proportions. ValueError where it is too short for any."""
        still = info.frames == 1
        fitting = [count for count in self.frames if count <= info.frames]
        if not fitting and not still:
            raise ValueError(f"a clip has {info.frames} frames, the shortest bucket {self.frames[0]}")
        wanted = math.log(info.width / info.height)
        height, width = min(self.image if still else self.video, key=lambda shape: (abs(math.log(shape[1] / shape[0]) - wanted), shape))
        return Bucket(1 if still else fitting[-1], height, width)


def _shapes(size: Sequence[int], grid: Grid, ratio: float) -> tuple[tuple[int, int], ...]:
    """(height, width) of every proportion within `ratio`, each side as long as the area of `size` allows."""
    rows, columns = grid[1:]
    if len(size) != 2 or min(size) < 1 or size[0] % rows or size[1] % columns:
        raise ValueError(f"a bucket's size is (height, width) in multiples of {rows} and {columns}, got {list(size)}")
    if ratio < 1:
        raise ValueError(f"ratio is the longest side over the shortest, 1 or more, got {ratio}")
    area = (size[0] // rows) * (size[1] // columns)
    found = {(h, area // h) for h in range(1, area + 1)} | {(area // w, w) for w in range(1, area + 1)}
    best = {(h, w) for h, w in found if (h + 1) * w > area and h * (w + 1) > area}  # neither side could be longer
    shapes = {(h * rows, w * columns) for h, w in best} | {(size[0], size[1])}
    return tuple(sorted(shape for shape in shapes if max(shape) <= ratio * min(shape) or shape == tuple(size)))

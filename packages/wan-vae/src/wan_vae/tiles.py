"""Where tiles lie: which part of a picture each keeps, and how much around it the convolutions have to see.

Everything here is counted in cells of the latent grid, along one axis at a time.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor

from .config import VAEConfig

Half = Literal["encoder", "decoder"]


@dataclass(frozen=True)
class Span:
    """Cells `low` to `high` are computed, of which `start` to `stop` are kept."""

    start: int
    stop: int
    low: int
    high: int


def reach(config: VAEConfig, half: Half) -> tuple[int, int]:
    """Cells that the convolutions outside the deepest part see before and after a cell (above and below, left and right).

    Example: `reach(WAN21, "decoder")` is (13, 13), `reach(WAN21, "encoder")` is (8, 9).
    """
    low, high = (_read_by_decoder if half == "decoder" else _read_by_encoder)(config)
    return -low, high


def _read_by_decoder(config: VAEConfig) -> tuple[int, int]:
    """From the pixels of one cell back to cells; what an upsampler reads at twice the size is halved outwards."""
    blocks = 2 * (config.num_res_blocks + 1)
    low, high = -1, 1  # the head
    for level in range(len(config.dim_mult)):
        if level:
            low, high = (low - 1) // 2, -(-(high + 1) // 2)
        low, high = low - blocks, high + blocks
    return low, high


def _read_by_encoder(config: VAEConfig) -> tuple[int, int]:
    """From one cell forward to the pixels it is made of; a downsampler reaches one over the lower and right edge."""
    blocks, last = 2 * config.num_res_blocks, len(config.dim_mult) - 1
    low, high = -blocks, blocks
    for _ in range(last):
        low, high = 2 * low - blocks, 2 * high + 1 + blocks
    side = 2**last
    return (low - 1) // side, -(-(high + 1) // side)


def kept_apart(cells: int, tile: int, before: int, after: int) -> list[Span]:
    """`cells` in the fewest parts of at most `tile`, as equal as can be, each with its surroundings inside the picture."""
    count = -(-cells // tile)
    bounds = [round(i * cells / count) for i in range(count + 1)]
    return [Span(a, b, max(0, a - before), min(cells, b + after)) for a, b in pairwise(bounds)]


def overlapping(cells: int, tile: int, overlap: int) -> list[Span]:
    """The fewest tiles of `tile` cells that share at least `overlap` with their neighbours, evenly spread from edge to edge."""
    tile = min(tile, cells)
    count = 1 + max(0, math.ceil((cells - tile) / (tile - overlap))) if tile < cells else 1
    starts = [round(i * (cells - tile) / max(1, count - 1)) for i in range(count)]
    return [Span(start, start + tile, start, start + tile) for start in starts]


def blending_weights(spans: list[Span], scale: int = 1) -> list[Tensor]:
    """For each tile the weights of its pixels, `scale` to a cell: cosine ramps where tiles overlap; at each pixel their sum is 1."""
    length = scale * max(span.stop for span in spans)
    weights = torch.zeros(len(spans), length, dtype=torch.float64)
    for i, span in enumerate(spans):
        own = weights[i, scale * span.start : scale * span.stop]
        own += 1
        if i > 0:
            ramp = _ramp(scale * (spans[i - 1].stop - span.start))
            own[: len(ramp)] *= ramp
        if i < len(spans) - 1:
            ramp = _ramp(scale * (span.stop - spans[i + 1].start))
            own[len(own) - len(ramp) :] *= ramp.flip(0)
    weights /= weights.sum(0)
    return [weights[i, scale * span.start : scale * span.stop] for i, span in enumerate(spans)]


def _ramp(length: int) -> Tensor:
    """Rises from 0 to 1 along half a period of the cosine."""
    return (1 - torch.cos(torch.pi * (torch.arange(length, dtype=torch.float64) + 0.5) / length)) / 2

"""Rotary position embedding over time, height and width (RoFormer, arXiv 2104.09864; official `rope_params`, `rope_apply`).

A head's pairs are split over the axes as 22/21/21 for a head width of 128; every axis starts at 0, theta is 10000. The
table is a function of its arguments, cached once per grid, and belongs to no module.

Shape suffixes: B batch, L tokens, N heads, H head width, P pairs (H / 2).
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

THETA = 10000.0


def axis_widths(head_dim: int) -> tuple[int, int, int]:
    """Real channels of a head that time, height and width turn: 44, 42, 42 of 128."""
    side = 2 * (head_dim // 6)
    return head_dim - 2 * side, side, side


def axis_angles(length: int, width: int) -> Tensor:
    """Angles `[length, width / 2]` of one axis in float64, radians."""
    frequencies = THETA ** -(torch.arange(0, width, 2, dtype=torch.float64) / width)
    return torch.outer(torch.arange(length, dtype=torch.float64), frequencies)


@lru_cache(maxsize=8)
def rope_table(grid: tuple[int, int, int], head_dim: int, device: torch.device, dtype: torch.dtype = torch.complex64) -> Tensor:
    """Unit complex numbers `[L, P]` for the tokens of a (frames, height, width) grid, width fastest."""
    with torch.inference_mode(False):  # the cached table must serve training too
        axes = [axis_angles(length, width) for length, width in zip(grid, axis_widths(head_dim), strict=True)]
        frames, height, width = grid
        angles = torch.cat(
            [
                axes[0][:, None, None].expand(frames, height, width, -1),
                axes[1][None, :, None].expand(frames, height, width, -1),
                axes[2][None, None, :].expand(frames, height, width, -1),
            ],
            dim=-1,
        ).flatten(0, 2)
        return torch.polar(torch.ones_like(angles), angles).to(dtype).to(device)


def rotate(x_BLNH: Tensor, rope_LP: Tensor) -> Tensor:
    """Turn interleaved (even, odd) pairs by the table, in its precision: fp32 for complex64, fp64 for complex128."""
    pairs_BLNP2 = x_BLNH.to(torch.float64 if rope_LP.dtype == torch.complex128 else torch.float32).unflatten(-1, (-1, 2))
    if torch.compiler.is_compiling():  # the compiler makes no code for complex numbers
        (cos, sin), (even, odd) = torch.view_as_real(rope_LP)[:, None].unbind(-1), pairs_BLNP2.unbind(-1)
        return torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1).flatten(-2)
    return torch.view_as_real(torch.view_as_complex(pairs_BLNP2) * rope_LP[:, None]).flatten(-2)

"""The wavelet term of a VAE's loss: L1 on the sub-bands of a Haar transform over time and space, as in LTX-Video (arXiv 2501.00103)."""

from __future__ import annotations

import torch
from torch import Tensor

AXES = (2, 3, 4)  # time, height, width


def haar(video: Tensor, levels: int = 1) -> list[Tensor]:
    """The sub-bands of `[B, C, T, H, W]`: of each level the 7 that are high along an axis or more, then what is low along all.

    Those 7 are in the order LLH, LHL, LHH, HLL, HLH, HHL, HHH of (time, height, width); the next level transforms LLL. The transform is
    orthonormal: as many numbers as before, with the same sum of squares.
    Neighbours along an axis are taken in pairs. Of an odd number the first is left alone, and is low as it is. So of 1 + 4k frames, two
    levels over, the first frame goes through a transform of height and width only, as causal VAEs code it, and a picture has the 4
    sub-bands of a transform in 2D: the others are empty.
    """
    bands = []
    for _ in range(levels):
        video, *high = _split(video)
        bands += high
    return [*bands, video]


def wavelet_distance(difference: Tensor, levels: int = 1) -> Tensor:
    """L1 on the sub-bands of the difference of clips `[B, C, T, H, W]`: the mean size of their numbers, of each clip, `[B]`."""
    sums = torch.stack([band.abs().flatten(1).sum(1) for band in haar(difference, levels)])
    return sums.sum(0) / difference[0].numel()


def _split(video: Tensor) -> list[Tensor]:
    """The 8 sub-bands of one level, from LLL to HHH."""
    bands = [video]
    for axis in AXES:
        bands = [part for band in bands for part in _pairs(band, axis)]
    return bands


def _pairs(band: Tensor, axis: int) -> tuple[Tensor, Tensor]:
    """Sums and differences of neighbours along an axis, over the square root of 2."""
    odd, pairs = band.shape[axis] % 2, band.shape[axis] // 2
    alone, rest = band.split([odd, 2 * pairs], dim=axis)
    one, other = rest.unflatten(axis, (pairs, 2)).unbind(axis + 1)
    return torch.cat([alone, (one + other) * 0.5**0.5], axis), (one - other) * 0.5**0.5

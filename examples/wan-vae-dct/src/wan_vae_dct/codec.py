"""A video codec without weights: the lowest frequencies of blocks, by the discrete cosine transform.

A block is 8 x 8 pixels of the first frame, or of four later frames; of each colour 16 frequencies are kept, so that 1/4 of the numbers of
the first frame and 1/16 of those of all others are. Shapes: B batch, T frames, H height, W width.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from functools import lru_cache

import torch
from einops import rearrange
from torch import Tensor, nn

from .plugin import SPEC

KEPT = SPEC.latent_channels // 3


class DCT(nn.Module):
    """Video `[B, 3, T, H, W]` in [-1, 1], T = 1 + 4k and H, W multiples of 8, to latents `[B, 48, 1 + k, H / 8, W / 8]` and back."""

    spec = SPEC

    def encode(self, video: Tensor) -> Tensor:
        """Video to latents. ValueError where T, H or W does not divide."""
        _check(video)
        return torch.cat([_forward(group) for group in _groups(video, first=True)], dim=2)

    def decode(self, latents: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
        """Latents to video, clamped to [-1, 1]."""
        return torch.cat(list(self.decode_stream([latents])), dim=2)

    def encode_stream(self, chunks: Iterable[Tensor]) -> Iterator[Tensor]:
        """Chunks of frames to chunks of latents: the first has 1 + 4k frames, every other 4k."""
        for i, chunk in enumerate(chunks):
            _check(chunk, started=i > 0)
            yield torch.cat([_forward(group) for group in _groups(chunk, first=i == 0)], dim=2)

    def decode_stream(self, chunks: Iterable[Tensor]) -> Iterator[Tensor]:
        """Chunks of latents to chunks of frames: the very first latent is one frame, every other four."""
        started = False
        for chunk in chunks:
            if chunk.ndim != 5 or chunk.shape[1] != SPEC.latent_channels:
                raise ValueError(f"latents are {tuple(chunk.shape)}, expected [B, {SPEC.latent_channels}, T, H, W]")
            times = [SPEC.stride[0] if started or i else 1 for i in range(chunk.shape[2])]
            started = True
            yield torch.cat([_backward(z, time) for z, time in zip(chunk.split(1, dim=2), times, strict=True)], dim=2).clamp(-1, 1)


def _groups(video: Tensor, first: bool) -> tuple[Tensor, ...]:
    """The first frame, and groups of four."""
    time = SPEC.stride[0]
    return video.split([*([1] if first else []), *[time] * (video.shape[2] // time)], dim=2)


def _forward(group: Tensor) -> Tensor:
    """Frames of a group, `[B, 3, 1 or 4, H, W]`, to its latent `[B, 48, 1, H / 8, W / 8]`."""
    basis = _basis(group.shape[2]).to(group.device)
    blocks = rearrange(group.float(), "b c t (h q) (w r) -> b h w c (t q r)", q=SPEC.stride[1], r=SPEC.stride[2])
    return rearrange(blocks @ basis.T * _scale(group.shape[2]), "b h w c k -> b (c k) 1 h w")


def _backward(latent: Tensor, time: int) -> Tensor:
    """The inverse, as far as what was kept tells."""
    basis = _basis(time).to(latent.device)
    blocks = rearrange(latent.float(), "b (c k) 1 h w -> b h w c k", c=3) @ basis / _scale(time)
    return rearrange(blocks, "b h w c (t q r) -> b c t (h q) (w r)", t=time, q=SPEC.stride[1], r=SPEC.stride[2])


def _scale(time: int) -> float:
    """What gives the means of blocks, which are most of a picture, about the variance of a latent's numbers: 1."""
    return 2 / math.sqrt(time * SPEC.stride[1] * SPEC.stride[2])


@lru_cache(maxsize=2)
def _basis(time: int) -> Tensor:
    """`[16, time * 64]`: the waves that are kept, orthonormal, from the lowest on."""
    waves, costs = [], []
    for t in range(time):
        for q in range(SPEC.stride[1]):
            for r in range(SPEC.stride[2]):
                parts = (_wave(t, time), _wave(q, SPEC.stride[1]), _wave(r, SPEC.stride[2]))
                waves.append(torch.einsum("t,q,r->tqr", *parts).flatten())
                costs.append((2 * t + q + r, t, q, r))
    kept = sorted(range(len(costs)), key=costs.__getitem__)[:KEPT]
    return torch.stack([waves[i] for i in kept]).float()


def _wave(frequency: int, length: int) -> Tensor:
    """A wave of the DCT-II with norm 1."""
    places = (torch.arange(length, dtype=torch.float64) + 0.5) * math.pi / length
    wave = torch.cos(frequency * places)
    return wave / wave.norm()


def _check(video: Tensor, started: bool = False) -> None:
    time, height, width = SPEC.stride
    if video.ndim != 5 or video.shape[1] != 3:
        raise ValueError(f"video is {tuple(video.shape)}, expected [B, 3, T, H, W]")
    if video.shape[2] % time != (0 if started else 1) or (started and not video.shape[2]):
        raise ValueError(f"{video.shape[2]} frames, expected {f'a multiple of {time}' if started else f'1 + {time}k'}")
    if video.shape[3] % height or video.shape[4] % width or 0 in video.shape:
        raise ValueError(f"frames are {video.shape[3]} high and {video.shape[4]} wide, expected multiples of {height}")

"""The chunks that a VAE with two-way convolutions takes whole: the first frame, then groups of `VAEConfig.chunk` latent frames.

Shapes: B batch, C channels, T frames, H height, W width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .config import VAEConfig
from .tiles import Half


class Waiting:
    """What was given to a stream and waits until its chunk is full; of a causal VAE (`chunk` 0) nothing ever waits."""

    def __init__(self, config: VAEConfig, half: Half) -> None:
        self.size = config.chunk * (config.stride[0] if half == "encoder" else 1)
        self.started = False
        self.held_BCTHW: Tensor | None = None

    def push(self, x_BCTHW: Tensor) -> list[Tensor]:
        """The chunks that are full now; the rest waits, in a copy."""
        if not self.size:
            return [x_BCTHW]
        first, self.started = int(not self.started), True
        chunks, x_BCTHW = [x_BCTHW[:, :, :1]] * first, x_BCTHW[:, :, first:]
        if self.held_BCTHW is not None:
            x_BCTHW = torch.cat([self.held_BCTHW, x_BCTHW], dim=2)
        full = x_BCTHW.shape[2] // self.size * self.size
        self.held_BCTHW = x_BCTHW[:, :, full:].clone() if full < x_BCTHW.shape[2] else None
        return [*chunks, *x_BCTHW[:, :, :full].split(self.size, dim=2)] if full else chunks

    def rest(self) -> list[Tensor]:
        """The last chunk, which is shorter, where there is one."""
        held_BCTHW, self.held_BCTHW = self.held_BCTHW, None
        return [] if held_BCTHW is None else [held_BCTHW]


def chunks_of(config: VAEConfig, half: Half, x_BCTHW: Tensor) -> list[Tensor]:
    """A whole clip in chunks; in one where the VAE is causal."""
    waiting = Waiting(config, half)
    return [*waiting.push(x_BCTHW), *waiting.rest()]

"""Encoder and decoder of the Wan VAE (Wan report, section 4.1).

Shapes: B batch, C channels, T frames, H height, W width.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor, nn

from .config import VAEConfig
from .layers import CausalConv, Head, Middle
from .resample import DownLevel, UpLevel
from .stream import StreamState
from .timestep import TimestepEmbedding


class Encoder(nn.Module):
    """Patches of video to the moments of the latents."""

    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        widths = [config.base_dim * mult for mult in (1, *config.dim_mult)]
        times = (*config.temporal_downsample, False)
        last = len(times) - 1
        self.conv_in = CausalConv(3 * config.patch_size**2, widths[0], (3, 3, 3))
        self.levels = nn.ModuleList(
            DownLevel(dim, out_dim, config.num_res_blocks, down=i < last, time=times[i], residual=config.residual)
            for i, (dim, out_dim) in enumerate(pairwise(widths))
        )
        self.middle = Middle(widths[-1])
        self.head = Head(widths[-1], 2 * config.z_dim)

    def forward(self, x_BCTHW: Tensor, state: StreamState) -> Tensor:
        return self.bottom(self.trunk(x_BCTHW, state), state)

    def trunk(self, x_BCTHW: Tensor, state: StreamState) -> Tensor:
        """From pixels to the grid of the latents: convolutions alone, so a tile needs its surroundings and no more."""
        x_BCTHW = state.run(self.conv_in, x_BCTHW)
        for level in self.levels:
            x_BCTHW = level(x_BCTHW, state)
        return x_BCTHW

    def bottom(self, x_BCTHW: Tensor, state: StreamState) -> Tensor:
        """On the grid of the latents, where a frame attends to all of itself."""
        return state.run(self.head, self.middle(x_BCTHW, state))


class Decoder(nn.Module):
    """Latents to patches of video; told, where it is conditioned, how much noise is in them."""

    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        timed = config.timestep_conditioning
        widths = [config.decoder_base_dim * mult for mult in (config.dim_mult[-1], *reversed(config.dim_mult))]
        times = (*reversed(config.temporal_downsample), False)
        last = len(times) - 1
        self.conv_in = CausalConv(config.z_dim, widths[0], (3, 3, 3))
        self.middle = Middle(widths[0], timed)
        self.levels = nn.ModuleList(
            UpLevel(
                dim if config.residual or i == 0 else dim // 2,
                out_dim,
                config.num_res_blocks + 1,
                up=i < last,
                time=times[i],
                residual=config.residual,
                timed=timed,
            )
            for i, (dim, out_dim) in enumerate(pairwise(widths))
        )
        self.head = Head(widths[-1], 3 * config.patch_size**2, timed)
        self.timestep = TimestepEmbedding() if timed else None

    def forward(self, z_BCTHW: Tensor, state: StreamState) -> Tensor:
        return self.trunk(self.bottom(z_BCTHW, state), state)

    def bottom(self, z_BCTHW: Tensor, state: StreamState) -> Tensor:
        """On the grid of the latents, where a frame attends to all of itself."""
        self._embed(state)
        return self.middle(state.run(self.conv_in, z_BCTHW), state)

    def trunk(self, x_BCTHW: Tensor, state: StreamState) -> Tensor:
        """From the grid of the latents to pixels: convolutions alone, so a tile needs its surroundings and no more."""
        self._embed(state)
        for level in self.levels:
            x_BCTHW = level(x_BCTHW, state)
        return state.run(self.head, x_BCTHW)

    def _embed(self, state: StreamState) -> None:
        """Once a stream: the timestep as the blocks take it."""
        if self.timestep is not None and state.embedding is None:
            timestep = torch.zeros(1, device=self.conv_in.weight.device) if state.timestep is None else state.timestep
            state.embedding = self.timestep(timestep)

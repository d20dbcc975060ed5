"""The blocks of LTX-Video's VAE, under their official names (Lightricks/LTX-Video, ltx_video/models/autoencoders).

Norms have no parameters: a position's channels are divided by their root mean square. Time is padded by repeated frames.
Shapes: B batch, C channels, T frames, H height, W width.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from .ltx_config import Padding, Step, Stride
from .ltx_stream import LTXState

KERNEL = 3
FREQUENCIES = 256  # sines and cosines of a timestep


def pixel_norm(x_BCTHW: Tensor) -> Tensor:
    """x over its root mean square of channels, which is taken in fp32."""
    wide_BCTHW = x_BCTHW.to(torch.promote_types(x_BCTHW.dtype, torch.float32))
    return (wide_BCTHW * (wide_BCTHW.square().mean(dim=1, keepdim=True) + 1e-8).rsqrt()).to(x_BCTHW.dtype)


def activated(x_BCTHW: Tensor, shift_BC111: Tensor | None = None, scale_BC111: Tensor | None = None) -> Tensor:
    """Norm, modulation where there is one, and SiLU."""
    x_BCTHW = pixel_norm(x_BCTHW)
    if shift_BC111 is not None and scale_BC111 is not None:
        x_BCTHW = x_BCTHW * (1 + scale_BC111) + shift_BC111
    return F.silu(x_BCTHW)


class Conv(nn.Module):
    """A 3x3x3 convolution. Causal: of the present and two frames before; else of one before and one after."""

    def __init__(self, dim: int, out_dim: int, *, stride: Stride = (1, 1, 1), causal: bool = True, padding_mode: Padding = "zeros") -> None:
        super().__init__()
        self.before, self.after = (KERNEL - 1, 0) if causal else (KERNEL // 2, KERNEL // 2)
        self.slot = ""
        self.conv = nn.Conv3d(dim, out_dim, KERNEL, stride=stride, padding=(0, 1, 1), padding_mode=padding_mode)

    def forward(self, x_BCTHW: Tensor, state: LTXState) -> Tensor:
        time, *spatial = self.conv.stride
        x_BCTHW = state.around(self.slot, x_BCTHW, self.before, self.after, time)
        if x_BCTHW.shape[2] < KERNEL:
            sizes = (-(-size // step) for size, step in zip(x_BCTHW.shape[3:], spatial, strict=True))
            return x_BCTHW.new_empty(len(x_BCTHW), self.conv.out_channels, 0, *sizes)
        made: Tensor = self.conv(x_BCTHW)
        return made


class TimestepEmbedder(nn.Module):
    """A timestep to a vector for each video: sines and cosines, then two layers."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.timestep_embedder = nn.Module()
        self.timestep_embedder.linear_1 = nn.Linear(FREQUENCIES, dim)
        self.timestep_embedder.linear_2 = nn.Linear(dim, dim)

    def forward(self, timestep_B: Tensor) -> Tensor:
        half = FREQUENCIES // 2
        rates = torch.exp(-math.log(10000) * torch.arange(half, dtype=torch.float32, device=timestep_B.device) / half)
        angles = timestep_B.float()[:, None] * rates
        first, second = self.timestep_embedder.linear_1, self.timestep_embedder.linear_2
        waves = torch.cat([angles.cos(), angles.sin()], dim=1).to(first.weight.dtype)  # type: ignore[union-attr, arg-type]
        made: Tensor = second(F.silu(first(waves)))  # type: ignore[operator]
        return made


class ChannelNorm(nn.Module):
    """LayerNorm over channels."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim, eps=1e-6)

    def forward(self, x_BCTHW: Tensor) -> Tensor:
        normed: Tensor = self.norm(x_BCTHW.movedim(1, -1)).movedim(-1, 1)
        return normed


class ResBlock(nn.Module):
    """Norm, SiLU, convolution, twice, around a shortcut that changes the width where needed.

    timed: shift and scale after either norm, from the timestep
    inject_noise: noise per position after either convolution, scaled per channel
    """

    def __init__(self, dim: int, out_dim: int, *, timed: bool = False, inject_noise: bool = False, **conv: Any) -> None:
        super().__init__()
        self.slot = ""
        self.conv1 = Conv(dim, out_dim, **conv)
        self.conv2 = Conv(out_dim, out_dim, **conv)
        self.conv_shortcut = nn.Conv3d(dim, out_dim, 1) if dim != out_dim else None
        self.norm3 = ChannelNorm(dim) if dim != out_dim else None
        self.scale_shift_table = nn.Parameter(torch.randn(4, dim) / dim**0.5) if timed else None
        self.per_channel_scale1 = nn.Parameter(torch.zeros(dim, 1, 1)) if inject_noise else None
        self.per_channel_scale2 = nn.Parameter(torch.zeros(dim, 1, 1)) if inject_noise else None

    def forward(self, x_BCTHW: Tensor, state: LTXState, embedding_BD: Tensor | None = None) -> Tensor:
        modulation: tuple[Tensor | None, ...] = (None,) * 4
        if self.scale_shift_table is not None and embedding_BD is not None:
            modulation = (embedding_BD.unflatten(1, (4, -1)) + self.scale_shift_table)[..., None, None, None].unbind(1)
        shift1, scale1, shift2, scale2 = modulation
        h_BCTHW = self.conv1(activated(x_BCTHW, shift1, scale1), state)
        h_BCTHW = self._with_noise(h_BCTHW, self.per_channel_scale1, f"{self.slot}.1", state)
        h_BCTHW = self.conv2(activated(h_BCTHW, shift2, scale2), state)
        h_BCTHW = self._with_noise(h_BCTHW, self.per_channel_scale2, f"{self.slot}.2", state)
        shortcut_BCTHW = state.aligned(self.slot, x_BCTHW, h_BCTHW.shape[2])
        if not h_BCTHW.shape[2]:
            return h_BCTHW
        if self.conv_shortcut is not None and self.norm3 is not None:
            shortcut_BCTHW = self.conv_shortcut(self.norm3(shortcut_BCTHW))
        return shortcut_BCTHW + h_BCTHW

    def _with_noise(self, x_BCTHW: Tensor, scale_C11: Tensor | None, slot: str, state: LTXState) -> Tensor:
        return x_BCTHW if scale_C11 is None else x_BCTHW + state.map(slot, x_BCTHW) * scale_C11[:, None]


class ResStack(nn.Module):
    """Residual blocks of one width, which share an embedding of the timestep."""

    def __init__(self, dim: int, layers: int, *, timed: bool = False, inject_noise: bool = False, **conv: Any) -> None:
        super().__init__()
        self.slot = ""
        self.time_embedder = TimestepEmbedder(4 * dim) if timed else None
        self.res_blocks = nn.ModuleList(ResBlock(dim, dim, timed=timed, inject_noise=inject_noise, **conv) for _ in range(layers))

    def forward(self, x_BCTHW: Tensor, state: LTXState, timestep_B: Tensor | None = None) -> Tensor:
        if not x_BCTHW.shape[2] and not state.closes(self.slot):
            return x_BCTHW
        embedding_BD = self.time_embedder(timestep_B) if self.time_embedder is not None else None
        for block in self.res_blocks:
            x_BCTHW = block(x_BCTHW, state, embedding_BD)
        return x_BCTHW


class FoldDown(nn.Module):
    """Space and time to channels, of a convolution and of the input itself, of which groups of channels are averaged.

    Where time is halved, the first frame is doubled.
    """

    def __init__(self, dim: int, out_dim: int, stride: Stride, **conv: Any) -> None:
        super().__init__()
        self.stride, self.out_dim, self.slot = stride, out_dim, ""
        self.conv = Conv(dim, out_dim // math.prod(stride), **conv)

    def forward(self, x_BCTHW: Tensor, state: LTXState) -> Tensor:
        if state.first(self.slot, x_BCTHW):
            x_BCTHW = torch.cat([*[x_BCTHW[:, :, :1]] * (self.stride[0] - 1), x_BCTHW], dim=2)
        return self._folded(self.conv(x_BCTHW, state)) + self._folded(x_BCTHW).unflatten(1, (self.out_dim, -1)).mean(2)

    def _folded(self, x_BCTHW: Tensor) -> Tensor:
        t, h, w = self.stride
        return rearrange(x_BCTHW, "b c (t ft) (h fh) (w fw) -> b (c ft fh fw) t h w", ft=t, fh=h, fw=w)


class UnfoldUp(nn.Module):
    """Channels to space and time, of a convolution and, with `residual`, of the input itself, whose channels are repeated.

    Where time is doubled, the very first frame is dropped.
    """

    def __init__(self, dim: int, factor: int, stride: Stride, *, residual: bool = False, **conv: Any) -> None:
        super().__init__()
        self.stride, self.residual, self.slot = stride, residual, ""
        self.repeats = math.prod(stride) // factor
        self.conv = Conv(dim, dim * math.prod(stride) // factor, **conv)

    def forward(self, x_BCTHW: Tensor, state: LTXState) -> Tensor:
        h_BCTHW = self.conv(x_BCTHW, state)
        frames, h_BCTHW = h_BCTHW.shape[2], self._unfolded(h_BCTHW)
        if self.residual:
            shortcut_BCTHW = self._unfolded(state.aligned(self.slot, x_BCTHW, frames))
            h_BCTHW = h_BCTHW + shortcut_BCTHW.repeat(1, self.repeats, 1, 1, 1)
        return h_BCTHW[:, :, self.stride[0] - 1 :] if state.first(f"{self.slot}.first", h_BCTHW) else h_BCTHW

    def _unfolded(self, x_BCTHW: Tensor) -> Tensor:
        t, h, w = self.stride
        return rearrange(x_BCTHW, "b (c ft fh fw) t h w -> b c (t ft) (h fh) (w fw)", ft=t, fh=h, fw=w)


def down_block(step: Step, **conv: Any) -> nn.Module:
    """A block of the encoder."""
    block, dim, out_dim = step
    if block.kind == "res_x":
        return ResStack(dim, block.num_layers, **conv)
    if block.kind == "res_x_y":
        return ResBlock(dim, out_dim, **conv)
    if block.kind.endswith("_res"):
        return FoldDown(dim, out_dim, block.stride, **conv)
    return Conv(dim, out_dim, stride=block.stride, **conv)


def up_block(step: Step, *, timed: bool, **conv: Any) -> nn.Module:
    """A block of the decoder."""
    block, dim, out_dim = step
    if block.kind == "res_x":
        return ResStack(dim, block.num_layers, timed=timed, inject_noise=block.inject_noise, **conv)
    if block.kind == "res_x_y":
        return ResBlock(dim, out_dim, **conv)
    return UnfoldUp(dim, block.factor, block.stride, residual=block.residual, **conv)

"""Down- and upsampling between levels, and the parameter-free shortcuts of Wan2.2 (as in DC-AE).

The first frame of a stream bypasses every temporal resampler and never enters the history of an upsampler.
Shapes: B batch, C channels, T frames, H height, W width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from .convolution import convolve
from .layers import CausalConv, ResBlock
from .stream import StreamState


class Downsample(nn.Module):
    """Halve height and width with a strided convolution, and time (`time`) with a second one."""

    def __init__(self, dim: int, time: bool) -> None:
        super().__init__()
        self.conv = nn.Conv2d(dim, dim, 3, stride=2)
        self.time_conv = nn.Conv3d(dim, dim, (3, 1, 1), stride=(2, 1, 1)) if time else None
        if self.time_conv is not None:  # starts as taking every second frame
            _dirac(self.time_conv, tap=1)

    def forward(self, x_BCTHW: Tensor, state: StreamState) -> Tensor:
        x_BCTHW = x_BCTHW if state.shard is None else state.shard.extend(x_BCTHW, 0, 1)
        padded_BCTHW = F.pad(x_BCTHW, (0, 1, 0, int(state.shard is None)))  # the kernel reaches over the right and bottom edge only
        x_BCTHW = convolve(padded_BCTHW, self.conv.weight.unsqueeze(2), self.conv.bias, stride=(1, 2, 2))
        if self.time_conv is None:
            return x_BCTHW
        joined_BCTHW = state.join(self, x_BCTHW, 1)
        if joined_BCTHW.shape[2] == 1:
            return joined_BCTHW
        down_BCTHW = convolve(joined_BCTHW, self.time_conv.weight, self.time_conv.bias, stride=(2, 1, 1))
        return down_BCTHW if state.started else torch.cat([x_BCTHW[:, :, :1], down_BCTHW], dim=2)


class Upsample(nn.Module):
    """Double time (`time`) with a convolution that makes two frames of one, then height and width."""

    def __init__(self, dim: int, out_dim: int, time: bool) -> None:
        super().__init__()
        self.time_conv = CausalConv(dim, 2 * dim, (3, 1, 1)) if time else None
        self.conv = nn.Conv2d(dim, out_dim, 3, padding=1)
        if self.time_conv is not None:  # starts as repeating every frame
            _dirac(self.time_conv, tap=2)

    def forward(self, x_BCTHW: Tensor, state: StreamState) -> Tensor:
        if self.time_conv is not None:
            x_BCTHW = self._double_time(self.time_conv, x_BCTHW, state)
        if state.shard is None:
            return state.convolution.doubled(self.conv, x_BCTHW)
        x_BCTHW = F.interpolate(x_BCTHW, scale_factor=(1.0, 2.0, 2.0), mode="nearest-exact")
        return state.convolution(self.conv, state.shard.extend(x_BCTHW, 1, 1), None, 0)

    def _double_time(self, time_conv: CausalConv, x_BCTHW: Tensor, state: StreamState) -> Tensor:
        bypass = 0 if state.started else 1
        first_BCTHW, rest_BCTHW = x_BCTHW[:, :, :bypass], x_BCTHW[:, :, bypass:]
        if rest_BCTHW.shape[2] == 0:
            state.forget(time_conv, first_BCTHW, time_conv.kernel_size[0] - 1)
            return first_BCTHW
        pairs_BCTHW = rearrange(time_conv(rest_BCTHW, state), "b (pair c) t h w -> b c (t pair) h w", pair=2)
        return pairs_BCTHW if state.started else torch.cat([first_BCTHW, pairs_BCTHW], dim=2)


def _dirac(conv: nn.Conv3d, tap: int) -> None:
    """Make `conv` copy its input (once for each multiple of the width) through one temporal tap, and mute the others."""
    with torch.no_grad():
        conv.weight.zero_()
        conv.weight[:, :, tap, 0, 0] = torch.eye(conv.in_channels).repeat(conv.out_channels // conv.in_channels, 1)
    if conv.bias is not None:
        nn.init.zeros_(conv.bias)


class AverageDown(nn.Module):
    """Shortcut of an encoder level: space and time to channels, then the mean over groups of neighbours, or each repeated."""

    def __init__(self, dim: int, out_dim: int, time: int, space: int) -> None:
        super().__init__()
        self.out_dim, self.time, self.space = out_dim, time, space
        self.repeats = _repeats(dim, out_dim, dim * time * space**2, out_dim)

    def forward(self, x_BCTHW: Tensor) -> Tensor:
        x_BCTHW = F.pad(x_BCTHW, (0, 0, 0, 0, -x_BCTHW.shape[2] % self.time, 0))
        folded_BCTHW = rearrange(x_BCTHW, "b c (t ft) (h fh) (w fw) -> b (c ft fh fw) t h w", ft=self.time, fh=self.space, fw=self.space)
        if self.repeats > 1:
            return folded_BCTHW.repeat_interleave(self.repeats, dim=1)
        return folded_BCTHW.unflatten(1, (self.out_dim, -1)).mean(2)


class RepeatUp(nn.Module):
    """Shortcut of a decoder level: every channel repeated, or the mean over groups of them, then channels to space and time."""

    def __init__(self, dim: int, out_dim: int, time: int, space: int) -> None:
        super().__init__()
        self.folded, self.time, self.space = out_dim * time * space**2, time, space
        self.repeats = _repeats(dim, out_dim, dim, self.folded)

    def forward(self, x_BCTHW: Tensor, state: StreamState) -> Tensor:
        if x_BCTHW.shape[1] > self.folded:
            x_BCTHW = x_BCTHW.unflatten(1, (self.folded, -1)).mean(2)
        repeated_BCTHW = x_BCTHW.repeat_interleave(self.repeats, dim=1)
        x_BCTHW = rearrange(repeated_BCTHW, "b (c ft fh fw) t h w -> b c (t ft) (h fh) (w fw)", ft=self.time, fh=self.space, fw=self.space)
        return x_BCTHW if state.started else x_BCTHW[:, :, self.time - 1 :]


def _repeats(dim: int, out_dim: int, have: int, want: int) -> int:
    """How often a shortcut repeats each of `have` channels to have `want`; 1 where it takes means. ValueError where neither divides."""
    if have % want and want % have:
        raise ValueError(f"no shortcut for a level of width {dim} -> {out_dim}: neither of {have} and {want} channels divides the other")
    return max(1, want // have)


class DownLevel(nn.Module):
    """Residual blocks and, but for the last level, a downsampler; `residual` adds the shortcut around them all."""

    def __init__(self, dim: int, out_dim: int, blocks: int, *, down: bool, time: bool, residual: bool) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(ResBlock(dim if i == 0 else out_dim, out_dim) for i in range(blocks))
        self.resample = Downsample(out_dim, time) if down else None
        self.shortcut = AverageDown(dim, out_dim, 1 + time, 1 + down) if residual else None

    def forward(self, x_BCTHW: Tensor, state: StreamState) -> Tensor:
        h_BCTHW = x_BCTHW
        for block in (*self.blocks, *([self.resample] if self.resample is not None else [])):
            h_BCTHW = state.run(block, h_BCTHW)
        return h_BCTHW if self.shortcut is None else h_BCTHW + self.shortcut(x_BCTHW)


class UpLevel(nn.Module):
    """Residual blocks and, but for the last level, an upsampler, with a shortcut around them in `residual` style.

    Without shortcuts (Wan2.1) the upsampler halves the width.
    """

    def __init__(self, dim: int, out_dim: int, blocks: int, *, up: bool, time: bool, residual: bool, timed: bool = False) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(ResBlock(dim if i == 0 else out_dim, out_dim, timed) for i in range(blocks))
        self.resample = Upsample(out_dim, out_dim if residual else out_dim // 2, time) if up else None
        self.shortcut = RepeatUp(dim, out_dim, 1 + time, 2) if residual and up else None

    def forward(self, x_BCTHW: Tensor, state: StreamState) -> Tensor:
        h_BCTHW = x_BCTHW
        for block in (*self.blocks, *([self.resample] if self.resample is not None else [])):
            h_BCTHW = state.run(block, h_BCTHW)
        return h_BCTHW if self.shortcut is None else h_BCTHW + self.shortcut(x_BCTHW, state)

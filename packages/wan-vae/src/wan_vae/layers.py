"""Causal convolution, norm, residual and attention blocks (Wan report, section 4.1).

Shapes: B batch, C channels, T frames, H height, W width.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from .stream import StreamState
from .timestep import ScaleShift

PIECE = 100_000  # numbers that a norm works on at a time


class CausalConv(nn.Conv3d):
    """3D convolution that sees the present and the past: zeros before the first frame, never a later frame.

    ahead: frames that it sees ahead instead, within what it is given at a time; after the last of them zeros
    """

    def __init__(self, dim: int, out_dim: int, kernel: tuple[int, int, int]) -> None:
        super().__init__(dim, out_dim, kernel)
        self.slot = ""
        self.ahead = 0

    @property
    def behind(self) -> int:
        """Frames that it looks back."""
        return self.kernel_size[0] - 1 - self.ahead

    def forward(self, x_BCTHW: Tensor, state: StreamState) -> Tensor:  # type: ignore[override]
        rows = self.kernel_size[1] // 2
        if rows and state.shard is not None:
            x_BCTHW, rows = state.shard.extend(x_BCTHW, rows, rows), 0
        past_BCTHW = state.recall(self, x_BCTHW, self.behind)
        if self.ahead:
            past_BCTHW = torch.zeros_like(x_BCTHW[:, :, : self.behind]) if past_BCTHW is None else past_BCTHW
            x_BCTHW = F.pad(x_BCTHW, (0, 0, 0, 0, 0, self.ahead))
        return state.convolution(self, x_BCTHW, past_BCTHW, rows)


class RMSNorm(nn.Module):
    """x / |x| * sqrt(C) * gamma over channels; |x| is taken in fp32."""

    def __init__(self, dim: int, spatial_axes: int = 3) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(dim, *[1] * spatial_axes))

    def forward(self, x_BCTHW: Tensor) -> Tensor:
        dim = self.gamma.shape[0]
        wide_BCTHW = x_BCTHW.to(torch.promote_types(x_BCTHW.dtype, torch.float32))
        scale_B1THW = math.sqrt(dim) * wide_BCTHW.square().sum(dim=1, keepdim=True).clamp_min(1e-24).rsqrt()
        gamma_C111 = self.gamma.view(dim, 1, 1, 1)
        scaled_BCTHW = (wide_BCTHW * scale_B1THW).to(x_BCTHW.dtype)
        return scaled_BCTHW * gamma_C111 if torch.is_grad_enabled() else scaled_BCTHW.mul_(gamma_C111)


def normed(norm: RMSNorm, x_BCTHW: Tensor, *, spent: bool = False, modulation: tuple[Tensor, Tensor] | None = None) -> Tensor:
    """Norm and SiLU, with the modulation (a scale, less 1, and a shift) in between where there is one.

    Without it, without gradients, on a CPU and with the channels last, this goes a piece at a time that stays in the cache.
    spent: nobody reads `x` again, so it may be overwritten
    """
    if modulation is not None:
        scale_BC111, shift_BC111 = modulation
        return F.silu(torch.addcmul(shift_BC111, norm(x_BCTHW), 1 + scale_BC111))
    x_BTHWC = x_BCTHW.permute(0, 2, 3, 4, 1)
    if torch.is_grad_enabled() or torch.compiler.is_compiling() or not x_BCTHW.is_cpu or not x_BTHWC.is_contiguous():
        return F.silu(norm(x_BCTHW))
    made_BTHWC = x_BTHWC if spent else torch.empty_like(x_BTHWC)
    rows = max(1, PIECE // x_BTHWC.shape[-1])
    for x_NC, made_NC in zip(x_BTHWC.flatten(0, 3).split(rows), made_BTHWC.flatten(0, 3).split(rows), strict=True):
        wide_NC = x_NC.to(torch.promote_types(x_NC.dtype, torch.float32))
        scale_N1 = math.sqrt(x_NC.shape[1]) * wide_NC.square().sum(dim=1, keepdim=True).clamp_min(1e-24).rsqrt()
        scaled_NC = torch.mul(wide_NC, scale_N1, out=made_NC) if wide_NC is x_NC else made_NC.copy_(wide_NC * scale_N1)
        F.silu(scaled_NC.mul_(norm.gamma.flatten()), inplace=True)
    return made_BTHWC.permute(0, 4, 1, 2, 3)


class ResBlock(nn.Module):
    """Norm, SiLU, convolution, twice, around a shortcut that changes the width where needed.

    timed: both norms are modulated by the timestep of the stream
    """

    def __init__(self, dim: int, out_dim: int, timed: bool = False) -> None:
        super().__init__()
        self.norm1 = RMSNorm(dim)
        self.conv1 = CausalConv(dim, out_dim, (3, 3, 3))
        self.norm2 = RMSNorm(out_dim)
        self.conv2 = CausalConv(out_dim, out_dim, (3, 3, 3))
        self.shortcut = CausalConv(dim, out_dim, (1, 1, 1)) if dim != out_dim else None
        self.scale_shift1 = ScaleShift(dim) if timed else None
        self.scale_shift2 = ScaleShift(out_dim) if timed else None

    def forward(self, x_BCTHW: Tensor, state: StreamState) -> Tensor:
        h_BCTHW = self.conv1(normed(self.norm1, x_BCTHW, modulation=_modulation(self.scale_shift1, state)), state)
        h_BCTHW = self.conv2(normed(self.norm2, h_BCTHW, spent=True, modulation=_modulation(self.scale_shift2, state)), state)
        shortcut_BCTHW = self.shortcut(x_BCTHW, state) if self.shortcut is not None else x_BCTHW
        return h_BCTHW + shortcut_BCTHW if torch.is_grad_enabled() else h_BCTHW.add_(shortcut_BCTHW)


def _modulation(table: ScaleShift | None, state: StreamState) -> tuple[Tensor, Tensor] | None:
    return None if table is None or state.embedding is None else table(state.embedding)


class FrameAttention(nn.Module):
    """Self-attention among the positions of each frame, one head of full width; starts as identity."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm = RMSNorm(dim, spatial_axes=2)
        self.to_qkv = nn.Conv2d(dim, 3 * dim, 1)
        self.proj = nn.Conv2d(dim, dim, 1)
        nn.init.zeros_(self.proj.weight)

    def forward(self, x_BCTHW: Tensor, state: StreamState) -> Tensor:
        if state.shard is not None:
            return state.shard.own(self.attend(state.shard.gather(x_BCTHW)))
        return self.attend(x_BCTHW)

    def attend(self, x_BCTHW: Tensor) -> Tensor:
        """Attention within whole frames."""
        frames, height = x_BCTHW.shape[2:4]
        qkv = self.to_qkv(self.norm(x_BCTHW).flatten(2, 3))
        # contiguous: with strided channels torch falls back on writing out all scores, (h w)^2 of them
        q, k, v = rearrange(qkv, "b (three c) (t h) w -> three (b t) 1 (h w) c", three=3, t=frames).contiguous()
        out = rearrange(F.scaled_dot_product_attention(q, k, v), "(b t) 1 (h w) c -> b c (t h) w", t=frames, h=height)
        return x_BCTHW + self.proj(out).unflatten(2, (frames, height))


class Middle(nn.Module):
    """The deepest part of either half: residual block, attention, residual block."""

    def __init__(self, dim: int, timed: bool = False) -> None:
        super().__init__()
        self.block1 = ResBlock(dim, dim, timed)
        self.attention = FrameAttention(dim)
        self.block2 = ResBlock(dim, dim, timed)

    def forward(self, x_BCTHW: Tensor, state: StreamState) -> Tensor:
        x_BCTHW = state.run(self.block1, x_BCTHW)
        x_BCTHW = state.run(self.attention, x_BCTHW)
        return state.run(self.block2, x_BCTHW)


class Head(nn.Module):
    """Norm, SiLU and the last convolution of either half."""

    def __init__(self, dim: int, out_dim: int, timed: bool = False) -> None:
        super().__init__()
        self.norm = RMSNorm(dim)
        self.conv = CausalConv(dim, out_dim, (3, 3, 3))
        self.scale_shift = ScaleShift(dim) if timed else None

    def forward(self, x_BCTHW: Tensor, state: StreamState) -> Tensor:
        return self.conv(normed(self.norm, x_BCTHW, modulation=_modulation(self.scale_shift, state)), state)

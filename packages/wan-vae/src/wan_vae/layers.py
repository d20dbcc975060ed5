"""Causal convolution, norm, residual and attention blocks, and the state of a stream (Wan report, section 4.1).

Shapes: B batch, C channels, T frames, H height, W width.
"""

from __future__ import annotations

import math
from collections.abc import Hashable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn


@dataclass
class StreamState:
    """What one stream carries from chunk to chunk: each layer's last input frames.

    started: whether a chunk has passed; the first frame bypasses all temporal resampling
    carry: False for a clip given whole, after which nothing follows
    """

    carry: bool = True
    started: bool = False
    history: dict[Hashable, Tensor] = field(default_factory=dict)

    def join(self, layer: nn.Module, x_BCTHW: Tensor, frames: int) -> Tensor:
        """Put what `layer` remembers in front of its input (nothing at the start) and remember the last `frames` frames."""
        if (past := self.history.get(layer)) is not None:
            x_BCTHW = torch.cat([past, x_BCTHW], dim=2)
        if self.carry and frames:
            self.history[layer] = x_BCTHW[:, :, -frames:].clone()  # a view would keep the whole chunk alive
        return x_BCTHW


def convolve(
    x_BCTHW: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: tuple[int, int, int] = (1, 1, 1),
    padding: tuple[int, int, int] = (0, 0, 0),
) -> Tensor:
    """F.conv3d, by the way that is fastest on a CPU.

    For a batch of one with few channels torch leaves oneDNN for an im2col that takes up to four times as long, so oneDNN
    is called by its name; kernels without spatial extent run as 2D over (T, H*W).
    """
    if weight.shape[-1] == 1:
        height, width = x_BCTHW.shape[-2:]
        return F.conv2d(x_BCTHW.flatten(-2), weight.squeeze(-1), bias, stride[:2], padding[:2]).unflatten(-1, (height, width))
    if x_BCTHW.is_cpu and x_BCTHW.dtype == torch.float32 and torch.backends.mkldnn.is_available() and not torch.is_autocast_enabled("cpu"):
        return torch.mkldnn_convolution(x_BCTHW, weight, bias, padding, stride, (1, 1, 1), 1)
    return F.conv3d(x_BCTHW, weight, bias, stride, padding)


class CausalConv(nn.Conv3d):
    """3D convolution that sees the present and the past: zeros before the first frame, never a later frame."""

    def __init__(self, dim: int, out_dim: int, kernel: tuple[int, int, int]) -> None:
        super().__init__(dim, out_dim, kernel)

    def forward(self, x_BCTHW: Tensor, state: StreamState) -> Tensor:  # type: ignore[override]
        reach, rows, columns = (size - 1 for size in self.kernel_size)
        margin = (0, rows // 2, columns // 2)
        joined_BCTHW = state.join(self, x_BCTHW, reach)
        if x_BCTHW.shape[2] == 1:  # the taps that would meet padding are left out
            return convolve(joined_BCTHW, self.weight[:, :, -joined_BCTHW.shape[2] :], self.bias, padding=margin)
        if missing := reach + x_BCTHW.shape[2] - joined_BCTHW.shape[2]:
            joined_BCTHW = F.pad(joined_BCTHW, (0, 0, 0, 0, missing, 0))
        return convolve(joined_BCTHW, self.weight, self.bias, padding=margin)


class RMSNorm(nn.Module):
    """x / |x| * sqrt(C) * gamma over channels; |x| is taken in fp32."""

    def __init__(self, dim: int, spatial_axes: int = 3) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(dim, *[1] * spatial_axes))

    def forward(self, x_BCTHW: Tensor) -> Tensor:
        dim = self.gamma.shape[0]
        square_B1THW = x_BCTHW.to(torch.promote_types(x_BCTHW.dtype, torch.float32)).square().sum(dim=1, keepdim=True)
        scale_B1THW = math.sqrt(dim) * square_B1THW.clamp_min(1e-24).rsqrt()
        return x_BCTHW * scale_B1THW.to(x_BCTHW.dtype) * self.gamma.view(dim, 1, 1, 1)


class ResBlock(nn.Module):
    """Norm, SiLU, convolution, twice, around a shortcut that changes the width where needed."""

    def __init__(self, dim: int, out_dim: int) -> None:
        super().__init__()
        self.norm1 = RMSNorm(dim)
        self.conv1 = CausalConv(dim, out_dim, (3, 3, 3))
        self.norm2 = RMSNorm(out_dim)
        self.conv2 = CausalConv(out_dim, out_dim, (3, 3, 3))
        self.shortcut = CausalConv(dim, out_dim, (1, 1, 1)) if dim != out_dim else None

    def forward(self, x_BCTHW: Tensor, state: StreamState) -> Tensor:
        h_BCTHW = self.conv1(F.silu(self.norm1(x_BCTHW)), state)
        h_BCTHW = self.conv2(F.silu(self.norm2(h_BCTHW)), state)
        return h_BCTHW + (self.shortcut(x_BCTHW, state) if self.shortcut is not None else x_BCTHW)


class FrameAttention(nn.Module):
    """Self-attention among the positions of each frame, one head of full width; starts as identity."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm = RMSNorm(dim, spatial_axes=2)
        self.to_qkv = nn.Conv2d(dim, 3 * dim, 1)
        self.proj = nn.Conv2d(dim, dim, 1)
        nn.init.zeros_(self.proj.weight)

    def forward(self, x_BCTHW: Tensor) -> Tensor:
        frames, height = x_BCTHW.shape[2:4]
        qkv = self.to_qkv(self.norm(x_BCTHW).flatten(2, 3))
        q, k, v = rearrange(qkv, "b (three c) (t h) w -> three (b t) 1 (h w) c", three=3, t=frames)
        out = rearrange(F.scaled_dot_product_attention(q, k, v), "(b t) 1 (h w) c -> b c (t h) w", t=frames, h=height)
        return x_BCTHW + self.proj(out).unflatten(2, (frames, height))


class Middle(nn.Module):
    """The deepest part of either half: residual block, attention, residual block."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.block1 = ResBlock(dim, dim)
        self.attention = FrameAttention(dim)
        self.block2 = ResBlock(dim, dim)

    def forward(self, x_BCTHW: Tensor, state: StreamState) -> Tensor:
        return self.block2(self.attention(self.block1(x_BCTHW, state)), state)


class Head(nn.Module):
    """Norm, SiLU and the last convolution of either half."""

    def __init__(self, dim: int, out_dim: int) -> None:
        super().__init__()
        self.norm = RMSNorm(dim)
        self.conv = CausalConv(dim, out_dim, (3, 3, 3))

    def forward(self, x_BCTHW: Tensor, state: StreamState) -> Tensor:
        return self.conv(F.silu(self.norm(x_BCTHW)), state)

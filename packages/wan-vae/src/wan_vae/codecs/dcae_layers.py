"""The two halves of a DC-AE and what they are built of, nested and numbered as in the released files (mit-han-lab/efficientvit).

Every change of resolution has a shortcut without weights: space folded into channels and averaged over groups of them on the
way down, channels repeated and unfolded into space on the way up, so that the convolutions learn what is left.
Shapes: N pictures, C channels, H height, W width; K heads, D channels of a head, L = H * W.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .dcae_config import Activation, DCAEConfig, Norm, Stage

EPS = 1e-15  # of the sum of an attention's weights
EXPANSION = 4  # of the width within a mixing block
ACTIVATIONS: dict[Activation, Callable[[Tensor], Tensor]] = {"relu": F.relu, "silu": F.silu}


class RMSNorm(nn.Module):
    """Root mean square 1 over the channels of a place, in fp32, then a scale and a bias."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(dim)), nn.Parameter(torch.zeros(dim))

    def forward(self, x_NCHW: Tensor) -> Tensor:
        wide = x_NCHW.float()
        normed = wide * torch.rsqrt(wide.square().mean(1, keepdim=True) + 1e-5)
        return (normed * self.weight.float()[:, None, None] + self.bias.float()[:, None, None]).to(x_NCHW.dtype)


class BatchNorm(nn.BatchNorm2d):
    """Batch statistics where it learns; the running ones in eval mode, without gradients, and where its weights are frozen."""

    def forward(self, x_NCHW: Tensor) -> Tensor:
        if self.training and self.weight.requires_grad and torch.is_grad_enabled():
            return super().forward(x_NCHW)
        return F.batch_norm(x_NCHW, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps)


NORMS: dict[Norm, Callable[[int], nn.Module]] = {"rms_norm": RMSNorm, "batch_norm": BatchNorm}


class Unit(nn.Module):
    """A convolution, and the norm behind it where there is one."""

    def __init__(self, before: int, after: int, kernel: int = 3, *, stride: int = 1, groups: int = 1, bias: bool = True) -> None:
        super().__init__()
        self.conv = nn.Conv2d(before, after, kernel, stride, kernel // 2, groups=groups, bias=bias)
        self.norm: nn.Module | None = None

    def with_norm(self, norm: Norm) -> Unit:
        self.norm = NORMS[norm](self.conv.out_channels)
        return self

    def forward(self, x_NCHW: Tensor) -> Tensor:
        x_NCHW = self.conv(x_NCHW)
        return x_NCHW if self.norm is None else self.norm(x_NCHW)


class Residual(nn.Module):
    """`main` and a shortcut around it, by default what comes in."""

    def __init__(self, main: nn.Module, shortcut: Callable[[Tensor], Tensor] | None = None) -> None:
        super().__init__()
        self.main, self.shortcut = main, shortcut

    def forward(self, x_NCHW: Tensor) -> Tensor:
        out: Tensor = self.main(x_NCHW) + (x_NCHW if self.shortcut is None else self.shortcut(x_NCHW))
        return out


class Steps(nn.Module):
    """One after another; no step does nothing."""

    def __init__(self, *steps: nn.Module) -> None:
        super().__init__()
        self.op_list = nn.ModuleList(steps)

    def forward(self, x_NCHW: Tensor) -> Tensor:
        for step in self.op_list:
            x_NCHW = step(x_NCHW)
        return x_NCHW


class Apply(nn.Module):
    """A function in the place of a layer."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x_NCHW: Tensor) -> Tensor:
        return self.function(x_NCHW)


class Fold(nn.Module):
    """A convolution to a quarter of the channels, then 2x2 places to one."""

    def __init__(self, before: int, after: int) -> None:
        super().__init__()
        self.conv = Unit(before, after // 4)

    def forward(self, x_NCHW: Tensor) -> Tensor:
        return F.pixel_unshuffle(self.conv(x_NCHW), 2)


class Unfold(nn.Module):
    """A convolution to four times the channels, then one place to 2x2."""

    def __init__(self, before: int, after: int) -> None:
        super().__init__()
        self.conv = Unit(before, 4 * after)

    def forward(self, x_NCHW: Tensor) -> Tensor:
        return F.pixel_shuffle(self.conv(x_NCHW), 2)


class Enlarge(nn.Module):
    """Every place doubled in height and width, then a convolution."""

    def __init__(self, before: int, after: int) -> None:
        super().__init__()
        self.conv = Unit(before, after)

    def forward(self, x_NCHW: Tensor) -> Tensor:
        out: Tensor = self.conv(F.interpolate(x_NCHW, scale_factor=2.0, mode="nearest"))
        return out


class TwoConvolutions(nn.Module):
    """The residual part of a residual block."""

    def __init__(self, dim: int, norm: Norm, activation: Activation) -> None:
        super().__init__()
        self.conv1, self.conv2 = Unit(dim, dim), Unit(dim, dim, bias=False).with_norm(norm)
        self.activation = ACTIVATIONS[activation]

    def forward(self, x_NCHW: Tensor) -> Tensor:
        out: Tensor = self.conv2(self.activation(self.conv1(x_NCHW)))
        return out


class LinearAttention(nn.Module):
    """Attention whose weights are products of ReLUs, so that its work grows with the number of places and not with its square.

    Each scale adds heads whose queries, keys and values come through a convolution of that size. Computed in fp32.
    """

    def __init__(self, dim: int, head_dim: int, scales: tuple[int, ...]) -> None:
        super().__init__()
        self.head_dim = head_dim
        self.qkv = Unit(dim, 3 * dim, 1, bias=False)
        heads = 3 * dim // head_dim
        self.aggreg = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(3 * dim, 3 * dim, scale, padding=scale // 2, groups=3 * dim, bias=False),
                nn.Conv2d(3 * dim, 3 * dim, 1, groups=heads, bias=False),
            )
            for scale in scales
        )
        self.proj = Unit(dim * (1 + len(scales)), dim, 1, bias=False).with_norm("rms_norm")

    def forward(self, x_NCHW: Tensor) -> Tensor:
        qkv = self.qkv(x_NCHW)
        qkv = torch.cat([qkv, *(branch(qkv) for branch in self.aggreg)], dim=1)
        q_NKDL, k_NKDL, v_NKDL = qkv.float().flatten(2).unflatten(1, (-1, 3 * self.head_dim)).chunk(3, dim=2)
        attend = _linear if q_NKDL.shape[-1] > self.head_dim else _quadratic
        with _without_autocast(x_NCHW.device.type):
            out_NKDL = attend(F.relu(q_NKDL), F.relu(k_NKDL), v_NKDL)
        out: Tensor = self.proj(out_NKDL.flatten(1, 2).unflatten(2, x_NCHW.shape[2:]).to(x_NCHW.dtype))
        return out


def _without_autocast(device: str) -> AbstractContextManager[Any]:
    return torch.autocast(device, enabled=False) if torch.amp.is_autocast_available(device) else nullcontext()


def _linear(q_NKDL: Tensor, k_NKDL: Tensor, v_NKDL: Tensor) -> Tensor:
    """Values summed over all keys first; a further row of ones sums the weights."""
    summed = F.pad(v_NKDL, (0, 0, 0, 1), value=1.0) @ k_NKDL.mT @ q_NKDL
    return summed[:, :, :-1] / (summed[:, :, -1:] + EPS)


def _quadratic(q_NKDL: Tensor, k_NKDL: Tensor, v_NKDL: Tensor) -> Tensor:
    """The same by a weight for every pair of places, which is less where there are few."""
    weights = k_NKDL.mT @ q_NKDL
    return v_NKDL @ (weights / (weights.sum(2, keepdim=True) + EPS))


class GatedMixing(nn.Module):
    """An inverted bottleneck with a 3x3 convolution per channel, half of which gates the other."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        wide = 2 * EXPANSION * dim
        self.inverted_conv = Unit(dim, wide, 1)
        self.depth_conv = Unit(wide, wide, groups=wide)
        self.point_conv = Unit(wide // 2, dim, 1, bias=False).with_norm("rms_norm")

    def forward(self, x_NCHW: Tensor) -> Tensor:
        x_NCHW, gate_NCHW = self.depth_conv(F.silu(self.inverted_conv(x_NCHW))).chunk(2, dim=1)
        out: Tensor = self.point_conv(x_NCHW * F.silu(gate_NCHW))
        return out


class AttentionBlock(nn.Module):
    """Attention over all places, then mixing of neighbours."""

    def __init__(self, dim: int, head_dim: int, scales: tuple[int, ...]) -> None:
        super().__init__()
        self.context_module = Residual(LinearAttention(dim, head_dim, scales))
        self.local_module = Residual(GatedMixing(dim))

    def forward(self, x_NCHW: Tensor) -> Tensor:
        out: Tensor = self.local_module(self.context_module(x_NCHW))
        return out


class Encoder(nn.Module):
    """Pictures `[N, 3, H, W]` to latents `[N, z, H / side, W / side]` that are not normalised."""

    def __init__(self, config: DCAEConfig) -> None:
        super().__init__()
        stages = config.stages("encoder")
        strided = partial(Unit, stride=2)
        down: Callable[[int, int], nn.Module] = Fold if config.downsample == "pixel_unshuffle" else strided
        self.project_in = Unit(3, stages[0].dim) if stages[0].depth else down(3, stages[1].dim)
        levels = [_blocks(stage, config.head_dim) for stage in stages]
        for steps, finer, coarser in zip(levels, stages, stages[1:], strict=False):
            if finer.depth:
                steps.append(Residual(down(finer.dim, coarser.dim), partial(averaged, dim=coarser.dim, factor=2)))
        self.stages = nn.ModuleList(Steps(*steps) for steps in levels)
        head = Steps(Unit(stages[-1].dim, config.z_dim))
        self.project_out = Residual(head, partial(averaged, dim=config.z_dim, factor=1)) if config.encoder_shortcut else head

    def forward(self, x_NCHW: Tensor) -> Tensor:
        x_NCHW = self.project_in(x_NCHW)
        for stage in self.stages:
            x_NCHW = stage(x_NCHW)
        out: Tensor = self.project_out(x_NCHW)
        return out


class Decoder(nn.Module):
    """Latents `[N, z, h, w]` that are not normalised to pictures `[N, 3, h * side, w * side]`; its last stage runs first."""

    def __init__(self, config: DCAEConfig) -> None:
        super().__init__()
        stages = config.stages("decoder")
        up: Callable[[int, int], nn.Module] = Unfold if config.upsample == "pixel_shuffle" else Enlarge
        first = Unit(config.z_dim, stages[-1].dim)
        repeat = partial(repeated, dim=stages[-1].dim, factor=1)
        self.project_in = Residual(first, repeat) if config.decoder_shortcut else first
        levels = [_blocks(stage, config.head_dim) for stage in stages]
        for steps, finer, coarser in zip(levels, stages, stages[1:], strict=False):
            if finer.depth:
                steps.insert(0, Residual(up(coarser.dim, finer.dim), partial(repeated, dim=finer.dim, factor=2)))
        self.stages = nn.ModuleList(Steps(*steps) for steps in levels)
        dim = stages[0].dim if stages[0].depth else stages[1].dim
        last = Unit(dim, 3) if stages[0].depth else up(dim, 3)
        self.project_out = Steps(RMSNorm(dim), Apply(ACTIVATIONS[config.out_activation]), last)

    def forward(self, x_NCHW: Tensor) -> Tensor:
        x_NCHW = self.project_in(x_NCHW)
        for stage in reversed(self.stages):
            x_NCHW = stage(x_NCHW)
        out: Tensor = self.project_out(x_NCHW)
        return out


def averaged(x_NCHW: Tensor, *, dim: int, factor: int) -> Tensor:
    """`factor` x `factor` places to one, and means over neighbouring channels so that `dim` are left."""
    return F.pixel_unshuffle(x_NCHW, factor).unflatten(1, (dim, -1)).mean(2)


def repeated(x_NCHW: Tensor, *, dim: int, factor: int) -> Tensor:
    """One place to `factor` x `factor`, with channels repeated so that `dim` are left."""
    return F.pixel_shuffle(x_NCHW.repeat_interleave(dim * factor**2 // x_NCHW.shape[1], dim=1), factor)


def _blocks(stage: Stage, head_dim: int) -> list[nn.Module]:
    if stage.block == "attention":
        return [AttentionBlock(stage.dim, head_dim, stage.scales) for _ in range(stage.depth)]
    return [Residual(TwoConvolutions(stage.dim, stage.norm, stage.activation)) for _ in range(stage.depth)]

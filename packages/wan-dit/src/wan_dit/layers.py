"""The small layers of the transformer, and the rule of its fp32 islands.

The time MLP, the modulation, the residual stream and the head are computed in fp32 whatever type the weights have and
whether or not autocast is on (official code, `amp.autocast(dtype=torch.float32)`); all else runs in the type of the weights.

Other precisions are two types (`Precision`): of the residual stream, and of the modulation, in which norms, gates and the head
are computed. What stays fp32 in all of them are the time MLP and the rotation of queries and keys.

Shape suffixes: B batch, L tokens, D width, R timesteps.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn


def autocast_off(device: torch.device) -> torch.autocast:
    """A context in which autocast changes nothing; any device, meta too."""
    return torch.autocast(device.type if torch.amp.is_autocast_available(device.type) else "cpu", enabled=False)


def computes_in_fp32(weight: Tensor) -> bool:
    """Whether a linear layer with this weight runs in fp32 here: fp32 weights, no autocast."""
    device = weight.device.type
    return weight.dtype == torch.float32 and not (torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device))


class Fp32Linear(nn.Linear):
    """A linear layer of an fp32 island: weights may be stored in bf16, the arithmetic is fp32."""

    def forward(self, x: Tensor) -> Tensor:
        with autocast_off(x.device):
            return F.linear(x.float(), self.weight.float(), self.bias.float())


class RMSNorm(nn.RMSNorm):
    """RMS norm over the full width, in the type of its input; the sum is fp32."""

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.eps)


class Fp32LayerNorm(nn.LayerNorm):
    """Layer norm with weight and bias, in fp32."""

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x.float(), self.normalized_shape, self.weight.float(), self.bias.float(), self.eps)


class PatchEmbedding(nn.Conv3d):
    """A convolution whose kernel is its stride, computed as one matrix product; the parameters keep their 5-D shape."""

    def __init__(self, in_dim: int, dim: int, patch_size: tuple[int, int, int]) -> None:
        super().__init__(in_dim, dim, kernel_size=patch_size, stride=patch_size)

    def forward(self, latents: Tensor) -> Tensor:
        """Latents `[B, C, T', H', W']` to tokens `[B, L, D]`, width fastest."""
        p, q, r = self.kernel_size
        patches = rearrange(latents.to(self.weight.dtype), "b c (f p) (h q) (w r) -> b (f h w) (c p q r)", p=p, q=q, r=r)
        return F.linear(patches, self.weight.flatten(1), self.bias)


Precision = Literal["strict", "official", "diffusers", "fast"]


def precision_types(precision: Precision, weights: torch.dtype) -> tuple[torch.dtype, torch.dtype]:
    """Types of the residual stream and of the modulation: `official` keeps both fp32, `diffusers` the latter, `fast` none.

    `strict` is `official` with the rotation of queries and keys in fp64, as the official code has it.
    """
    return {
        "strict": (torch.float32, torch.float32),
        "official": (torch.float32, torch.float32),
        "diffusers": (weights, torch.float32),
        "fast": (weights, weights),
    }[precision]


def modulated_norm(x_BLD: Tensor, shift_RD: Tensor, scale_RD: Tensor, rows_BL: Tensor, eps: float) -> Tensor:
    """LN(x) * (1 + scale) + shift, with the timestep of each token (or of each sample, where `rows` is `[B, 1]`)."""
    x_BLD, width = x_BLD.to(shift_RD.dtype), x_BLD.shape[-1:]
    if len(shift_RD) == 1:  # one time for all tokens: scale and shift are the norm's own weight and bias
        return F.layer_norm(x_BLD, width, 1 + scale_RD[0], shift_RD[0], eps)
    normed_BLD = F.layer_norm(x_BLD, width, eps=eps)
    return torch.addcmul(F.embedding(rows_BL, shift_RD), normed_BLD, F.embedding(rows_BL, 1 + scale_RD))


def gated_add(x_BLD: Tensor, y_BLD: Tensor, gate_RD: Tensor, rows_BL: Tensor) -> Tensor:
    """x + y * gate, computed in the type of the gate, in the type of x."""
    gate = gate_RD if len(gate_RD) == 1 else F.embedding(rows_BL, gate_RD)
    return torch.addcmul(x_BLD.to(gate.dtype), y_BLD.to(gate.dtype), gate).to(x_BLD.dtype)


def time_sinusoid(timestep: Tensor, width: int) -> Tensor:
    """`[R]` times in 0..1000 to fp32 `[R, width]`: cosines, then sines, of float64 angles.

    fp32 angles would move the model's output by 4e-5, a bf16 timestep by whole steps (998.39 becomes 1000).
    """
    half = width // 2
    exact = timestep.cpu().double() if timestep.device.type == "mps" else timestep.double()  # MPS has no float64
    frequencies = 10000.0 ** -(torch.arange(half, dtype=torch.float64, device=exact.device) / half)
    angles = torch.outer(exact, frequencies)
    return torch.cat([angles.cos(), angles.sin()], dim=-1).float().to(timestep.device)

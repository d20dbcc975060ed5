"""The ways to compute a convolution: directly, by Winograd's algorithm, or as a sum of 2D convolutions.

Shapes: B batch, C channels, T frames, H height, W width.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ._shared.memory import free_memory
from .transformed_filters import BUDGET
from .winograd import Winograd

Backend = Literal["auto", "direct", "winograd", "conv2d"]
BACKENDS: tuple[str, ...] = get_args(Backend)
ONEDNN = torch.backends.mkldnn.is_available()
GROWTH = 16 / 3  # transformed filters, 4 x 36 numbers, over the 27 they are made of
THIN = 4  # output channels up to which all taps are computed by one matrix product
ROOM = 3  # times the memory of the transformed filters that must be free for "auto" to make them


@dataclass
class Convolution:
    """Computes the convolutions of a VAE by one backend.

    direct: the library's own
    winograd: given where it is the backend; for fp32 on a CPU without gradients, whatever else comes is computed directly
    conv2d: a 3x3x3 convolution as the sum of three 3x3 ones, for devices whose 3D convolutions are slow (MPS, ROCm)
    """

    backend: str = "direct"
    winograd: Winograd | None = None

    def __call__(self, layer: nn.Conv2d | nn.Conv3d, x_BCTHW: Tensor, past_BCTHW: Tensor | None, rows: int) -> Tensor:
        """Stride 1, zeros around width, `rows` rows of zeros above and below.

        past: as many frames as the kernel looks back; None for zeros
        """
        if (winograd := self._suited(layer, x_BCTHW)) and (made := _by_winograd(winograd, layer, x_BCTHW, past_BCTHW, rows)) is not None:
            return made
        weight = layer.weight if layer.weight.ndim == 5 else layer.weight.unsqueeze(2)
        padding, reach = (0, rows, weight.shape[-1] // 2), weight.shape[2] - 1
        joined = x_BCTHW if past_BCTHW is None else torch.cat([past_BCTHW, x_BCTHW], dim=2)
        if past_BCTHW is None and x_BCTHW.shape[2] == 1:  # the taps that would meet padding are left out
            weight = weight[:, :, -1:]
        elif past_BCTHW is None and reach:
            joined = F.pad(joined, (0, 0, 0, 0, reach, 0))
        if self.backend == "conv2d" and weight.shape[2] > 1 and weight.shape[-1] > 1:
            return _sum_of_2d(joined, weight, layer.bias, padding[1:])
        return convolve(joined, weight, layer.bias, padding=padding)

    def doubled(self, layer: nn.Conv2d, x_BCTHW: Tensor) -> Tensor:
        """The same of frames that are doubled in height and width first, by the nearest neighbour."""
        if (winograd := self._suited(layer, x_BCTHW)) and (
            made := _by_winograd(winograd, layer, x_BCTHW, None, 1, doubled=True)
        ) is not None:
            return made
        return self(layer, F.interpolate(x_BCTHW, scale_factor=(1.0, 2.0, 2.0), mode="nearest-exact"), None, 1)

    def _suited(self, layer: nn.Conv2d | nn.Conv3d, x_BCTHW: Tensor) -> Winograd | None:
        suited = self.winograd is not None and self.winograd.takes(layer) and not torch.is_grad_enabled() and _plain(x_BCTHW)
        return self.winograd if suited else None


def resolve_backend(asked: str, device: torch.device, dtype: torch.dtype, weights: int, kept: int = 0) -> str:
    """The backend to use: what was asked for, and for "auto" what is fastest on this device and has room there.

    weights: bytes of the layers that Winograd's algorithm suits
    kept: bytes of transformed filters that it holds already
    ValueError for an unknown name, or for "winograd" where it cannot run.
    """
    if asked not in BACKENDS:
        raise ValueError(f"unknown convolution backend '{asked}', expected one of {', '.join(BACKENDS)}")
    able = device.type == "cpu" and dtype == torch.float32
    if asked == "winograd" and not able:
        name = str(dtype).removeprefix("torch.")
        raise ValueError(f"the winograd backend computes in fp32 on a CPU, not in {name} on {device.type}: use auto or direct")
    if asked != "auto":
        return asked
    if device.type == "mps" or (device.type == "cuda" and torch.version.hip):
        return "conv2d"
    return "winograd" if able and weights and free_memory() + kept >= ROOM * min(BUDGET, GROWTH * weights) else "direct"


def convolve(
    x_BCTHW: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: tuple[int, int, int] = (1, 1, 1),
    padding: tuple[int, int, int] = (0, 0, 0),
) -> Tensor:
    """F.conv3d, by the way that is fastest on a CPU.

    For a batch of one with few channels torch leaves oneDNN for an im2col that takes up to four times as long, so oneDNN
    is called by its name; kernels without spatial extent run as 2D over (T, H*W), and those with few outputs tap by tap.
    """
    if weight.shape[-1] == 1:
        height, width = x_BCTHW.shape[-2:]
        return F.conv2d(x_BCTHW.flatten(-2), weight.squeeze(-1), bias, stride[:2], padding[:2]).unflatten(-1, (height, width))
    if len(weight) <= THIN and set(stride) == {1} and padding[0] == 0 and not torch.is_grad_enabled() and _plain(x_BCTHW):
        return _thin(x_BCTHW, weight, bias, padding[1:])
    if ONEDNN and _plain(x_BCTHW):
        return torch.mkldnn_convolution(x_BCTHW, weight, bias, padding, stride, (1, 1, 1), 1)
    return F.conv3d(x_BCTHW, weight, bias, stride, padding)


def _by_winograd(
    winograd: Winograd, layer: nn.Conv2d | nn.Conv3d, x_BCTHW: Tensor, past_BCTHW: Tensor | None, rows: int, doubled: bool = False
) -> Tensor | None:
    clips = []
    for sample in range(len(x_BCTHW)):
        frames = list(x_BCTHW[sample].permute(1, 2, 3, 0).contiguous())
        past = [] if past_BCTHW is None else list(past_BCTHW[sample].permute(1, 2, 3, 0).contiguous())
        if layer.weight.ndim == 5 and (past or len(frames) > 1):
            past = past or [torch.zeros_like(frames[0])] * 2
        made = winograd.convolve(layer, [*past, *frames], rows, doubled=doubled)
        if made is None:
            return None
        clips.append(made.permute(3, 0, 1, 2))
    return clips[0][None] if len(clips) == 1 else torch.stack(clips)


def _thin(x_BCTHW: Tensor, weight: Tensor, bias: Tensor | None, padding: tuple[int, int]) -> Tensor:
    """One matrix product gives the share of every pixel in all outputs that see it; shares are shifted and summed."""
    out_dim, dim, *reach = weight.shape
    batch, _, frames, height, width = x_BCTHW.shape
    h, w = (size + 2 * pad - taps + 1 for size, pad, taps in zip((height, width), padding, reach[1:], strict=True))
    y_BOTHW = x_BCTHW.new_zeros(batch, out_dim, frames - reach[0] + 1, h, w)
    if bias is not None:
        y_BOTHW += bias.view(-1, 1, 1, 1)
    taps = weight.permute(2, 3, 4, 0, 1).reshape(-1, dim)
    for sample, t in product(range(batch), range(frames)):
        shares = torch.mm(taps, x_BCTHW[sample, :, t].flatten(1)).view(*reach, out_dim, height, width)
        for (past, i, j), share_OHW in zip(product(*map(range, reach)), shares.flatten(0, 2), strict=True):
            if 0 <= t - past < y_BOTHW.shape[2]:
                (to_y, from_y), (to_x, from_x) = _overlap(h, height, i - padding[0]), _overlap(w, width, j - padding[1])
                y_BOTHW[sample, :, t - past, to_y, to_x] += share_OHW[:, from_y, from_x]
    return y_BOTHW


def _overlap(size: int, seen: int, shift: int) -> tuple[slice, slice]:
    """The outputs that have an input `shift` further on, and those inputs."""
    start, stop = max(0, -shift), min(size, seen - shift)
    return slice(start, max(start, stop)), slice(start + shift, max(start, stop) + shift)


def _sum_of_2d(x_BCTHW: Tensor, weight: Tensor, bias: Tensor | None, padding: tuple[int, int]) -> Tensor:
    batch, frames = len(x_BCTHW), x_BCTHW.shape[2] - weight.shape[2] + 1
    total = None
    for tap in range(weight.shape[2]):
        folded = x_BCTHW[:, :, tap : tap + frames].transpose(1, 2).flatten(0, 1)
        part = F.conv2d(folded, weight[:, :, tap], bias if total is None else None, padding=padding)
        total = part if total is None else total + part
    assert total is not None
    return total.unflatten(0, (batch, frames)).transpose(1, 2)


def _plain(x: Tensor) -> bool:
    """Whether oneDNN may be called by its name: in fp32 on a CPU, and eagerly."""
    eager = not torch.compiler.is_compiling() and not torch.is_autocast_enabled("cpu")
    return eager and x.is_cpu and x.dtype == torch.float32

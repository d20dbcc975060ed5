"""Weight-only quantisation: 8 bits and a scale a row, on any device, without kernels of its own.

int8 spaces its numbers evenly over a row: 127 is the largest. fp8 (e4m3) has three bits after the leading one at every magnitude; its
scales are powers of two, so that what was a plain cast to fp8 stays as it is, and unpacking is exact in bf16.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .packed import Packed, PackedState, Stored, scaled
from .weights import build

Quantisation = Literal["fp8", "int8"]
TYPES = {"fp8": torch.float8_e4m3fn, "int8": torch.int8}
STORED = {"fp8": ("float8_e4m3fn", "float8_e5m2"), "int8": ("int8",)}  # in files, with scales: these stay as they are
M = TypeVar("M", bound=nn.Module)


class QuantisedLinear(nn.Module):
    """x W^T + b of a W that is kept in 8 bits `[O, I]` with a float32 scale a row `[O, 1]`; W is made in the type of x where it is used."""

    weight: Tensor
    weight_scale: Tensor

    def __init__(self, in_features: int, out_features: int, *, bias: bool = False, kind: Quantisation = "int8") -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.register_buffer("weight", torch.empty(out_features, in_features, dtype=TYPES[kind]))
        self.register_buffer("weight_scale", torch.empty(out_features, 1))
        self.bias = nn.Parameter(torch.empty(out_features)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight.float().mul_(self.weight_scale).to(x.dtype)  # in fp16 a product without the scale overflows
        return F.linear(x, weight, self.bias)


def linears(module: nn.Module) -> Iterator[tuple[str, nn.Linear]]:
    """The layers that are quantised, by name: all products; norms, biases and embeddings stay as they are."""
    return ((name, layer) for name, layer in module.named_modules() if isinstance(layer, nn.Linear))


def replace_linears(module: nn.Module, kind: Quantisation = "int8") -> set[str]:
    """Put a `QuantisedLinear` without numbers in the place of every linear layer; returns their names."""
    found = dict(linears(module))
    for name, layer in found.items():
        owner, _, attribute = name.rpartition(".")
        with layer.weight.device:
            made = QuantisedLinear(layer.in_features, layer.out_features, bias=layer.bias is not None, kind=kind)
        setattr(module.get_submodule(owner), attribute, made)
    return set(found)


def quantise_rows(weight: Tensor, kind: Quantisation = "int8") -> tuple[Tensor, Tensor]:
    """`[O, I]` to 8 bits and a float32 scale a row, `[O, 1]`: the largest number of a row becomes 127, or 224 to 448 in fp8."""
    weight = weight.float()
    largest = weight.abs().amax(1, keepdim=True)
    if kind == "int8":
        scale = largest.clamp_min(torch.finfo(torch.float32).tiny * 128) / 127
        return (weight / scale).round_().clamp_(-127, 127).to(torch.int8), scale
    fraction, exponent = torch.frexp(largest / torch.finfo(TYPES[kind]).max)  # the power of two at or above it
    scale = torch.ldexp(torch.ones_like(largest), exponent - (fraction == 0.5).int())
    return (weight / scale).to(TYPES[kind]), torch.where(largest.isfinite(), scale, largest)


def quantised(value: Stored, kind: Quantisation, device: Any = "cpu") -> tuple[Tensor, Tensor]:
    """A weight in 8 bits and its scales a row; what is stored so keeps its bits."""
    if isinstance(value, Packed) and value.kind in STORED[kind] and value.parts:
        weight, scale = value.parts
        return weight.to(device), scale.float().reshape(-1, 1).expand(len(weight), 1).contiguous().to(device)
    return quantise_rows(value.to(device, torch.float32), kind)


def quantise_state(state: Mapping[str, Stored], layers: set[str], kind: Quantisation = "int8", device: Any = "cpu") -> PackedState:
    """The state with the weights of these layers in 8 bits and their scales; one is in memory at a time before."""
    made: PackedState = {}
    for key, value in state.items():
        stem = key.removesuffix(".weight")
        if key == f"{stem}.weight" and stem in layers:
            made[key], made[f"{stem}.weight_scale"] = quantised(value, kind, device)
        else:
            made[key] = value
    return made


def build_quantised(
    make: Callable[[], M], state: Mapping[str, Stored], within: str, kind: Quantisation, *, dtype: torch.dtype, device: Any, source: object
) -> M:
    """`weights.build` with the linear layers of the submodule `within` in 8 bits; the rest is in `dtype`."""
    if kind not in TYPES:
        raise ValueError(f"unknown quantisation '{kind}', expected {' or '.join(TYPES)}")
    with torch.device("meta"):
        module = make()
    layers = {f"{within}.{name}" for name in replace_linears(module.get_submodule(within), kind)}
    kept = {f"{name}.{field}" for name in layers for field in ("weight", "weight_scale")}
    return build(lambda: module, quantise_state(state, layers, kind, device), dtype=dtype, device=device, source=source, kept=kept)


def packed_state(state: Mapping[str, Tensor]) -> PackedState:
    """The state of a module with quantised layers, each weight with its scale as one packed tensor."""
    stems = {key.removesuffix("_scale") for key in state if key.endswith(".weight_scale")}
    return {
        key: scaled(value, state[f"{key}_scale"]) if key in stems else value
        for key, value in state.items()
        if not key.endswith(".weight_scale")
    }

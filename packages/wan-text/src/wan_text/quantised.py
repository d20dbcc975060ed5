"""Weight-only quantisation: int8 with a scale a row, on any device, without kernels of its own."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ._shared.packed import Packed, PackedState, Stored, scaled

Quantisation = Literal["int8"]


class QuantisedLinear(nn.Module):
    """x W^T of a W that is kept as int8 `[O, I]` and a float32 scale a row `[O, 1]`; W is made in the type of x where it is used."""

    weight: Tensor
    weight_scale: Tensor

    def __init__(self, inner: int, outer: int) -> None:
        super().__init__()
        self.register_buffer("weight", torch.empty(outer, inner, dtype=torch.int8))
        self.register_buffer("weight_scale", torch.empty(outer, 1))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, (self.weight * self.weight_scale).to(x.dtype))  # in fp16 a product without the scale overflows


def linears(module: nn.Module) -> Iterator[tuple[str, nn.Linear]]:
    """The layers that are quantised, by name: all products; norms, position biases and the embedding stay as they are."""
    return ((name, layer) for name, layer in module.named_modules() if isinstance(layer, nn.Linear))


def replace_linears(module: nn.Module) -> None:
    """Put a `QuantisedLinear` without numbers in the place of every linear layer."""
    for name, layer in list(linears(module)):
        owner, _, attribute = name.rpartition(".")
        with layer.weight.device:
            setattr(module.get_submodule(owner), attribute, QuantisedLinear(layer.in_features, layer.out_features))


def quantise_rows(weight: Tensor) -> tuple[Tensor, Tensor]:
    """`[O, I]` to int8 and a float32 scale a row, `[O, 1]`: the largest number of a row becomes 127."""
    weight = weight.float()
    scale = weight.abs().amax(1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny * 128) / 127
    return (weight / scale).round_().clamp_(-127, 127).to(torch.int8), scale


def quantise_state(state: Mapping[str, Stored], layers: set[str]) -> PackedState:
    """The state with the weights of these layers as int8 and their scales; one is in memory at a time before."""
    made: PackedState = {}
    for key, value in state.items():
        stem = key.removesuffix(".weight")
        if stem not in layers:
            made[key] = value
        elif isinstance(value, Packed) and value.kind == "int8" and value.parts:
            weight, scale = value.parts
            made[key], made[f"{stem}.weight_scale"] = weight, scale.float().reshape(-1, 1).expand(len(weight), 1)
        else:
            made[key], made[f"{stem}.weight_scale"] = quantise_rows(value.to("cpu", torch.float32))
    return made


def packed_state(state: Mapping[str, Tensor]) -> PackedState:
    """The state of a module with quantised layers, each weight with its scale as one packed tensor."""
    stems = {key.removesuffix("_scale") for key in state if key.endswith(".weight_scale")}
    return {
        key: scaled(value, state[f"{key}_scale"]) if key in stems else value
        for key, value in state.items()
        if not key.endswith(".weight_scale")
    }

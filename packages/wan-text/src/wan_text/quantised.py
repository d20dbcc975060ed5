"""Weight-only quantisation: int8 with a scale a row, on any device, without kernels of its own."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .packed import PackedState, quantise_rows

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
        return F.linear(x, self.weight.to(x.dtype) * self.weight_scale.to(x.dtype))  # in fp16 a product without the scale overflows


def linears(module: nn.Module) -> Iterator[tuple[str, nn.Linear]]:
    """The layers that are quantised, by name: all products; norms, position biases and the embedding stay as they are."""
    return ((name, layer) for name, layer in module.named_modules() if isinstance(layer, nn.Linear))


def replace_linears(module: nn.Module) -> None:
    """Put a `QuantisedLinear` without numbers in the place of every linear layer."""
    for name, layer in list(linears(module)):
        owner, _, attribute = name.rpartition(".")
        with layer.weight.device:
            setattr(module.get_submodule(owner), attribute, QuantisedLinear(layer.in_features, layer.out_features))


def quantise_state(state: PackedState, layers: set[str]) -> PackedState:
    """The state with the weights of these layers as int8 and scales, one in memory at a time before."""
    made: PackedState = {}
    for key, value in state.items():
        stem = key.removesuffix(".weight")
        if stem in layers:
            made[key], made[f"{stem}.weight_scale"] = quantise_rows(value.to("cpu", torch.float32))
        else:
            made[key] = value
    return made

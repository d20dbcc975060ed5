"""The linear layers of a frozen backbone: weights in 8 bits, or that wait in the host's memory, and are nowhere else between two uses.

The gradient of a frozen layer's input needs the weight again. autograd would keep the one that was unpacked or brought for the forward,
and so all of them at once; here it is made anew in the backward, of what is stored. Results are those of `nn.Linear` and
`QuantisedLinear`, bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from functools import partial
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from wan_dit._shared.packed import scaled
from wan_dit._shared.quantised import QuantisedLinear
from wan_dit.model import WanDiT
from wan_dit.offload import away, pinned
from wan_dit.swap import Loader, Piece, Weights, fields, is_linear


class FrozenLinear(nn.Module):
    """x W^T + b of a W `[O, I]` that is never trained: its own, packed or not, or what `source` gives for each use."""

    def __init__(self, layer: nn.Linear | QuantisedLinear, source: Callable[[], Weights] | None = None) -> None:
        super().__init__()
        self.in_features, self.out_features, self.bias, self._source = layer.in_features, layer.out_features, layer.bias, source
        for field in fields(layer) if source is None else ():
            self.register_buffer(field, getattr(layer, field).detach())

    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, _Product.apply(x, self))

    def matrix(self, dtype: torch.dtype) -> Tensor:
        """W in a type."""
        stored = dict(self.named_buffers()) if self._source is None else self._source()
        if "weight_scale" in stored:
            return scaled(stored["weight"], stored["weight_scale"]).unpack(None).to(dtype)
        return stored["weight"].to(dtype)


class _Product(torch.autograd.Function):
    """Keeps nothing for its backward: there is no gradient of the weight, which would need the input."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: FrozenLinear) -> Tensor:
        ctx.layer = layer
        return F.linear(x, layer.matrix(x.dtype), layer.bias)

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        product = grad.flatten(0, -2) @ ctx.layer.matrix(grad.dtype)
        return product.view(*grad.shape[:-1], -1), None


class BlockSwap:
    """Weights that wait in the host's memory: those of one piece are on the device, and those of the next one on their way.

    sequence: pieces in the order of a forward, which a backward asks for in the opposite order; what comes next is what follows in
    the direction of the last move
    waiting: weights of each layer, on the host
    """

    def __init__(self, sequence: list[Piece], waiting: dict[str, Weights], device: torch.device) -> None:
        self._loader, self._sequence = Loader(waiting.__getitem__, device), sequence
        self._places = {name: (i, j) for i, piece in enumerate(sequence) for j, name in enumerate(piece.names)}
        self._at, self._here = -1, list[Weights]()
        self._coming: tuple[int, Future[list[Weights]]] | None = None

    def weights(self, layer: str) -> Weights:
        """Those of a layer on the device; until the next call for another piece."""
        i, j = self._places[layer]
        if i != self._at:
            self._move(i)
        return self._here[j]

    def _move(self, i: int) -> None:
        coming, self._coming = self._coming, None
        self._loader.leave(self._here)
        if coming is not None and coming[0] != i:  # a wrong guess goes before the right piece is sent for
            coming[1].result()
            coming = None
        if coming is None:
            coming = i, self._loader.load(self._sequence[i])
        self._here = coming[1].result()  # what was here goes before the next one is sent for: there are never three
        following = i + 1 if i > self._at else i - 1
        self._at = i
        if 0 <= following < len(self._sequence):
            self._coming = following, self._loader.load(self._sequence[following])

    def __deepcopy__(self, memo: dict[int, Any]) -> BlockSwap:
        return self


def freeze_linears(backbone: WanDiT, device: torch.device | str, swapped: int = 0) -> None:
    """Make frozen layers of those in 8 bits; `swapped` blocks and all layers of the prompt's keys and values wait where they are.

    Blocks that stay are spread evenly. All else is brought to the device. VACE blocks count as blocks.
    ValueError for more than there are.
    """
    trunk, device = backbone.trunk, torch.device(device)
    count = len(trunk.blocks) + len(trunk.vace_blocks)
    if swapped > count:
        raise ValueError(f"swap = {swapped}: the backbone has {count} blocks")
    sequence = [piece for pieces in away(backbone, count - swapped) for piece in pieces] if swapped else []
    waiting: dict[str, Weights] = {}
    swap = BlockSwap(sequence, waiting, device)
    elsewhere = {name for piece in sequence for name in piece.names}
    for name, layer in [(name, layer) for name, layer in trunk.named_modules(prefix="trunk") if is_linear(layer)]:
        if name in elsewhere:
            waiting[name] = pinned({field: getattr(layer, field).detach() for field in fields(layer)}, device)
            _replace(backbone, name, FrozenLinear(cast(Any, layer), partial(swap.weights, name)))
        elif isinstance(layer, QuantisedLinear):
            _replace(backbone, name, FrozenLinear(layer))
    backbone.to(device)


def _replace(backbone: nn.Module, name: str, layer: nn.Module) -> None:
    owner, _, attribute = name.rpartition(".")
    setattr(backbone.get_submodule(owner), attribute, layer)

"""Weights that are put into layers right before they run and taken out afterwards, with a thread that fetches the next ones ahead."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor, nn

from ._shared.quantised import QuantisedLinear

Weights = dict[str, Tensor]  # of one layer, by the names that it gives them
Fetch = Callable[[str], Weights]  # a layer's name -> its weights, on the CPU


@dataclass(frozen=True)
class Piece:
    """Layers whose weights come and go together.

    owner: the module that needs them while it runs; layers: their names in it, `""` for itself
    """

    owner: str
    layers: tuple[str, ...]

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the layers in the model."""
        return tuple(f"{self.owner}.{layer}".removesuffix(".") for layer in self.layers)


class Loader:
    """Brings the weights of pieces to a device, in a thread and, on a GPU, beside what is computed."""

    def __init__(self, fetch: Fetch, device: torch.device) -> None:
        self._fetch, self._device = fetch, device
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="wan-dit-weights")
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._left: Any = None  # CUDA event: the last piece has run

    def load(self, piece: Piece) -> Future[list[Weights]]:
        """The weights of its layers, to come; on a GPU once the piece that was last given to `leave` has run."""
        return self._thread.submit(self._bring, piece, self._left)

    def leave(self, pieces: Iterable[Weights]) -> None:
        """Say that all that is computed with these weights has been asked for, and they are given up."""
        if self._stream is None:
            return
        for weights in pieces:
            for weight in weights.values():  # the allocator may not reuse them before they have been computed with
                weight.record_stream(torch.cuda.current_stream(self._device))
        self._left = torch.cuda.current_stream(self._device).record_event()

    def _bring(self, piece: Piece, left: Any) -> list[Weights]:
        """The weights of a piece on the device, once the piece before the one that runs has left it."""
        if left is not None:
            left.synchronize()
        with torch.cuda.stream(self._stream):
            loaded = [
                {field: weight.to(self._device, non_blocking=True) for field, weight in self._fetch(name).items()} for name in piece.names
            ]
        if self._stream is not None:
            self._stream.synchronize()
        return loaded


class Swap(Loader):
    """Weights put into a piece before it runs and taken out afterwards, with one piece fetched ahead.

    It refers to no module, so that a model that is dropped is freed at once.
    """

    def __init__(self, fetch: Fetch, device: torch.device) -> None:
        super().__init__(fetch, device)
        self._coming: dict[Piece, Future[list[Weights]]] = {}

    def watch(self, model: nn.Module, sequence: list[Piece]) -> None:
        """Hook the pieces, which run in this order."""
        for piece, following in zip_longest(sequence, sequence[1:]):
            owner = model.get_submodule(piece.owner)
            owner.register_forward_pre_hook(partial(self._enter, piece, following), prepend=True)
            owner.register_forward_hook(partial(self._leave, piece), always_call=True)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _enter(self, piece: Piece, following: Piece | None, module: nn.Module, args: Any) -> None:
        coming = self._coming.pop(piece, None) or self.load(piece)
        self._coming = {other: future for other, future in self._coming.items() if other == following}
        for layer, weights in zip(piece.layers, coming.result(), strict=True):
            _put(module.get_submodule(layer), weights)
        if following is not None and following not in self._coming:
            self._coming[following] = self.load(following)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _leave(self, piece: Piece, module: nn.Module, args: Any, output: Any) -> None:
        layers = [module.get_submodule(name) for name in piece.layers]
        pieces = [{field: getattr(layer, field) for field in fields(layer)} for layer in layers]
        for layer, weights in zip(layers, pieces, strict=True):
            _put(layer, {field: torch.empty_like(weight, device="meta") for field, weight in weights.items()})
        self.leave(pieces)


def is_linear(layer: nn.Module) -> bool:
    return isinstance(layer, nn.Linear | QuantisedLinear)


def fields(layer: nn.Module) -> tuple[str, ...]:
    return ("weight", "weight_scale") if isinstance(layer, QuantisedLinear) else ("weight",)


def _put(layer: nn.Module, weights: Weights) -> None:
    for field, weight in weights.items():
        setattr(layer, field, weight if isinstance(layer, QuantisedLinear) else nn.Parameter(weight, requires_grad=False))

"""A backbone of which a few blocks are on the device at a time: the others wait in the host's memory, or in their file.

Applied from outside, by hooks: before a block runs, the weights of its linear layers are put in, and afterwards taken out again,
while a thread fetches those of the next. What is small stays on the device: norms, biases, modulation, embeddings and the head.
Results are those of the whole model, bit for bit.

Layers that are called by themselves come by themselves: those of keys and values, which `encode_context` alone uses, and the
projections of VACE blocks.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from torch import Tensor

from ._shared.packed import PackedState, Stored, scaled
from ._shared.quantised import Quantisation, QuantisedLinear, packed_state, quantised, replace_linears
from ._shared.weights import build, default_dtype, fingerprint, locate
from .model import WanDiT
from .plugins import BackboneSpec, find, load_spec, own_weights
from .swap import Fetch, Piece, Swap, Weights, fields, is_linear
from .watched import Watched

if TYPE_CHECKING:
    import pluggy

Mode = Literal["none", "blocks", "stream"]
BEFORE, AFTER = "before_proj", "after_proj"
OF_CONTEXT = ("cross_attn.v", "cross_attn.k", "cross_attn.v_img", "cross_attn.k_img")  # in the order in which they run


class OffloadedDiT(WanDiT):
    """A `WanDiT` that computes what it would with all its weights at hand; made by `load_offloaded`, for inference alone."""

    _fetch: Fetch

    def fingerprint(self) -> str:
        """That of the whole model; reads every weight once."""
        table, state = self.official_names(self.config), self.state_dict()
        here = packed_state({key: value for key, value in state.items() if not value.is_meta})
        keys = {table[key]: key for key, value in state.items() if not key.endswith("_scale")}
        packed = any(isinstance(layer, QuantisedLinear) for layer in self.modules())
        return fingerprint(_Numbers(keys, here, self._fetch), self.patch_embedding.weight.dtype if packed else None)

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        raise ValueError(f"cannot write '{folder}': the weights are offloaded; use wan-dit convert, or a model that was loaded whole")


class _Numbers(Mapping[str, Stored]):
    """Tensors by official name; what is not `here` is fetched when it is asked for. keys: official name -> own."""

    def __init__(self, keys: Mapping[str, str], here: Mapping[str, Stored], fetch: Fetch) -> None:
        self._keys, self._here, self._fetch = keys, here, fetch

    def __iter__(self) -> Iterator[str]:
        return iter(self._keys)

    def __len__(self) -> int:
        return len(self._keys)

    def __getitem__(self, name: str) -> Stored:
        key = self._keys[name]
        if key in self._here:
            return self._here[key]
        weights = self._fetch(key.removesuffix(".weight"))
        return scaled(weights["weight"], weights["weight_scale"]) if "weight_scale" in weights else weights["weight"]


def load_offloaded(
    ref: str | os.PathLike[str] | BackboneSpec,
    mode: Mode,
    *,
    blocks_on_device: int = 0,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    quantise: Quantisation | None = None,
    pm: pluggy.PluginManager | None = None,
) -> WanDiT:
    """Load this package's transformer with most of its weights elsewhere than on the device.

    mode: `"blocks"` keeps them in the host's memory (pinned for CUDA; on the CPU they are at hand, and nothing is copied), `"stream"`
    in their file, of which a block is read right before it runs; `"none"` loads the whole model
    blocks_on_device: so many blocks stay, spread evenly; beside them two are there at a time, one running and one arriving
    dtype, device: as for `load_backbone`
    quantise: as for `load_backbone`; with `"stream"` what is not in 8 bits in the file is quantised each time it is read
    ValueError for another backbone; where a file is damaged, or changes while it is used.
    """
    if mode not in get_args(Mode):
        raise ValueError(f"offload mode '{mode}' is not one of {', '.join(get_args(Mode))}")
    if blocks_on_device < 0:
        raise ValueError(f"blocks_on_device is {blocks_on_device}, expected a count of blocks")
    spec = ref if isinstance(ref, BackboneSpec) else find("wan_backbones", os.fspath(ref), pm)
    if mode == "none":
        whole: WanDiT = load_spec(spec, dtype=dtype, device=device, quantise=quantise)
        return whole
    path, place = locate(own_weights(spec), WanDiT.hub_files), torch.device(device or "cpu")
    watched = Watched(path)
    config, state = WanDiT.read_checkpoint(path)
    dtype = dtype or default_dtype(state, place)
    with torch.device("meta"):
        model = OffloadedDiT(config).requires_grad_(False)
    if quantise is not None:
        replace_linears(model.trunk, quantise)
    sequences = away(model, blocks_on_device)
    elsewhere = [name for sequence in sequences for piece in sequence for name in piece.names]
    fetch: Fetch = partial(_weights, state, dtype, quantise)
    kept = {f"{name}.{field}" for name, layer in model.named_modules() if isinstance(layer, QuantisedLinear) for field in fields(layer)}
    build(lambda: model, _resident(model, state, set(elsewhere), fetch), dtype=dtype, device=place, source=path, kept=kept)
    at_hand = {} if mode == "stream" else {name: pinned(fetch(name), place) for name in elsewhere}
    fetch = partial(watched.read, fetch) if mode == "stream" else at_hand.__getitem__
    swap = Swap(fetch, place)
    for sequence in sequences:
        swap.watch(model, sequence)
    model._fetch = fetch
    model.name = None if spec.name == spec.weights else spec.name
    return model


def away(model: WanDiT, blocks_on_device: int) -> tuple[list[Piece], list[Piece]]:
    """What is elsewhere where so many blocks stay: of `encode_context` and of the trunk, each in the order in which it runs."""
    context, trunk = _pieces(model)
    stay = _spread(model, blocks_on_device)
    return context, [piece for piece in trunk if not any(f"{piece.owner}.".startswith(f"{block}.") for block in stay)]


def _blocks(model: WanDiT, kind: str) -> list[str]:
    return [f"trunk.{kind}.{i}" for i in range(len(getattr(model.trunk, kind)))]


def _pieces(model: WanDiT) -> tuple[list[Piece], list[Piece]]:
    """What `encode_context` and the trunk need, each in the order in which it runs."""
    context, trunk = [], []
    blocks, vace_blocks = _blocks(model, "blocks"), _blocks(model, "vace_blocks")
    for block in (*blocks, *vace_blocks):
        context += [piece for name in OF_CONTEXT if (piece := _alone(model, f"{block}.{name}"))]
    for block in (*vace_blocks, *blocks):
        layers = [name for name, layer in model.get_submodule(block).named_modules() if is_linear(layer)]
        middle = Piece(block, tuple(name for name in layers if name not in (BEFORE, AFTER, *OF_CONTEXT)))
        trunk += [piece for piece in (_alone(model, f"{block}.{BEFORE}"), middle, _alone(model, f"{block}.{AFTER}")) if piece]
    return context, trunk


def _alone(model: WanDiT, name: str) -> Piece | None:
    """A layer that is called by itself, where there is such a one."""
    owner, _, layer = name.rpartition(".")
    return Piece(name, ("",)) if getattr(model.get_submodule(owner), layer, None) is not None else None


def _spread(model: WanDiT, count: int) -> set[str]:
    """Names of the blocks that stay, as evenly among the others as can be, so that there is time to fetch between them."""
    blocks = [*_blocks(model, "vace_blocks"), *_blocks(model, "blocks")]
    count = min(count, len(blocks))
    return {block for i, block in enumerate(blocks) if (i + 1) * count // len(blocks) > i * count // len(blocks)}


@dataclass(frozen=True)
class _Elsewhere:
    """Stands for a tensor that is not loaded."""

    shape: torch.Size | tuple[int, ...]
    dtype: torch.dtype

    def to(self, device: Any, dtype: torch.dtype) -> Tensor:
        return torch.empty(self.shape, dtype=dtype, device="meta")


def _resident(model: WanDiT, state: PackedState, elsewhere: set[str], fetch: Fetch) -> dict[str, Any]:
    """The tensors to load, by name in the model, and stand-ins for the weights of the layers that are `elsewhere`."""
    made: dict[str, Any] = dict(state)
    for name, layer in model.trunk.named_modules(prefix="trunk"):
        if is_linear(layer) and name in elsewhere:
            shapes = {"weight": state[f"{name}.weight"].shape, "weight_scale": (layer.out_features, 1)}
            made |= {f"{name}.{field}": _Elsewhere(shapes[field], getattr(layer, field).dtype) for field in fields(layer)}
        elif is_linear(layer):
            made |= {f"{name}.{field}": weight for field, weight in fetch(name).items()}
    return made


def _weights(state: PackedState, dtype: torch.dtype, quantise: Quantisation | None, name: str) -> Weights:
    """The weights of a linear layer as they are computed with, on the CPU."""
    stored = state[f"{name}.weight"]
    if quantise is None:
        return {"weight": stored.to("cpu", dtype)}
    weight, scale = quantised(stored, quantise)
    return {"weight": weight, "weight_scale": scale}


def pinned(weights: Weights, device: torch.device) -> Weights:
    """In memory that a GPU can read by itself, where there is one."""
    return {field: weight.pin_memory() for field, weight in weights.items()} if device.type == "cuda" else weights

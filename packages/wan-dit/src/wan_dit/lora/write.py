"""Writes a LoRA in the names of PEFT (diffusers), ComfyUI or kohya: the same tensors, bit for bit, with the same alphas."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Mapping
from typing import Any

from safetensors.torch import save_file
from torch import Tensor, tensor

from .._shared.files import replacing
from ..layouts import names
from . import vocabulary
from .delta import Delta
from .formats import DIFFS, ENDS, ENDS_WRITTEN, PREFIX_LOW, PREFIX_WRITTEN, Target
from .ledger import Entry, Ledger
from .read import METADATA, Lora
from .reference import Expert

DIFF_PARTS = {place: part for part, place in DIFFS.items()}
KEPT = ("ss_", "modelspec.")  # of the header's strings, those that describe the training


def export(lora: Lora, format: Target, path: str | os.PathLike[str], *, expert: Expert | None = None) -> None:
    """Write `path`, a safetensors file that appears whole or not at all.

    format: `"peft"` (what diffusers loads; LoRA alone), `"comfy"` or `"kohya"` (all kinds)
    expert: which LoRA of a file that holds one for each expert of Wan2.2 A14B; PEFT takes both
    ValueError where a key has no name in the format: nothing is left out unsaid.
    """
    if format not in PREFIX_WRITTEN:
        raise ValueError(f"LoRA format '{format}' is not known, expected one of {', '.join(PREFIX_WRITTEN)}")
    deltas = _chosen(lora, format, expert)
    table = _names(lora, deltas, format)
    state: dict[str, Tensor] = {}
    for delta, name in zip(deltas, table, strict=True):
        state |= _tensors(delta, _prefix(delta, format) + name, format)
    metadata = {key: value for key, value in lora.metadata.items() if key.startswith(KEPT)}
    if format == "peft":
        metadata[METADATA] = json.dumps(_settings(deltas, table), indent=2, sort_keys=True)
    with replacing(path) as scratch:
        save_file({key: value.contiguous().clone() for key, value in state.items()}, scratch, metadata={"format": "pt", **metadata})


def _chosen(lora: Lora, format: Target, expert: Expert | None) -> list[Delta]:
    if lora.rejected:
        raise ValueError(f"cannot convert '{lora.name}': {Ledger(lora.rejected).summary()}")
    deltas = [delta for delta in lora.deltas if expert is None or delta.expert in (None, expert)]
    if not deltas:
        raise ValueError(f"'{lora.name}' has nothing for the expert of {expert} noise")
    if format != "peft":
        if len({delta.expert for delta in deltas}) > 1:
            raise ValueError(f"'{lora.name}' holds a LoRA for each expert, a file of {format} one: say which, high or low")
        return deltas
    scales = {(delta.module, delta.expert): delta.scale for delta in deltas if delta.kind == "lora"}
    others = [delta.keys[0] for delta in deltas if delta.kind != "lora" and not _is_lora_bias(delta, scales)]
    if others:
        first = ", ".join(others[:3])
        raise ValueError(f"PEFT has no name for {len(others)} changes that are no LoRA of a layer ({first}): use comfy or kohya")
    return deltas


def _is_lora_bias(delta: Delta, scales: Mapping[tuple[str, Expert | None], float]) -> bool:
    """Whether it is the bias that PEFT trains with a LoRA (`lora_B.bias`), which alpha / rank multiplies."""
    return (delta.kind, delta.place) == ("diff", "bias") and scales.get((delta.module, delta.expert)) == delta.scale


def _names(lora: Lora, deltas: list[Delta], format: Target) -> list[str]:
    """The name of each delta's layer in the format."""
    config = vocabulary.any_wan(deltas)
    own, theirs = vocabulary.of_config(config), names(config, "diffusers" if format == "peft" else "official")
    found = [own.tensor(delta) for delta in deltas]
    unknown = [Entry(lora.name, key, "no such module") for delta, name in zip(deltas, found, strict=True) if not name for key in delta.keys]
    if unknown:
        raise ValueError(f"cannot convert '{lora.name}', no Wan has layers of these names: {Ledger(tuple(unknown)).summary()}")
    layers = [_layer(theirs[name], delta) for name, delta in zip(found, deltas, strict=True) if name]
    return [layer.replace(".", "_") for layer in layers] if format == "kohya" else layers


def _layer(name: str, delta: Delta) -> str:
    """A tensor's name without the end that the kind of the delta stands for."""
    end = next(end for end in ENDS[delta.place] if name.endswith(end))
    return name.removesuffix(end)


def _prefix(delta: Delta, format: Target) -> str:
    return PREFIX_LOW if format == "peft" and delta.expert == "low" else PREFIX_WRITTEN[format]


def _tensors(delta: Delta, name: str, format: Target) -> dict[str, Tensor]:
    ends = ENDS_WRITTEN[format]
    if delta.kind == "diff":
        if format == "peft":
            return {f"{name}.{ends['up_bias']}": delta.parts["diff"]}
        value = delta.parts["diff"]
        return {f"{name}.{DIFF_PARTS[delta.place]}": value if delta.scale == 1 else value.float() * delta.scale}
    written = {f"{name}.{ends.get(part, part)}": value for part, value in delta.parts.items()}
    if format == "peft" or delta.rank is None:
        return written
    return {**written, f"{name}.alpha": tensor(_alpha(delta, delta.rank))}


def _alpha(delta: Delta, rank: int) -> float:
    """The file's own where it is what scales, what comes to the same where that was a root of the rank."""
    return delta.alpha if delta.alpha is not None and delta.alpha / rank == delta.scale else delta.scale * rank


def _settings(deltas: list[Delta], table: list[str]) -> dict[str, Any]:
    """What diffusers reads as PEFT's LoraConfig, of each expert: rank and alpha of most layers, and those of the others by name."""
    settings: dict[str, Any] = {}
    for prefix in (PREFIX_WRITTEN["peft"], PREFIX_LOW):
        layers = {name: delta for delta, name in zip(deltas, table, strict=True) if _prefix(delta, "peft") == prefix}
        ranks = {name: delta.rank for name, delta in layers.items() if delta.rank}
        if not ranks:
            continue
        alphas = {name: _alpha(delta, delta.rank) for name, delta in layers.items() if delta.rank}
        fields = {
            "r": _most(ranks),
            "lora_alpha": _most(alphas),
            "rank_pattern": {f"^{name}": value for name, value in ranks.items() if value != _most(ranks)},
            "alpha_pattern": {f"^{name}": value for name, value in alphas.items() if value != _most(alphas)},
            "target_modules": sorted(ranks),
            "lora_bias": any(delta.kind == "diff" for delta in deltas if _prefix(delta, "peft") == prefix),
        }
        settings |= {prefix + field: value for field, value in fields.items()}
    return settings


def _most(values: Mapping[str, Any]) -> Any:
    return Counter(values.values()).most_common(1)[0][0]

"""Reads a LoRA file of any format into deltas; every key becomes part of one, or is kept as not understood."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor

from .._shared.files import read_json
from .._shared.weights import PICKLES, State, locate, read_state
from .delta import Delta, Kind, rank
from .formats import DIFFS, LOHA, LOKR, PARTS, PREFIXES, UNSUPPORTED, Format, Prefix
from .ledger import Entry
from .reference import Expert

HUB_FILES = ("pytorch_lora_weights.safetensors", "adapter_model.safetensors", "adapter_config.json")
ADAPTER_CONFIG = "adapter_config.json"  # PEFT's, beside the file
METADATA = "lora_adapter_metadata"  # diffusers', in the header of the file

Layer = tuple[Prefix, str]  # prefix, and name of the layer in the file
Group = dict[str, tuple[str, Tensor]]  # what a tensor is: its key and itself


@dataclass(frozen=True)
class Lora:
    """What a file changes.

    name: of the file
    format: by what its keys start with
    deltas: the changes, each of one tensor
    rejected: keys that no rule reads, with the reason
    metadata: strings in the header of the file
    """

    name: str
    format: Format
    deltas: tuple[Delta, ...]
    rejected: tuple[Entry, ...]
    metadata: Mapping[str, str]

    @property
    def experts(self) -> tuple[Expert | None, ...]:
        """The experts that its keys are of, None where they do not tell."""
        return tuple(dict.fromkeys(delta.expert for delta in self.deltas))


def load_lora(source: str | os.PathLike[str]) -> Lora:
    """Read a LoRA from a file, a folder with one file, or the Hub (`hub:org/repo/file`, or `org/repo` in diffusers' or PEFT's layout).

    ValueError that names the key where the file is damaged, has numbers that are not finite, or holds no LoRA.
    """
    path = _file(source)
    state = read_state(path)
    _check(state, path)
    metadata = _metadata(path)
    groups, rejected = _groups(state, path)
    settings = _settings(metadata, path)
    deltas: list[Delta] = []
    for (prefix, module), group in groups.items():
        made, why = _deltas(prefix, module, group, _LayerSettings(settings, prefix, module))
        deltas += made
        used = {key for delta in made for key in delta.keys}
        rejected += [Entry(path.name, key, "not understood", why=why) for key, _ in group.values() if key not in used]
    if not deltas:
        first = ", ".join(sorted(state)[:3])
        reason = f": {rejected[0].why}" if rejected and rejected[0].why else ""
        raise ValueError(f"'{path}' holds no LoRA that can be read{reason} (it starts with {first or 'nothing'})")
    formats = [prefix.format for prefix, _ in groups]
    deltas = _experts(deltas)
    return Lora(path.name, max(set(formats), key=formats.count), tuple(deltas), tuple(rejected), metadata)


def _file(source: str | os.PathLike[str]) -> Path:
    path = locate(source, HUB_FILES)
    if not path.is_dir():
        return path
    found = [file for file in sorted(path.iterdir()) if file.suffix in (".safetensors", *PICKLES)]
    if len(found) != 1:
        names = ", ".join(file.name for file in found[:5]) or "none"
        raise ValueError(
            f"'{source}' is a folder, expected one LoRA file in it, found {names}: give the file (hub:org/repo/file on the Hub)"
        )
    return found[0]


def _check(state: State, path: Path) -> None:
    for key, value in state.items():
        if not isinstance(value, Tensor):
            raise ValueError(f"'{path}': '{key}' is a {type(value).__name__}, expected a tensor")
        if not bool(value.float().isfinite().all()):
            raise ValueError(f"'{path}': '{key}' holds numbers that are not finite: the file is damaged, or its training diverged")
        if key.endswith(".alpha") and value.numel() != 1:
            raise ValueError(f"'{path}': '{key}' is {list(value.shape)}, expected one number")


def _metadata(path: Path) -> dict[str, str]:
    if path.suffix in PICKLES:
        return {}
    with safe_open(path, "pt") as file:
        return dict(file.metadata() or {})


def _settings(metadata: Mapping[str, str], path: Path) -> dict[str, Any]:
    """The fields of PEFT's LoraConfig that came with the file."""
    beside = path.with_name(ADAPTER_CONFIG)
    if METADATA not in metadata:
        return read_json(beside) if beside.exists() else {}
    try:
        found = json.loads(metadata[METADATA])
    except json.JSONDecodeError as error:
        raise ValueError(f"'{path}': {METADATA} in its header is not JSON: {error}") from error
    if not isinstance(found, dict):
        raise ValueError(f"'{path}': {METADATA} in its header is a {type(found).__name__}, expected an object")
    return found


def _groups(state: State, path: Path) -> tuple[dict[Layer, Group], list[Entry]]:
    groups: dict[Layer, Group] = {}
    rejected = []
    for key, value in state.items():
        prefix = next(prefix for prefix in PREFIXES if key.startswith(prefix.text))
        end = next((end for end in (*PARTS, *UNSUPPORTED) if key.endswith(end)), None)
        if end is None:
            rejected.append(Entry(path.name, key, "not understood", why="no kind of LoRA has a key that ends so"))
            continue
        group = groups.setdefault((prefix, key.removeprefix(prefix.text).removesuffix(end)), {})
        part = PARTS.get(end, end)
        if part in group:
            raise ValueError(f"'{path}': '{group[part][0]}' and '{key}' are the same part of one layer")
        group[part] = key, value
    return groups, rejected


@dataclass(frozen=True)
class _LayerSettings:
    """What PEFT's settings say of one layer."""

    settings: Mapping[str, Any]
    prefix: Prefix
    module: str

    def get(self, field: str) -> Any:
        """A field, which diffusers writes with the prefix of the keys."""
        return self.settings.get(self.prefix.text + field, self.settings.get(field))

    def number(self, field: str, patterns: str) -> float | None:
        """The number in the first pattern that is of this layer, or of all layers."""
        for pattern, value in (self.get(patterns) or {}).items():
            if re.match(rf"(.*\.)?({pattern})$", self.module):
                return float(value)
        return None if (value := self.get(field)) is None else float(value)

    def scale(self, kind: Kind, alpha: float | None, rank: int | None) -> tuple[float | None, float]:
        """Alpha, and alpha / rank: the file's own number first, then that of the settings; without any it is the rank.

        An alpha in the file has no say where there is no rank (LoKr of two whole factors), as in LyCORIS and ComfyUI.
        """
        width: float | None = rank
        if alpha is None:
            alpha = self.number("lora_alpha" if kind == "lora" else "alpha", "alpha_pattern")
            width = rank or self.number("r", "rank_pattern")
        if alpha is None or not width:
            return alpha, 1.0
        return alpha, alpha / (math.sqrt(width) if self.get("use_rslora") else width)


def _deltas(prefix: Prefix, module: str, group: Group, settings: _LayerSettings) -> tuple[list[Delta], str]:
    """The deltas of a layer, and why the rest of its keys are in none."""
    delta = partial(Delta, module, flat=prefix.flat, expert=prefix.expert)
    made = [
        delta(place=place, kind="diff", parts={"diff": group[part][1]}, keys=(group[part][0],))
        for part, place in DIFFS.items()
        if part in group
    ]
    if unsupported := next((UNSUPPORTED[part] for part in group if part in UNSUPPORTED), None):
        return made, f"{unsupported} is not supported"
    given = float(group["alpha"][1]) if "alpha" in group else None
    for kind, names in _complete(group):
        parts = {name: group[name][1] for name in names}
        keys = tuple(group[name][0] for name in (*names, "alpha") if name in group)
        alpha, scale = settings.scale(kind, given, rank(kind, parts))
        made.append(delta(place="weight", kind=kind, parts=parts, keys=keys, alpha=alpha, scale=scale))
        if kind == "lora" and "up_bias" in group:
            key, bias = group["up_bias"]
            made.append(delta(place="bias", kind="diff", parts={"diff": bias}, keys=(key,), scale=scale))
    return made, f"incomplete, its layer has {', '.join(part for part in group if part not in DIFFS)} alone"


def _complete(group: Group) -> Iterator[tuple[Kind, tuple[str, ...]]]:
    """The kinds of which a layer has all parts, with the names of these."""
    if {"down", "up"} <= group.keys():
        yield "lora", ("down", "up")
    if set(LOHA[:4]) <= group.keys() and ("hada_t1" in group) == ("hada_t2" in group):
        yield "loha", tuple(name for name in LOHA if name in group)
    whole = [f"lokr_w{i}" in group or {f"lokr_w{i}_a", f"lokr_w{i}_b"} <= group.keys() for i in (1, 2)]
    if all(whole):
        yield "lokr", tuple(name for name in LOKR if name in group)


def _experts(deltas: list[Delta]) -> list[Delta]:
    """In a file with keys of the expert of low noise, those that do not tell are of the other."""
    if {delta.expert for delta in deltas} != {None, "low"}:
        return deltas
    return [replace(delta, expert=delta.expert or "high") for delta in deltas]

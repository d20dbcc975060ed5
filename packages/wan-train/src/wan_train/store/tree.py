"""A nested state as two flat ones: its tensors, which are sharded and written by DCP, and its plain values, which are JSON.

A key is the path to the value, joined by `/`. A list of plain values is a value; a list that holds tensors or dicts is gone into.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, MutableMapping, MutableSequence
from typing import Any

from torch import Tensor

Plain = Any  # None, bool, int, float, str, and lists of these
SEPARATOR = "/"


def flatten(state: Mapping[str, Any]) -> tuple[dict[str, Tensor], dict[str, Plain]]:
    """The tensors and the plain values of a state. ValueError names a value that is neither, or a key that is taken twice."""
    tensors: dict[str, Tensor] = {}
    values: dict[str, Plain] = {}
    for key, value in _leaves(state, ""):
        if key in tensors or key in values:
            raise ValueError(f"the state has '{key}' twice: keys may hold no '{SEPARATOR}' and are compared as strings")
        if isinstance(value, Tensor):
            tensors[key] = value
        elif _is_plain(value):
            values[key] = value
        else:
            raise ValueError(f"the state holds a {type(value).__name__} at '{key}': give tensors, numbers, strings, None, lists and dicts")
    return tensors, values


def fill(into: Any, values: Mapping[str, Plain], path: str = "") -> None:
    """Replace the plain values of a state by those of the same keys, in place; a tuple stays a tuple. KeyError for one that is missing."""
    items = list(into.items() if isinstance(into, Mapping) else enumerate(into))
    for name, value in items:
        key = f"{path}{name}"
        if _is_branch(value):
            fill(value, values, f"{key}{SEPARATOR}")
        elif not isinstance(value, Tensor):
            into[name] = tuple(values[key]) if isinstance(value, tuple) else values[key]


def _leaves(value: Any, path: str) -> Iterator[tuple[str, Any]]:
    for name, inner in value.items() if isinstance(value, Mapping) else enumerate(value):
        key = f"{path}{name}"
        if _is_branch(inner):
            yield from _leaves(inner, f"{key}{SEPARATOR}")
        else:
            yield key, inner


def _is_branch(value: Any) -> bool:
    if isinstance(value, MutableMapping):
        return True
    return isinstance(value, MutableSequence) and any(isinstance(inner, Tensor) or _is_branch(inner) for inner in value)


def _is_plain(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return all(_is_plain(inner) for inner in value)
    return value is None or type(value) in (bool, int, float, str)

"""From what a person typed to a cache: `teacache:threshold=0.2`, or two of them, `attention:every=2+cfg-gate:after=0`."""

from __future__ import annotations

import inspect
import re
from typing import TYPE_CHECKING, Any

from ..contracts import Cache
from ..plugins import find
from .combined import Combined

if TYPE_CHECKING:
    import pluggy

WORDS = {"true": True, "false": False}


def find_cache(ref: str, pm: pluggy.PluginManager | None = None) -> Cache:
    """The cache of kind `wan_caches` that `NAME[:KEY=VALUE,...]` describes, or two that are joined by `+`.

    Raises LookupError where no cache has the name, ValueError where one has no such key, or a key no such value.
    """
    caches = [_one(part, pm) for part in re.split(r"\+(?=[A-Za-z])", ref)]
    return caches[0] if len(caches) == 1 else Combined(*caches)


def _one(ref: str, pm: pluggy.PluginManager | None) -> Cache:
    name, _, given = ref, "", ""
    if found := re.fullmatch(r"(.+?):(\w+=.*)", ref):
        name, given = found.groups()
    target = find("wan_caches", name, pm).resolve()
    known = inspect.signature(target).parameters
    options: dict[str, Any] = {}
    for item in given.split(",") if given else ():
        key, _, value = item.partition("=")
        if key not in known:
            raise ValueError(f"cache '{name}' has no setting '{key}': it has {', '.join(known) or 'none'}")
        options[key] = _value(name, key, value, known[key].default)
    if missing := [key for key, known_ in known.items() if known_.default is known_.empty and key not in options]:
        raise ValueError(f"cache '{name}' needs {', '.join(missing)}: write '{name}:{missing[0]}=...'")
    made: Cache = target(**options)
    return made


def _value(name: str, key: str, value: str, default: Any) -> Any:
    """A value of the type of the default; text where that is text, or missing."""
    kind = str if default is inspect.Parameter.empty or default is None else type(default)
    try:
        if kind is bool:
            return WORDS[value.lower()]
        return kind(value)
    except (ValueError, KeyError):
        raise ValueError(f"cache '{name}': {key}={value} is no {kind.__name__}; its default is {default}") from None

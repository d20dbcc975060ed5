"""Find what installed packages offer: one pluggy project and one entry-point group, both named `wan`."""

from __future__ import annotations

import difflib
import json
import os
import re
import warnings
from dataclasses import dataclass
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import pluggy

from .spec import Spec

FIRST_PARTY = ("wan-vae", "wan-text", "wan-dit", "wan-train")
hookspec, hookimpl = pluggy.HookspecMarker("wan"), pluggy.HookimplMarker("wan")


@dataclass(frozen=True)
class Offer:
    """One listed part, or (spec None) a plugin that failed; `dist` is the normalised name of its distribution."""

    kind: str
    name: str
    dist: str
    version: str
    spec: Any
    error: Exception | None = None


class PluginManager(pluggy.PluginManager):
    """pluggy's manager for the project `wan` that keeps what could not be loaded instead of failing."""

    def __init__(self) -> None:
        super().__init__("wan")
        self.versions: dict[str, str] = {}
        self.broken: dict[str, Exception] = {}
        self.warned: set[tuple[str, str]] = set()


def plugin_manager(*hookspecs: Any) -> PluginManager:
    """Load the entry points of group `wan`, less those named in WAN_DISABLE_PLUGINS (`*`: first-party only).

    The distribution is the identity, not the entry-point name: two distributions may use the same one.
    """
    pm = PluginManager()
    for specs in hookspecs:
        pm.add_hookspecs(specs)
    disabled = {_normalise(name) for name in os.environ.get("WAN_DISABLE_PLUGINS", "").split(",") if name.strip()}
    for entry in entry_points(group="wan"):
        dist = _normalise(entry.dist.name) if entry.dist else entry.name
        if dist in disabled or ("*" in disabled and dist not in FIRST_PARTY) or pm.has_plugin(dist):
            continue
        pm.versions[dist] = entry.dist.version if entry.dist else ""
        try:
            pm.register(entry.load(), name=dist)
        except Exception as error:  # a broken plugin hides only itself
            pm.broken[dist] = error
            warnings.warn(_failure(dist, error), RuntimeWarning, stacklevel=2)
    return pm


def discover(kind: str, pm: pluggy.PluginManager) -> list[Offer]:
    """All parts of a kind (`wan_vaes`, ...) in the order of their distributions; a hook that raises hides only itself."""
    versions: dict[str, str] = getattr(pm, "versions", {})
    warned: set[tuple[str, str]] = getattr(pm, "warned", set())
    offers: list[Offer] = []
    caller = getattr(pm.hook, kind, None)
    for impl in caller.get_hookimpls() if caller else ():
        dist = impl.plugin_name
        try:
            specs = list(impl.function())
            if wrong := [spec for spec in specs if not isinstance(getattr(spec, "name", None), str)]:
                raise TypeError(f"{kind} must return specs with a name, got {wrong[0]!r}")
            offers += [Offer(kind, spec.name, dist, versions.get(dist, ""), spec) for spec in specs]
        except Exception as error:
            offers.append(Offer(kind, "", dist, versions.get(dist, ""), None, error))
            if (kind, dist) not in warned:
                warned.add((kind, dist))
                warnings.warn(_failure(dist, error), RuntimeWarning, stacklevel=2)
    return sorted(offers, key=lambda offer: (offer.dist not in FIRST_PARTY, offer.dist))


def resolve(kind: str, ref: str, pm: pluggy.PluginManager, *, typed: bool = True, install: str = "") -> Any:
    """The spec that `ref` names: a file or folder, a registered name, `org/repo` on the Hub or `module:attr`, in that order.

    `dist:name` picks one of two distributions that offer the same name. Import strings count only where a person typed
    them: pass `typed=False` for a name read from a file. `install` is the advice given where nothing of the kind exists.
    Raises LookupError with what is installed and the closest match.
    """
    offers = discover(kind, pm)
    found = [offer for offer in offers if offer.spec]
    if typed and (local := _checkpoint(ref, found)):
        return local
    named = [offer for offer in found if ref in (offer.name, f"{offer.dist}:{offer.name}")]
    if len({offer.dist for offer in named}) > 1:
        choices = " or ".join(f"'{offer.dist}:{offer.name}'" for offer in named)
        raise LookupError(f"{_label(kind)} '{ref}' is offered twice: say {choices}, or set WAN_DISABLE_PLUGINS")
    if named:
        return named[0].spec
    broken = {**getattr(pm, "broken", {}), **{offer.dist: offer.error for offer in offers if offer.error}}
    owner = ref.partition(":")[0]
    if owner in broken:
        raise LookupError(_failure(owner, broken[owner])) from broken[owner]
    if re.fullmatch(r"[A-Za-z_][\w.]*:[A-Za-z_][\w.]*", ref):
        if not typed:
            raise LookupError(
                f"'{ref}' is an import string; those are taken only from the command line, the API or a recipe, never from a file"
            )
        return _imported(kind, ref)
    if typed and re.fullmatch(r"[\w.-]+/[\w.-]+(@[\w.-]+)?", ref) and not ref.startswith(".") and (base := _reader(found, None)):
        return base.at(f"hub:{ref}")
    raise LookupError(_unknown(kind, ref, found, broken, install))


def _checkpoint(ref: str, found: list[Offer]) -> Any:
    path = Path(ref)
    if not path.exists():
        return None
    config = path / "config.json" if path.is_dir() else path.with_name("config.json")
    written = json.loads(config.read_text()).get("format") if config.exists() else None
    base = _reader(found, written)
    return base.at(ref) if base else None


def _reader(found: list[Offer], written: str | None) -> Any:
    readers = [offer.spec for offer in found if getattr(offer.spec, "format", None)]
    return next((spec for spec in readers if spec.format == written), readers[0] if readers else None)


def _imported(kind: str, ref: str) -> Any:
    spec = Spec(ref, ref)
    try:
        target = spec.resolve()
    except (ImportError, AttributeError) as error:
        raise LookupError(f"cannot import {_label(kind)} '{ref}': {error}") from error
    own = getattr(target, "spec", None)  # known by its shape, not its class: each package has a Spec of its own
    return own if isinstance(getattr(own, "name", None), str) and hasattr(own, "load") else _ImportedSpec(ref, ref)


class _ImportedSpec(Spec):
    """A class named by an import string alone, built without arguments."""

    def load(self, weights: str | None = None, *, dtype: Any = None, device: Any = None) -> Any:
        from .weights import load_part

        return load_part(self.resolve(), weights, dtype=dtype, device=device)


def _unknown(kind: str, ref: str, found: list[Offer], broken: dict[str, Exception], install: str) -> str:
    names = sorted({offer.name for offer in found})
    message = f"no {_label(kind)} named '{ref}' (installed: {', '.join(names) or 'none'}"
    if close := difflib.get_close_matches(ref, names, n=1):
        message += f"; did you mean '{close[0]}'?"
    message += ")"
    if not names and install:
        message += f"; try: pip install {install}"
    return "; ".join([message, *(_failure(dist, error) for dist, error in broken.items())])


def _label(kind: str) -> str:
    return kind.removeprefix("wan_").removesuffix("s").replace("_", " ")


def _failure(dist: str, error: Exception) -> str:
    return f"plugin '{dist}' failed ({type(error).__name__}: {' '.join(str(error).split())})"


def _normalise(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name.strip()).lower()

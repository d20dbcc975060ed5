"""Find what installed packages offer: one pluggy project and one entry-point group, both named `wan`."""

from __future__ import annotations

import difflib
import os
import re
import warnings
from dataclasses import dataclass
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import pluggy

from .files import joined, read_json
from .spec import ModelSpec, Spec

FIRST_PARTY = ("wan-vae", "wan-text", "wan-dit", "wan-train")
FIELDS = {  # what a spec of a kind must have, so that every package can list every kind
    "wan_vaes": ("target", "load", "latent_space", "latent_channels", "stride"),
    "wan_text_encoders": ("target", "load", "embedding_space", "embed_dim", "max_tokens"),
    "wan_backbones": ("target", "load", "latent_space", "latent_channels", "stride", "embedding_space", "text_dim", "text_len", "patch"),
    "wan_schedulers": ("target", "load"),
    "wan_attentions": ("target", "resolve"),
    "wan_caches": ("target", "resolve"),
    "wan_models": ("backbone", "vae", "text_encoder", "scheduler", "steps", "shift", "guidance", "size", "frames", "fps"),
    "wan_objectives": ("target", "resolve"),
    "wan_datasets": ("target", "resolve"),
}
hookspec, hookimpl = pluggy.HookspecMarker("wan"), pluggy.HookimplMarker("wan")


@dataclass(frozen=True)
class Offer:
    """One listed part, or (spec None) a plugin that failed; `dist` is the normalised name of its distribution."""

    kind: str
    name: str
    dist: str
    version: str
    spec: Any
    error: BaseException | None = None


class PluginManager(pluggy.PluginManager):
    """pluggy's manager for the project `wan` that keeps what could not be loaded instead of failing."""

    def __init__(self) -> None:
        super().__init__("wan")
        self.versions: dict[str, str] = {}
        self.broken: dict[str, BaseException] = {}
        self.disabled: set[str] = set()
        self.warned: set[tuple[str, str]] = set()


def plugin_manager(*hookspecs: Any) -> PluginManager:
    """Load the entry points of group `wan`, less those named in WAN_DISABLE_PLUGINS (`*`: first-party only).

    The distribution is the identity, not the entry-point name: two distributions may use the same one.
    """
    pm = PluginManager()
    for specs in hookspecs:
        pm.add_hookspecs(specs)
    unwanted = {_normalise(name) for name in os.environ.get("WAN_DISABLE_PLUGINS", "").split(",") if name.strip()}
    for entry in entry_points(group="wan"):
        dist = _normalise(entry.dist.name) if entry.dist else entry.name
        if dist in unwanted or ("*" in unwanted and dist not in FIRST_PARTY):
            pm.disabled.add(dist)
        elif not pm.has_plugin(dist):
            pm.versions[dist] = entry.dist.version if entry.dist else ""
            _register(pm, dist, entry)
    return pm


def _register(pm: PluginManager, dist: str, entry: Any) -> None:
    try:
        pm.register(entry.load(), name=dist)
    except (Exception, SystemExit) as error:  # a broken plugin hides only itself, and all of itself
        if pm.has_plugin(dist):
            pm.unregister(name=dist)
        pm.broken[dist] = error
        warnings.warn(_failure(dist, error), RuntimeWarning, stacklevel=3)


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
            for spec in specs:
                if missing := [field for field in ("name", *FIELDS.get(kind, ())) if not hasattr(spec, field)]:
                    raise TypeError(f"{kind} returned {spec!r}, which has no {', '.join(missing)}")
            offers += [Offer(kind, spec.name, dist, versions.get(dist, ""), spec) for spec in specs]
        except (Exception, SystemExit) as error:
            offers.append(Offer(kind, "", dist, versions.get(dist, ""), None, error))
            if (kind, dist) not in warned:
                warned.add((kind, dist))
                warnings.warn(_failure(dist, error), RuntimeWarning, stacklevel=2)
    return sorted(offers, key=lambda offer: (offer.dist not in FIRST_PARTY, offer.dist))


def resolve(kind: str, ref: str, pm: pluggy.PluginManager, *, typed: bool = True, install: str = "") -> Any:
    """The spec that `ref` names: a registered name, a file or folder, `org/repo` on the Hub or `module:attr`, in that order.

    `dist:name` picks one of two distributions that offer the same name; `./tiny` is the folder where `tiny` is a name.
    Paths, Hub ids and import strings count only where a person typed them: pass `typed=False` for a name read from a
    file. `install` is the advice given where nothing of the kind exists.
    Raises LookupError with what is installed and the closest match.
    """
    offers = discover(kind, pm)
    found = [offer for offer in offers if offer.spec]
    named = [offer for offer in found if ref in (offer.name, f"{offer.dist}:{offer.name}")]
    if len({offer.dist for offer in named}) > 1:
        choices = " or ".join(f"'{offer.dist}:{offer.name}'" for offer in named)
        raise LookupError(f"{_label(kind)} '{ref}' is offered twice: say {choices}, or set WAN_DISABLE_PLUGINS")
    if named:
        return named[0].spec
    broken = {**getattr(pm, "broken", {}), **{offer.dist: offer.error for offer in offers if offer.error}}
    if (owner := _normalise(ref.partition(":")[0])) in broken:
        raise LookupError(_failure(owner, broken[owner])) from broken[owner]
    if typed and ref and all(path.exists() for path in joined(Path(ref))):
        return _at(kind, ref, Path(ref), found)
    if typed and re.fullmatch(r"(hub:)?[\w.-]+/[\w.-]+(@[\w.-]+)?(/[\w./-]+)?", ref) and ref[0] != ".":
        from .weights import locate

        return _at(
            kind, f"hub:{ref.removeprefix('hub:')}", locate(f"hub:{ref.removeprefix('hub:')}", ["config.json", "*/config.json"]), found
        )
    if re.fullmatch(r"[A-Za-z_][\w.]*:[A-Za-z_][\w.]*", ref):
        if not typed:
            raise LookupError(
                f"'{ref}' is an import string; those are taken only from the command line, the API or a recipe, never from a file"
            )
        return _imported(kind, ref)
    raise LookupError(_unknown(kind, ref, pm, found, broken, install))


def _at(kind: str, ref: str, path: Path, found: list[Offer]) -> Any:
    """The spec for the checkpoint at `path`: of the part that reads its format, else of the first that reads any."""
    path = joined(path)[0]
    config = path / "config.json" if path.is_dir() else path.with_name("config.json")
    written = read_json(config).get("format") if config.exists() else None
    readers = [offer.spec for offer in found if getattr(offer.spec, "format", None)]
    if not readers:
        raise LookupError(f"no installed {_label(kind)} reads checkpoints, got '{ref}'")
    return next((spec for spec in readers if spec.format == written), readers[0]).at(ref)


def _imported(kind: str, ref: str) -> Any:
    try:
        target = Spec(ref, ref).resolve()
    except (Exception, SystemExit) as error:
        raise LookupError(f"cannot import {_label(kind)} '{ref}': {type(error).__name__}: {error}") from error
    for spec in (target, getattr(target, "spec", None)):
        if all(hasattr(spec, field) for field in ("name", *FIELDS[kind])) and not isinstance(spec, type):
            return spec
    if kind == "wan_models" or not callable(target):
        raise LookupError(f"'{ref}' is a {type(target).__name__}, expected a {_label(kind)}, or a class or function that makes one")
    return ModelSpec(ref, ref)


def _unknown(kind: str, ref: str, pm: Any, found: list[Offer], broken: dict[str, Any], install: str) -> str:
    names = sorted({offer.name for offer in found})
    message = f"no {_label(kind)} named '{ref}' (installed: {', '.join(names) or 'none'}"
    if close := difflib.get_close_matches(ref.rpartition(":")[2], names, n=1):
        message += f"; did you mean '{close[0]}'?"
    message += ")"
    if install and (not names or (ref.startswith(f"{install}:") and all(offer.dist != install for offer in found))):
        message += (
            f"; {install} is disabled by WAN_DISABLE_PLUGINS" if install in getattr(pm, "disabled", ()) else f"; try: pip install {install}"
        )
    return "; ".join([message, *(_failure(dist, error) for dist, error in broken.items())])


def _label(kind: str) -> str:
    return kind.removeprefix("wan_").removesuffix("s").replace("_", " ")


def _failure(dist: str, error: BaseException) -> str:
    return f"plugin '{dist}' failed ({type(error).__name__}: {' '.join(str(error).split())})"


def _normalise(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name.strip()).lower()

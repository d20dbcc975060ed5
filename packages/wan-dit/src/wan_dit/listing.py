"""What is installed, as table rows: parts of every kind, plugins that failed and, on request, faults in them."""

from __future__ import annotations

import difflib
from collections import Counter
from dataclasses import asdict, is_dataclass
from typing import Any

from .plugins import PART_KINDS, Offer, PluginManager, discover, find

# kind -> the package that defines it; wan-dit knows the kinds of its siblings by name only
KINDS = {
    "wan_vaes": "wan-vae",
    "wan_text_encoders": "wan-text",
    "wan_image_encoders": "wan-text",
    "wan_prompt_rewriters": "wan-text",
    "wan_backbones": "wan-dit",
    "wan_schedulers": "wan-dit",
    "wan_attentions": "wan-dit",
    "wan_caches": "wan-dit",
    "wan_models": "wan-dit",
    "wan_objectives": "wan-train",
    "wan_datasets": "wan-train",
}


def hooks(pm: PluginManager) -> list[str]:
    """Every `wan_*` hook that an installed plugin implements or a package defines, known kinds first."""
    found = [name for name in vars(pm.hook) if name.startswith("wan_")]
    return [*(name for name in KINDS if name in found), *sorted(set(found) - set(KINDS))]


def plugin_rows(pm: PluginManager, *, check: bool = False) -> list[dict[str, str]]:
    """One row a part: kind, name, distribution, version, target, status (`ok` or what is wrong).

    check: also import every target, look up the parts of every model and flag hooks whose name is misspelt
    """
    rows = [_row("-", "-", dist, pm.versions.get(dist, ""), "-", _message(error)) for dist, error in pm.broken.items()]
    for kind in hooks(pm):
        offers = discover(kind, pm)
        twice = {name for name, count in Counter(offer.name for offer in offers if offer.spec).items() if count > 1}
        typo = next(iter(difflib.get_close_matches(kind, KINDS, n=1, cutoff=0.8)), "") if check and kind not in KINDS else ""
        for offer in offers:
            status = f"no such hook, did you mean {typo}?" if typo else _status(offer, pm, check)
            if status == "ok" and offer.name in twice:
                status = f"ok, offered twice: say {offer.dist}:{offer.name}"
            rows.append(_row(kind, offer.name or "-", offer.dist, offer.version, getattr(offer.spec, "target", "-"), status))
    return rows


def is_fault(row: dict[str, str]) -> bool:
    """Whether a row of `plugin_rows` reports something that does not work."""
    return not row["status"].startswith("ok")


def describe(offer: Offer) -> dict[str, Any]:
    """Every field of a part, with its kind and origin, ready for JSON."""
    fields = asdict(offer.spec) if is_dataclass(offer.spec) and not isinstance(offer.spec, type) else vars(offer.spec)
    return {
        "kind": offer.kind,
        "distribution": offer.dist,
        "version": offer.version,
        **{key: _plain(value) for key, value in fields.items()},
    }


def short(kind: str, ref: str, pm: PluginManager) -> str:
    """`dist:name` as people say it: the name alone, where no other distribution offers it."""
    dist, _, name = ref.rpartition(":")
    return name if {offer.dist for offer in discover(kind, pm) if offer.spec and offer.name == name} == {dist} else ref


def origin(kind: str, spec: Any, pm: PluginManager) -> tuple[str | None, str | None]:
    """(distribution, version) that offers `spec`; (None, None) for a path, a Hub id or an import string."""
    for offer in discover(kind, pm):
        if offer.spec is not None and offer.spec == spec:
            return offer.dist, offer.version
    return None, None


def _status(offer: Offer, pm: PluginManager, check: bool) -> str:
    if offer.error:
        return _message(offer.error)
    if not check:
        return "ok"
    try:
        if hasattr(offer.spec, "resolve"):
            offer.spec.resolve()
        if offer.kind == "wan_models":
            for part, kind in PART_KINDS.items():
                find(kind, getattr(offer.spec, part), pm, typed=False)
    except (Exception, SystemExit) as error:  # a plugin's module may fail in any way
        return _message(error)
    return "ok"


def _row(kind: str, name: str, dist: str, version: str, target: str, status: str) -> dict[str, str]:
    return {"kind": kind, "name": name, "distribution": dist, "version": version, "target": target, "status": status}


def _message(error: BaseException) -> str:
    return " ".join(f"failed: {type(error).__name__}: {error}".split())


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value

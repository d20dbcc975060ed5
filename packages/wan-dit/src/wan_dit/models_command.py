"""The command `wan-dit models`: what every installed model is made of, how large it is and what its defaults are. Imports no torch."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

from ._shared.cli import show
from .listing import describe, short
from .plugins import PART_KINDS, Offer, PluginManager, discover, find, plugin_manager

KINDS = {**PART_KINDS, "low_noise_backbone": "wan_backbones", "image_encoder": "wan_image_encoders"}
EXPERTS = ("backbone", "low_noise_backbone")
TABLE = ("name", "task", "parameters", "size", "frames", "fps", "steps", "shift", "guidance", "scheduler")


def add_commands(commands: Any, command: Callable[..., argparse.ArgumentParser]) -> None:
    """Add `models` to the subparsers of `wan-dit`; `command(commands, name, function, text)` makes one."""
    command(commands, "models", _models, "the installed models", listing=True)


def _models(args: argparse.Namespace) -> None:
    pm = plugin_manager()
    records = [model_record(offer, pm) for offer in discover("wan_models", pm) if offer.spec]
    show(records if args.json else [_row(record, pm) for record in records], as_json=args.json)


def model_record(offer: Offer, pm: PluginManager) -> dict[str, Any]:
    """Every field of a model, and what its parts tell.

    parameters: of all its backbones, None where one does not tell; experts: how many backbones it has
    hub: part -> where its weights are on the Hub, `org/repo[/path]`; parts that bring them, or are not installed, are not there
    """
    facts, model = describe(offer), offer.spec
    specs = {part: spec for part, kind in KINDS.items() if (spec := _spec(kind, getattr(model, part), pm)) is not None}
    experts = [part for part in EXPERTS if getattr(model, part) is not None]
    counts = [getattr(specs.get(part), "parameters", None) for part in experts]
    sources = {part: getattr(spec, "weights", None) or "" for part, spec in specs.items()}
    return {
        **{name: value for name, value in facts.items() if name not in ("kind", "extra")},
        "size": "x".join(map(str, model.size)),
        "boundary": model.boundary if len(experts) > 1 else None,
        "experts": len(experts),
        "parameters": sum(counts) if None not in counts else None,
        "hub": {part: source.removeprefix("hub:") for part, source in sources.items() if source.startswith("hub:")},
    }


def _spec(kind: str, name: str | None, pm: PluginManager) -> Any:
    """The spec of a part; None where the model has none, or where it is not installed."""
    if name is None:
        return None
    try:
        return find(kind, name, pm, typed=False)
    except LookupError:
        return None


def _row(record: dict[str, Any], pm: PluginManager) -> dict[str, Any]:
    count, experts, guidance = record["parameters"], record["experts"], record["guidance"]
    each = "?" if count is None else f"{count // experts:,}"
    shown = {
        "parameters": f"{'2 x ' if experts > 1 else ''}{each}",
        "guidance": "/".join(f"{scale:g}" for scale in guidance) if isinstance(guidance, list) else f"{guidance:g}",
        "shift": f"{record['shift']:g}",
        "scheduler": short("wan_schedulers", record["scheduler"], pm),
    }
    return {name: shown.get(name, record[name]) for name in TABLE}

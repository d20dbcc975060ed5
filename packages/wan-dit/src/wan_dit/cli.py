"""The command `wan-dit`: generate and replay videos, list models and plugins. Help and listings import no torch."""

from __future__ import annotations

import argparse
import difflib
import json
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from . import __version__, convert_command, generate_command, models_command, plan_command, replay_command
from ._shared.cli import Parser, add_common, run, show
from .listing import describe, hooks, is_fault, plugin_rows
from .lora import lora_command
from .plugins import Offer, discover, find, plugin_manager


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code.

    0; 2 for bad input; 1 where `plugins --check` finds a fault, a replay differs, or on anything unexpected; 130 on Ctrl-C.
    """
    return run(lambda args: args.command(args), _parser(), argv)


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="wan-dit", description="Videos from prompts.", epilog='example: wan-dit generate "a red circle moves left" --seed 1'
    )
    parser.add_argument("--version", action="version", version=f"wan-dit {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    generate_command.add_commands(commands, _command)
    replay_command.add_commands(commands, _command)
    plan_command.add_commands(commands, _command)
    convert_command.add_commands(commands, _command)
    lora_command.add_commands(commands, _command)
    models_command.add_commands(commands, _command)
    plugins = _command(commands, "plugins", _plugins, "every installed part of every kind", listing=True)
    plugins.add_argument("--check", action="store_true", help="import every target, find misspelt hooks; exit code 1 on a fault")
    info = _command(commands, "info", _info, "all facts of a part or a model", listing=True)
    info.add_argument("name", metavar="NAME", help="a name from wan-dit plugins, or a checkpoint of a backbone")
    return parser


def _command(commands: Any, name: str, run_it: Callable[..., Any], text: str, *, listing: bool = False) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(name, help=text, description=f"{text[:1].upper()}{text[1:]}.")
    parser.set_defaults(command=run_it)
    add_common(parser, listing=listing)
    return parser


def _plugins(args: argparse.Namespace) -> int:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what failed stands in the table
        rows = plugin_rows(plugin_manager(), check=args.check)
    show(rows, as_json=args.json)
    return int(args.check and any(map(is_fault, rows)))


def _info(args: argparse.Namespace) -> None:
    pm = plugin_manager()
    offers = [offer for kind in hooks(pm) for offer in discover(kind, pm) if offer.spec]
    found = [offer for offer in offers if args.name in (offer.name, f"{offer.dist}:{offer.name}")]
    if not found and Path(args.name).exists():
        found = [Offer("wan_backbones", args.name, "", "", find("wan_backbones", args.name, pm))]
    if not found:
        names = sorted({offer.name for offer in offers})
        close = difflib.get_close_matches(args.name, names, n=1)
        hint = f"; did you mean '{close[0]}'?" if close else ""
        raise LookupError(f"nothing named '{args.name}' (installed: {', '.join(names) or 'none'}{hint})")
    records = [describe(offer) for offer in found]
    if args.json:
        print(json.dumps(records, indent=2, ensure_ascii=False))
        return
    for i, record in enumerate(records):
        width = max(map(len, record))
        lines = [f"{key:{width}}  {value}" for key, value in record.items() if value not in (None, "", {})]
        print(*([""] if i else []), *lines, sep="\n")

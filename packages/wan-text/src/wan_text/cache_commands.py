"""The commands `wan-text cache ls | verify | prune`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from ._shared.cli import show


def add_cache(commands: Any, command: Any, prompts: Any) -> None:
    """Add them to the parser; `command` makes one, `prompts` reads prompts that are given as text or in .txt files."""
    text = "what is in a context folder, whether it is whole, and mending it"
    parser = commands.add_parser("cache", help=text, description=f"{text.capitalize()}.", epilog="example: wan-text cache verify contexts")
    actions = parser.add_subparsers(required=True, metavar="ACTION")

    listed = command(actions, "ls", _ls, "the prompts of a context folder", "wan-text cache ls contexts --json", listing=True)
    text = "read every context and tell what is damaged or missing; exit code 2 where something is"
    checked = command(actions, "verify", _verify, text, "wan-text cache verify contexts", listing=True)
    text = "remove what is damaged, or left over by writers that were killed"
    pruned = command(actions, "prune", _prune, text, "wan-text cache prune contexts --keep prompts.txt --dry-run", listing=True)
    for each in (listed, checked, pruned):
        each.add_argument("folder", type=Path, help="a context folder, as wan-text encode writes it")
    pruned.add_argument("--keep", nargs="+", metavar="PROMPT", help="remove all prompts but these, or those in .txt files, one a line")
    pruned.add_argument("--dry-run", action="store_true", help="only say what would be removed")
    pruned.set_defaults(prompts=prompts)


def _ls(args: argparse.Namespace) -> None:
    from .cache_check import entries

    show(entries(args.folder), as_json=args.json, empty="no prompt is in it")


def _verify(args: argparse.Namespace) -> int:
    from .cache_check import leftovers, verify

    problems = verify(args.folder)
    left = [] if problems and problems[0].place == "encoder.json" else list(leftovers(args.folder))
    rows = [vars(problem) for problem in problems]
    if args.json or rows:
        show(rows, as_json=args.json)
    if not args.json:
        print(f"{args.folder}: {f'{len(rows)} damaged or missing' if rows else 'whole'}; {len(left)} files left over")
    if rows:
        print("wan-text: mend it with: wan-text cache prune, and encode again what it removes", file=sys.stderr)
    return 2 if rows else 0


def _prune(args: argparse.Namespace) -> None:
    from .cache_check import prune

    pruned = prune(args.folder, None if args.keep is None else args.prompts(args.keep), dry_run=args.dry_run)
    if args.json:
        return show([vars(pruned)], as_json=True)
    verb = "would remove" if args.dry_run else "removed"
    print(f"{args.folder}: {verb} {pruned.lines} prompts and {len(pruned.files)} files of {pruned.bytes} bytes")

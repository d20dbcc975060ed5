"""The command `wan-vae`. Help and listing import no torch."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence

from . import __version__
from ._shared.cli import Parser, run
from .commands import coding, converting, evaluating, listing, planning

COMMANDS = (coding, converting, evaluating, listing, planning)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code (0, 2 for bad input, 1 for anything unexpected, 130 on Ctrl-C)."""
    parser, words = _parser(), sys.argv[1:] if argv is None else argv
    if empty := [word for word in words if re.fullmatch("(--[a-z-]+=)?", word)]:  # an unset variable of a script; as a path it is "."
        parser.error(f"the argument '{empty[0]}' is empty, expected a value")
    return run(lambda args: args.command(args), parser, words)


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="wan-vae",
        description="Film to latents and back, at constant memory.",
        epilog="example: wan-vae encode film.mp4 film.safetensors && wan-vae decode film.safetensors back.mp4",
    )
    parser.add_argument("--version", action="version", version=f"wan-vae {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for module in COMMANDS:
        module.add(commands)
    return parser

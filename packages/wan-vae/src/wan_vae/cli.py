"""The command `wan-vae`. Help and listing import no torch."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from . import __version__
from ._shared.cli import Parser, run
from .commands import coding, converting, evaluating, listing, planning

COMMANDS = (coding, converting, evaluating, listing, planning)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code (0, 2 for bad input, 1 for anything unexpected, 130 on Ctrl-C)."""
    return run(lambda args: args.command(args), _parser(), argv)


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

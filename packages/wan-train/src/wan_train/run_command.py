"""The commands `wan-train run` and `wan-train resume`. Help imports no torch."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from wan_dit._shared.cli import add_common

if TYPE_CHECKING:
    from .config import TrainConfig


def add_commands(commands: Any) -> None:
    """Add `run` and `resume` to the subparsers of `wan-train`."""
    train = commands.add_parser(
        "run", help="run a recipe", description="Run a recipe, e.g. wan-train run tiny-vae steps=100 optimiser.lr=1e-3"
    )
    train.add_argument("recipe", help="a .toml file, or the name of a recipe in the package")
    train.add_argument("overrides", nargs="*", metavar="key=value", help="fields of the recipe to change, with dotted names")
    again = train.add_mutually_exclusive_group()
    again.add_argument("--resume", action="store_true", help="take up the run in the recipe's output folder")
    again.add_argument("--overwrite", action="store_true", help="begin anew over the run in the recipe's output folder")
    train.set_defaults(do=_run)
    resume = commands.add_parser(
        "resume", help="take up a run", description="Take up the run in a folder, with its own settings and those that are changed."
    )
    resume.add_argument("folder", help="the output folder of the run")
    resume.add_argument("overrides", nargs="*", metavar="key=value", help="fields to change, with dotted names")
    resume.set_defaults(do=_resume)
    for parser in (train, resume):
        parser.add_argument("--nproc", metavar="N", type=int, default=1, help="processes on this machine, started by torchrun (default: 1)")
        add_common(parser)


def in_order(words: Sequence[str]) -> list[str]:
    """The words with overrides before flags: argparse reads none after a flag."""
    if words[:1] not in (["run"], ["resume"]):
        return list(words)
    joined: list[str] = []
    for word in words:
        if joined and joined[-1] == "--nproc":
            joined[-1] = f"--nproc={word}"
        else:
            joined.append(word)
    return sorted(joined, key=lambda word: word.startswith("-"))


def _run(args: argparse.Namespace) -> int | None:
    from .config import TrainConfig

    config = TrainConfig.from_toml(args.recipe, args.overrides)
    flags = [f"--{name}" for name in ("resume", "overwrite", "debug") if getattr(args, name)]
    return _start(args, config, ["run", args.recipe, *args.overrides, *flags], resume=args.resume, overwrite=args.overwrite)


def _resume(args: argparse.Namespace) -> int | None:
    from .config import TrainConfig

    config = TrainConfig.of_run(Path(args.folder), args.overrides)
    return _start(args, config, ["resume", args.folder, *args.overrides, *(["--debug"] if args.debug else [])], resume=True)


def _start(args: argparse.Namespace, config: TrainConfig, words: list[str], *, resume: bool = False, overwrite: bool = False) -> int | None:
    if args.nproc < 1:
        raise ValueError(f"--nproc must be at least 1, got {args.nproc}")
    if args.nproc > 1:
        from .launch import launch

        return launch(args.nproc, words)
    from .launch import joined

    with joined(config.device):
        from .trainer import Trainer

        trainer = Trainer(config)
        folder = trainer.run(resume=resume, overwrite=overwrite, progress=sys.stderr.isatty())
        if trainer.layout.is_main:
            print(f"trained parts: {folder}\nlog: {config.output / 'log.jsonl'}\npreviews: {config.output / 'previews'}")
    return None

"""The command wan-train."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from wan_dit._shared.cli import Parser, add_common, run, show

from . import run_command
from .cache_command import add_cache
from .plan_command import add_plan
from .store.export import add_export
from .validate_command import add_validate


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    parser = Parser("wan-train", description="Train and evaluate Wan video models.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    run_command.add_commands(commands)
    evaluate = commands.add_parser(
        "evaluate",
        help="read colour, shape, motion and background from generated clips",
        description="Generate clips of the shapes prompts and read colour, shape, motion and background from their pixels.",
    )
    evaluate.add_argument("--model", default="tiny", help="name of the model (default: tiny)")
    evaluate.add_argument("--backbone", help="in place of the model's: a name, folder or file, such as an export of a run")
    evaluate.add_argument("--text-encoder", help="in place of the model's")
    evaluate.add_argument("--context-embedder", metavar="FILE", help="makes the backbone read that text encoder")
    evaluate.add_argument("--lora", metavar="FILE[:WEIGHT]", action="append", default=[], help="put on the backbone; may be repeated")
    evaluate.add_argument("--vae", help="instead of a model: the PSNR of a VAE, and what is read from its reconstructions")
    evaluate.add_argument("--count", type=int, default=200, help="number of clips, half of them held-out combinations (default: 200)")
    evaluate.add_argument("--seed", type=int, default=0, help="seed of the first clip (default: 0)")
    add_common(evaluate, listing=True)
    evaluate.set_defaults(do=_evaluate)
    add_plan(commands)
    add_validate(commands)
    add_cache(commands)
    add_export(commands)
    listing = commands.add_parser("list", help="list recipes, objectives and data sets")
    add_common(listing, listing=True)
    listing.set_defaults(do=_list)
    words = run_command.in_order(sys.argv[1:] if argv is None else argv)
    return run(lambda args: args.do(args), parser, words)


def _evaluate(args: argparse.Namespace) -> None:
    from wan_dit.lora import parse_lora
    from wan_dit.setup import BackboneSetup

    from .evaluation.generated import evaluate_model, evaluate_vae

    if args.vae:
        if args.backbone or args.text_encoder or args.context_embedder or args.lora:
            raise ValueError("--vae measures a VAE alone: leave out --backbone, --text-encoder, --context-embedder and --lora")
        show(evaluate_vae(args.vae, args.count), as_json=args.json)
        return
    setup = BackboneSetup(loras=[parse_lora(text) for text in args.lora], context_embedder=args.context_embedder)
    parts = {"backbone": args.backbone, "text_encoder": args.text_encoder}
    given = {part: ref for part, ref in parts.items() if ref is not None}
    show(evaluate_model(args.model, args.count, args.seed, setup=setup, **given), as_json=args.json)


def _list(args: argparse.Namespace) -> None:
    from importlib.resources import files

    from .plugins import discover, plugin_manager

    pm = plugin_manager()
    rows = [
        {
            "kind": kind.removeprefix("wan_"),
            "name": offer.name,
            "from": offer.dist,
            "summary": getattr(offer.spec, "summary", str(offer.error)),
        }
        for kind in ("wan_objectives", "wan_datasets")
        for offer in discover(kind, pm)
    ]
    recipes = sorted(file.name.removesuffix(".toml") for file in (files("wan_train") / "recipes").iterdir() if file.name.endswith(".toml"))
    rows += [{"kind": "recipes", "name": name, "from": "wan-train", "summary": ""} for name in recipes]
    show(rows, as_json=args.json)

"""The command `wan-dit`: generate and replay videos, list models and plugins. Help and listings import no torch."""

from __future__ import annotations

import argparse
import difflib
import json
import re
import shlex
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import __version__, convert_command
from ._shared.cli import Parser, add_common, run, show
from .listing import describe, hooks, is_fault, plugin_rows, short
from .lora import lora_command
from .plugins import PART_KINDS, Offer, PluginManager, discover, find, plugin_manager

if TYPE_CHECKING:
    from .manifest import Part
    from .pipeline import Pipeline, Result

MODEL = "wan-dit:tiny"
PARTS = {"vae": "VAE", "text_encoder": "text encoder", "backbone": "backbone", "scheduler": "scheduler"}
SETTINGS = ("negative_prompt", "steps", "shift", "guidance", "seed", "frames")


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

    generate = _command(commands, "generate", _generate, "make a video from a prompt")
    generate.add_argument("prompt", nargs="+", metavar="PROMPT", help="what the video shows")
    generate.add_argument(
        "--output", metavar="PATH", help="FILE.mp4, or a folder to name it in (default: outputs); .png and .json go beside it"
    )
    generate.add_argument("--overwrite", action="store_true", help="replace files that exist")
    settings = generate.add_argument_group("settings", "The defaults are the model's.")
    settings.add_argument("--model", metavar="NAME", default=MODEL, help="see wan-dit models (default: the built-in tiny)")
    settings.add_argument("--negative-prompt", metavar="TEXT", help="what the video should not show")
    settings.add_argument("--steps", metavar="N", type=int, help="denoising steps")
    settings.add_argument("--shift", metavar="X", type=float, help="how far the noise schedule leans to noise")
    settings.add_argument("--guidance", metavar="X", type=float, help="how strongly the prompt is followed; 1 is off and twice as fast")
    settings.add_argument("--seed", metavar="N", type=int, default=0, help="same seed, same video (default: 0)")
    settings.add_argument("--frames", metavar="N", type=int, help="number of frames")
    settings.add_argument("--size", metavar="WxH", help="width and height in pixels, such as 64x64")
    _add_parts(generate, "the model's own", dtype="fp32 on a CPU", device="the best there is")

    replay = _command(commands, "replay", _replay, "run a manifest again and compare the frames")
    replay.add_argument("manifest", metavar="RUN.json", help="a .json file that generate wrote")
    _add_parts(replay, "those of the run", dtype="that of the run", device="that of the run")

    convert_command.add_commands(commands, _command)
    lora_command.add_commands(commands, _command)
    _command(commands, "models", _models, "the installed models", listing=True)
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


def _add_parts(parser: argparse.ArgumentParser, instead_of: str, *, dtype: str, device: str) -> None:
    parts = parser.add_argument_group("parts", f"In place of {instead_of}: a name from wan-dit plugins, a path, a Hub id or module:attr.")
    for part, label in PARTS.items():
        parts.add_argument(f"--{part.replace('_', '-')}", metavar="PART", help=f"another {label}")
    parts.add_argument("--context", metavar="DIR", help="a folder that wan-text encode wrote, in place of a text encoder")
    parts.add_argument("--dtype", choices=("fp32", "bf16", "fp16"), help=f"type of the weights (default: {dtype})")
    parts.add_argument("--device", metavar="NAME", help=f"cpu, cuda, cuda:1, mps (default: {device})")


def _generate(args: argparse.Namespace) -> None:
    from . import outputs

    prompt = " ".join(args.prompt)
    outputs.check(_output(args, prompt), overwrite=args.overwrite)
    size = _size(args.size)

    from ._shared.weights import best_device
    from .pipeline import Pipeline
    from .progress import progress

    parts = {part: getattr(args, part) for part in (*PARTS, "context")}
    pipe = Pipeline(args.model, **parts, dtype=args.dtype, device=args.device or best_device())
    with progress() as on_event:
        result = pipe(prompt, on_event=on_event, size=size, **{name: getattr(args, name) for name in SETTINGS})
    # named again: another run may have taken the name meanwhile
    _report(args.model, pipe, result, result.save(_output(args, prompt), overwrite=args.overwrite))


def _report(model: str, pipe: Pipeline, result: Result, files: list[Path]) -> None:
    frames, (width, height) = result.manifest["frames"], result.manifest["size"]
    facts = (f"video: {frames} frames of {width}x{height}, {result.fps} a second", "contact sheet of the frames", "run manifest")
    longest = max(len(str(file)) for file in files)
    for file, fact in zip(files, facts, strict=True):
        print(f"{file!s:{longest}}  {fact}")
    print("took: " + ", ".join(f"{phase} {seconds:.2f} s" for phase, seconds in result.timings.items()))
    again = "a blue star moves up on a white background" if pipe.model.extra.get("words") else result.manifest["prompt"]
    option = "" if model == MODEL else f" --model {shlex.quote(model)}"
    print(f"try next: wan-dit generate {shlex.quote(again)}{option} --seed {result.seed + 1}")
    print(f"          wan-dit replay {shlex.quote(str(files[-1]))}")
    print("          wan-dit plugins")


def _replay(args: argparse.Namespace) -> int:
    from . import manifest

    record, pm = manifest.read(args.manifest), plugin_manager()

    import torch

    from ._shared.weights import best_device, usable_device
    from .pipeline import Pipeline
    from .progress import progress

    given = {part: getattr(args, part) for part in (*PARTS, "context")}
    if given["context"] is None and given["text_encoder"] is None and record.context is not None:
        raise ValueError(f"the run read context folder '{record.context}', which a manifest cannot open: give it again with --context")
    for part, kind in PART_KINDS.items():
        if given[part] is None and not (part == "text_encoder" and given["context"]):
            given[part] = _recorded(kind, part, getattr(record.parts, part), pm)
    dtype = args.dtype or (getattr(torch, record.dtype) if record.dtype else None)
    try:
        device = usable_device(args.device or record.device)
    except ValueError as error:
        raise ValueError(f"{error}; replay with --device {best_device()}") from error
    pipe = Pipeline(_recorded("wan_models", "model", record.model, pm), **given, dtype=dtype, device=device, pm=pm)
    with progress() as on_event:
        result = pipe(record.prompt, on_event=on_event, size=record.size, **{name: getattr(record, name) for name in SETTINGS})
    again = manifest.Manifest(**result.manifest)
    if again.frames_sha256 == record.frames_sha256:
        print(f"identical: {record.frames} frames, sha256 {record.frames_sha256}")
        return 0
    print(f"different from '{args.manifest}':", *manifest.differences(record, again), sep="\n  ")
    return 1


def _recorded(kind: str, part: str, record: Part, pm: PluginManager) -> Any:
    """The part that a manifest names; anything but an installed part has to be named again by the person who replays."""
    if record.dist is None and not re.fullmatch(r"[\w.]+:[\w.]+", record.name):
        option = part.replace("_", "-")
        raise ValueError(f"the run used {part.replace('_', ' ')} '{record.name}', which no package offers: give it again with --{option}")
    return find(kind, f"{record.dist}:{record.name}" if record.dist else record.name, pm, typed=False)


def _models(args: argparse.Namespace) -> None:
    columns = ("name", "backbone", "vae", "text_encoder", "scheduler", "steps", "size", "frames", "summary")
    rows, pm = [], plugin_manager()
    for offer in discover("wan_models", pm):
        if offer.spec:
            facts = {**describe(offer), "size": "x".join(map(str, offer.spec.size))}
            if not args.json:
                facts |= {part: short(kind, facts[part], pm) for part, kind in PART_KINDS.items()}
            rows.append({column: facts[column] for column in columns})
    show(rows, as_json=args.json)


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


def _output(args: argparse.Namespace, prompt: str) -> Path:
    from .outputs import free_name

    given = Path(args.output or "outputs")
    if args.output and given.suffix and not given.is_dir() and not args.output.endswith("/"):
        return given
    return free_name(given, prompt, args.seed, overwrite=args.overwrite)


def _size(text: str | None) -> tuple[int, int] | None:
    if text is None:
        return None
    if not (match := re.fullmatch(r"(\d+)[xX×](\d+)", text)):
        raise ValueError(f"size '{text}' is not WIDTHxHEIGHT, such as 64x64")
    return int(match[1]), int(match[2])

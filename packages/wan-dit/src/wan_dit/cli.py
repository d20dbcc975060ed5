"""The command `wan-dit`: generate and replay videos, list models and plugins. Help and listings import no torch."""

from __future__ import annotations

import argparse
import difflib
import json
import re
import shlex
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from . import __version__
from ._shared.cli import add_common, run, show
from .listing import describe, hooks, is_fault, plugin_rows
from .plugins import Offer, PluginManager, discover, find, plugin_manager

if TYPE_CHECKING:
    from .events import Event
    from .manifest import Part
    from .pipeline import Pipeline, Result

PARTS = {"vae": "VAE", "text_encoder": "text encoder", "backbone": "backbone", "scheduler": "scheduler"}
SETTINGS = ("negative_prompt", "steps", "shift", "guidance", "seed", "frames")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code.

    0; 2 for bad input; 1 where `plugins --check` finds a fault, a replay differs, or on anything unexpected; 130 on Ctrl-C.
    """
    return run(lambda args: args.command(args), _parser(), argv)


class _Parser(argparse.ArgumentParser):
    """argparse whose errors are one line, like all others."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"wan-dit: error: {message} (see {self.prog} --help)\n")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="wan-dit", description="Videos from prompts.", epilog='example: wan-dit generate "a red circle moves left" --seed 1'
    )
    parser.add_argument("--version", action="version", version=f"wan-dit {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    generate = _command(commands, "generate", _generate, "make a video from a prompt")
    generate.add_argument("prompt", nargs="+", help="what the video shows")
    generate.add_argument("--model", default="tiny", help="name of a model, see wan-dit models (default: the built-in tiny)")
    generate.add_argument("--negative-prompt", help="what it should not show (default: the model's)")
    generate.add_argument("--steps", type=int, help="denoising steps (default: the model's)")
    generate.add_argument("--shift", type=float, help="how far the noise schedule leans to noise (default: the model's)")
    generate.add_argument("--guidance", type=float, help="how strongly the prompt is followed; 1 is off and twice as fast")
    generate.add_argument("--seed", type=int, default=0, help="same seed, same video (default: 0)")
    generate.add_argument("--frames", type=int, help="number of frames (default: the model's)")
    generate.add_argument("--size", metavar="WxH", help="width and height in pixels, such as 64x64 (default: the model's)")
    _add_parts(generate)
    generate.add_argument("--output", help="FILE.mp4, or a folder to name the file in (default: outputs)")

    replay = _command(commands, "replay", _replay, "run a manifest again and compare the frames")
    replay.add_argument("manifest", help="a .json file that generate wrote")
    _add_parts(replay)

    _command(commands, "models", _models, "the installed models", listing=True)
    plugins = _command(commands, "plugins", _plugins, "every installed part of every kind", listing=True)
    plugins.add_argument("--check", action="store_true", help="import every target, find misspelt hooks; exit code 1 on a fault")
    info = _command(commands, "info", _info, "all facts of a part or a model", listing=True)
    info.add_argument("name", help="a name from wan-dit plugins, or a checkpoint of a backbone")
    return parser


def _command(commands: Any, name: str, run_it: Callable[..., Any], text: str, *, listing: bool = False) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(name, help=text, description=f"{text.capitalize()}.")
    parser.set_defaults(command=run_it)
    add_common(parser, listing=listing)
    return parser


def _add_parts(parser: argparse.ArgumentParser) -> None:
    for part, label in PARTS.items():
        parser.add_argument(f"--{part.replace('_', '-')}", help=f"another {label}: name, path, Hub id or module:attr")
    parser.add_argument("--context", metavar="DIR", help="a folder that wan-text encode wrote, in place of a text encoder")
    parser.add_argument("--dtype", choices=("fp32", "bf16", "fp16"), help="type of the weights (default: fp32 on a CPU)")
    parser.add_argument("--device", help="cpu, cuda, cuda:1, mps (default: the best there is)")


def _generate(args: argparse.Namespace) -> None:
    from .media import require_writable

    prompt = " ".join(args.prompt)
    output = _output(args.output, prompt, args.seed)
    require_writable(output)
    size = _size(args.size)

    from ._shared.weights import best_device
    from .pipeline import Pipeline

    parts = {part: getattr(args, part) for part in (*PARTS, "context")}
    pipe = Pipeline(args.model, **parts, dtype=args.dtype, device=args.device or best_device())
    with _progress() as on_event:
        result = pipe(prompt, on_event=on_event, size=size, **{name: getattr(args, name) for name in SETTINGS})
    _report(pipe, result, result.save(output))


def _report(pipe: Pipeline, result: Result, files: list[Path]) -> None:
    frames, (width, height) = result.manifest["frames"], result.manifest["size"]
    facts = (f"video: {frames} frames of {width}x{height}, {result.fps} a second", "contact sheet of the frames", "run manifest")
    longest = max(len(str(file)) for file in files)
    for file, fact in zip(files, facts, strict=True):
        print(f"{file!s:{longest}}  {fact}")
    print("took: " + ", ".join(f"{phase} {seconds:.2f} s" for phase, seconds in result.timings.items()))
    again = "a blue star moves up on a white background" if pipe.model.extra.get("words") else result.manifest["prompt"]
    model = "" if pipe.model.name == "tiny" else f" --model {pipe.model.name}"
    print(f"try next: wan-dit generate {shlex.quote(again)}{model} --seed {result.seed + 1}")
    print(f"          wan-dit replay {files[-1]}")
    print("          wan-dit plugins")


def _replay(args: argparse.Namespace) -> int:
    from . import manifest

    record, pm = manifest.read(args.manifest), plugin_manager()

    import torch

    from .pipeline import KINDS, Pipeline

    given = {part: getattr(args, part) for part in (*PARTS, "context")}
    if given["context"] is None and given["text_encoder"] is None and record.context is not None:
        raise ValueError(f"the run read context folder '{record.context}', which a manifest cannot open: give it again with --context")
    for part, kind in KINDS.items():
        if given[part] is None and not (part == "text_encoder" and given["context"]):
            given[part] = _recorded(kind, part, record.parts[part], pm)
    dtype = args.dtype or (getattr(torch, record.dtype) if record.dtype else None)
    pipe = Pipeline(_recorded("wan_models", "model", record.model, pm), **given, dtype=dtype, device=args.device or record.device, pm=pm)
    with _progress() as on_event:
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
    rows = []
    for offer in discover("wan_models", plugin_manager()):
        if offer.spec:
            facts = {**describe(offer), "size": "x".join(map(str, offer.spec.size))}
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


def _output(given: str | None, prompt: str, seed: int) -> Path:
    path = Path(given or "outputs")
    if given and not path.is_dir() and path.suffix:
        return path
    slug = re.sub(r"[^\w]+", "-", prompt.lower()).strip("-")[:60].strip("-") or "video"
    return path / f"{slug}-{seed}.mp4"


def _size(text: str | None) -> tuple[int, int] | None:
    if text is None:
        return None
    if not (match := re.fullmatch(r"(\d+)[xX×](\d+)", text)):
        raise ValueError(f"size '{text}' is not WIDTHxHEIGHT, such as 64x64")
    return int(match[1]), int(match[2])


@contextmanager
def _progress() -> Iterator[Callable[[Event], None]]:
    """A progress bar on stderr that follows the events; it appears with the first one."""
    from tqdm import tqdm

    from .events import Decoding, Done, Encoding, Loading, Step

    bars: list[Any] = []

    def follow(event: Event) -> None:
        if not bars:
            bars.append(tqdm(bar_format="{desc:<32}{bar:24} {n_fmt}/{total_fmt} {elapsed}"))
        bar = bars[0]
        match event:
            case Loading(part, name):
                bar.set_description_str(f"loading {part.replace('_', ' ')} {name}")
            case Encoding():
                bar.set_description_str("encoding")
            case Step(i, n):
                bar.total = n
                bar.set_description_str("denoising", refresh=False)
                bar.update(i - bar.n)
            case Decoding():
                bar.set_description_str("decoding")
            case Done():
                bar.set_description_str("done")

    try:
        yield follow
    finally:
        for bar in bars:
            bar.close()

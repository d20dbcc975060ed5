"""The command `wan-dit generate`. Help imports no torch."""

from __future__ import annotations

import argparse
import re
import shlex
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import outputs
from .run_options import MODEL, PARTS, add_parts, add_run, add_size_options, build_setup, parse_guidance, parse_size

if TYPE_CHECKING:
    from .events import Event
    from .pipeline import Pipeline
    from .result import Result
    from .state import RunState

SETTINGS = ("negative_prompt", "steps", "shift", "seed", "frames")
INPUTS = ("image", "last_image", "video", "mask", "vace_scale", "outpaint", "overlap")
OUTPUT_HELP = f"{outputs.HELP}, or a folder to name it in (default: outputs); .png and .json go beside it"
SAVE_EVERY = 60.0  # seconds between two states of a long run on disk


def add_commands(commands: Any, command: Callable[..., argparse.ArgumentParser]) -> None:
    """Add `generate` to the subparsers of `wan-dit`; `command(commands, name, function, text)` makes one."""
    parser = command(commands, "generate", _generate, "make a video from a prompt")
    parser.add_argument("prompt", nargs="*", metavar="PROMPT", help="what the video shows")
    parser.add_argument("--prompts", metavar="FILE", help="many prompts, one a line; in a .jsonl file with settings of their own")
    parser.add_argument("--output", metavar="PATH", help=OUTPUT_HELP)
    parser.add_argument("--overwrite", action="store_true", help="replace files that exist")
    parser.add_argument("--preview", metavar="FILE.png", help="a rough picture of the frames, written anew after every step")
    inputs = parser.add_argument_group("inputs", "What the model is given besides text; which it takes: wan-dit models.")
    inputs.add_argument("--image", metavar="FILE", help="the first frame")
    inputs.add_argument("--last-image", metavar="FILE", help="the last frame")
    inputs.add_argument("--video", metavar="FILE", help="a video to continue; VACE: to edit or to follow; also a folder of frames")
    inputs.add_argument("--overlap", metavar="N", type=int, help="frames of the video that its continuation begins with (default: 5)")
    inputs.add_argument("--mask", metavar="FILE", help="VACE: what of the video is made anew (white); a video, frames or one picture")
    inputs.add_argument("--outpaint", action="store_true", help="VACE: show the video whole, and make what is around it")
    inputs.add_argument("--reference", metavar="FILE", action="append", default=[], help="VACE: a picture of what appears; may be repeated")
    inputs.add_argument("--vace-scale", metavar="X", type=float, help="VACE: strength of its hints (default: 1)")
    settings = parser.add_argument_group("settings", "The defaults are the model's.")
    settings.add_argument("--model", metavar="MODEL", default=MODEL, help="a name (wan-dit models), a folder or a Hub id (default: tiny)")
    settings.add_argument("--preset", metavar="NAME", help="the model whose settings a folder is used with, where it does not tell")
    settings.add_argument("--negative", "--negative-prompt", dest="negative_prompt", metavar="TEXT", help="what it should not show")
    settings.add_argument("--steps", metavar="N", type=int, help="denoising steps")
    settings.add_argument("--shift", metavar="X", type=float, help="how far the noise schedule leans to noise")
    settings.add_argument("--guidance", metavar="X", help="how strongly the prompt is followed; 1 is off; LOW,HIGH for two experts")
    settings.add_argument("--seed", metavar="N", type=int, default=0, help="same seed, same video (default: 0)")
    add_size_options(settings)
    add_parts(parser, "the model's own", dtype="fp32 on a CPU", device="the best there is")
    add_run(parser)


def _generate(args: argparse.Namespace) -> None:
    lines = _lines(args)
    if given := _given_file(args):
        state = _state_path(outputs.check(given, overwrite=args.overwrite))
        if state.exists() and not args.overwrite:
            raise FileExistsError(f"'{state}' is of a run that was stopped: go on with wan-dit resume, or replace it with --overwrite")

    if args.preview:
        outputs.check_preview(args.preview)

    from ._shared.weights import best_device
    from .pipeline import Pipeline
    from .tasks.record import task_of

    parts = {part: getattr(args, part) for part in (*PARTS, "context")}
    with ExitStack() as stack:
        setup = build_setup(args, stack)
        pipe = Pipeline(
            args.model, **parts, preset=args.preset, dtype=args.dtype, device=args.device or best_device(), compat=args.compat, setup=setup
        )
        for note in pipe.notes:
            print(f"wan-dit: {note}", file=sys.stderr)
        vace = bool(getattr(pipe.specs["backbone"], "vace", False))
        task = task_of(vace=vace, references=tuple(args.reference), **{name: getattr(args, name) for name in INPUTS})
        runs = [{"task": task, "cache": args.cache, **line} for line in lines]
        for i, line in enumerate(runs, 1):  # checks all of them, before the first is run
            try:
                pipe.stream(**line)
            except ValueError as error:
                raise ValueError(f"prompt {i} of '{args.prompts}': {error}" if args.prompts else str(error)) from error
        if given and outputs.is_image(given) and (frames := _frames(pipe, runs[0])) > 1:
            raise ValueError(f"'{given}' is one image, and the video has {frames} frames: give another name, or --frames 1")
        for line in runs:
            _run(pipe, args, line, main=setup.is_main)


def _run(pipe: Pipeline, args: argparse.Namespace, line: dict[str, Any], *, main: bool) -> None:
    if not main:
        pipe(**line)
        if args.cache and args.cache_error:
            pipe(**{**line, "cache": None})
        return
    suffix = ".png" if _frames(pipe, line) == 1 else ".mp4"
    target = _output(args, line, suffix)
    with kept(_state_path(outputs.targets(target)), target, args) as keep:
        result = follow(pipe, line, keep, previewer(pipe, args.preview))
        if args.cache and args.cache_error:
            exact = follow(pipe, {**line, "cache": None})
            error = float((result.video - exact.video).norm() / exact.video.norm())
            result.manifest["cache"] |= {"error": error, "uncached_seconds": exact.timings["denoise"]}
        # named again: another run may have taken the name meanwhile
        files = result.save(_output(args, line, suffix), overwrite=args.overwrite)
    report(args, pipe, result, files)


def follow(pipe: Pipeline, settings: dict[str, Any], *consumers: Callable[[Event], None]) -> Result:
    """Run with a progress bar, and hand every event to all consumers."""
    from .progress import progress

    with progress() as on_event:

        def follow_all(event: Event) -> None:
            for consume in (*consumers, on_event):
                consume(event)

        return pipe(**settings, on_event=follow_all)


@contextmanager
def kept(path: Path, output: Path, args: argparse.Namespace) -> Iterator[Callable[[Event], None]]:
    """Keeps the state of a run at `path`: once a minute, and where it is interrupted or has no room; a run that ends well leaves none.

    output, args: what to make and by what, which a command that goes on has to say again
    """
    last: RunState | None = None
    saved = time.monotonic()

    def keep(event: Event) -> None:
        nonlocal last, saved
        last = getattr(event, "state", None) or last
        if last is not None and time.monotonic() - saved > SAVE_EVERY:
            last.save(path)
            saved = time.monotonic()

    try:
        yield keep
    except (KeyboardInterrupt, SystemExit, OSError, MemoryError, RuntimeError):  # torch says RuntimeError where a GPU has no room
        if last is not None:
            with suppress(OSError):  # a full disk may take no state either
                last.save(path)
                again = shlex.join(["wan-dit", "resume", str(path), *_again(output, args)])
                print(f"wan-dit: stopped after {last.steps_done} evaluations; go on with: {again}", file=sys.stderr)
        raise
    path.unlink(missing_ok=True)


def _again(output: Path, args: argparse.Namespace) -> list[str]:
    """Options by which `resume` makes the same file of the same parts."""
    return ["--output", str(output), *(["--overwrite"] if args.overwrite else []), *_parts_again(args)]


def _parts_again(args: argparse.Namespace) -> list[str]:
    """The options that named the model and its parts."""
    given = {name: getattr(args, name) for name in ("model", *PARTS, "context")}
    return [word for name, value in given.items() if value not in (None, MODEL) for word in (f"--{name.replace('_', '-')}", value)]


def previewer(pipe: Pipeline, path: str | None) -> Callable[[Event], None]:
    """Writes a rough picture after every step, where a path is given."""

    def show(event: Event) -> None:
        if path is not None and (denoised := getattr(event, "denoised", None)) is not None:
            from .previews import save_preview

            save_preview(pipe.preview(denoised), path)

    return show


def report(args: argparse.Namespace, pipe: Pipeline, result: Result, files: list[Path]) -> None:
    """What was written, how long it took, and what to try next with the parts that `args` name."""
    frames, (width, height) = result.manifest["frames"], result.manifest["size"]
    facts = ["run manifest"]
    if len(files) == 2:
        facts = [f"image of {width}x{height}", *facts]
    else:
        facts = [f"video: {frames} frames of {width}x{height}, {result.fps} a second", "contact sheet of the frames", *facts]
    longest = max(len(str(file)) for file in files)
    for file, fact in zip(files, facts, strict=True):
        print(f"{file!s:{longest}}  {fact}")
    print("took: " + ", ".join(f"{phase} {seconds:.2f} s" for phase, seconds in result.timings.items()))
    if cached := result.manifest["cache"]:
        print(f"cache: {cached['skipped']} of {cached['evaluations']} evaluations skipped ({cached['skips']})" + _cache_error(cached))
    again = "a blue star moves up on a white background" if pipe.model.extra.get("words") else result.manifest["prompt"]
    task, options = result.manifest["task"], _parts_again(args)
    if args.model is None and (name := result.manifest["model"]["name"]) != MODEL.partition(":")[2]:
        options += ["--model", name]
    for name, source in task["inputs"].items():
        options += [f"--{re.sub('_[0-9]+$', '', name).replace('_', '-')}", str(source["path"])]
    options += ["--outpaint"] if task["settings"].get("outpaint") else []
    print(f"try next: wan-dit generate {shlex.join([again, *options, '--seed', str(result.seed + 1)])}")
    print(f"          wan-dit replay {shlex.join([str(files[-1]), *_parts_again(args)])}")
    print("          wan-dit plugins")


def _cache_error(cached: dict[str, Any]) -> str:
    if "error" not in cached:
        return ""
    return f"; the video is off by {cached['error']:.2%} (relative L2) from the uncached one, which took {cached['uncached_seconds']:.2f} s"


def _lines(args: argparse.Namespace) -> list[dict[str, Any]]:
    """The settings of every run."""
    own = {name: getattr(args, name) for name in SETTINGS} | {"guidance": parse_guidance(args.guidance), "size": parse_size(args.size)}
    if bool(args.prompt) == bool(args.prompts):
        raise ValueError("give a prompt, such as 'a red circle moves left'" if not args.prompt else "give a prompt or --prompts, not both")
    if args.prompt:
        return [{"prompt": " ".join(args.prompt), **own}]
    if args.output and Path(args.output).suffix:
        raise ValueError(f"--prompts makes many videos: give a folder as --output, not '{args.output}'")
    from .prompts import read_prompts

    return [{**own, **line} for line in read_prompts(Path(args.prompts))]


def _state_path(files: tuple[Path, ...]) -> Path:
    """Beside the files of a run."""
    return files[-1].with_suffix(".state")


def _given_file(args: argparse.Namespace) -> Path | None:
    """The output, where it is a file and not a folder."""
    given = Path(args.output or "")
    return given if args.output and given.suffix and not given.is_dir() and not args.output.endswith("/") else None


def _output(args: argparse.Namespace, line: dict[str, Any], suffix: str) -> Path:
    return _given_file(args) or outputs.free_name(
        Path(args.output or "outputs"), line["prompt"], line["seed"], suffix, overwrite=args.overwrite
    )


def _frames(pipe: Pipeline, line: dict[str, Any]) -> int:
    return pipe.settings(**{name: value for name, value in line.items() if name != "cache"}).frames

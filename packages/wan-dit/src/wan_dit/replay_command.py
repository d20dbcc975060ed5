"""The commands `wan-dit replay` and `wan-dit resume`: recorded runs, again or on from where they stopped. Help imports no torch."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .plugins import PluginManager, find, plugin_manager
from .run_options import PARTS, add_parts

if TYPE_CHECKING:
    from .manifest import Part, Run
    from .pipeline import Pipeline

SETTINGS = ("prompt", "negative_prompt", "steps", "shift", "guidance", "seed", "frames", "size")


def add_commands(commands: Any, command: Callable[..., argparse.ArgumentParser]) -> None:
    """Add `replay` and `resume` to the subparsers of `wan-dit`; `command(commands, name, function, text)` makes one."""
    replay = command(commands, "replay", _replay, "run a manifest again and compare the frames")
    replay.add_argument("manifest", metavar="RUN.json", help="a .json file that generate wrote")
    resume = command(commands, "resume", _resume, "go on with a run that was stopped, to the same bits")
    resume.add_argument("state", metavar="RUN.state", help="a file that generate left where it was stopped")
    resume.add_argument("--output", metavar="PATH", help="as of generate (default: beside the state)")
    resume.add_argument("--overwrite", action="store_true", help="replace files that exist")
    for parser in (replay, resume):
        parser.add_argument("--model", metavar="MODEL", help="the model again, where it was a folder or a Hub id")
        add_parts(parser, "those of the run", dtype="that of the run", device="that of the run")


def _replay(args: argparse.Namespace) -> int:
    from . import manifest
    from .generate_command import follow

    record = manifest.read(args.manifest)
    pipe, settings = _again(record, args)
    again = manifest.Manifest(**follow(pipe, settings).manifest)
    if again.frames_sha256 == record.frames_sha256:
        print(f"identical: {record.frames} frames, sha256 {record.frames_sha256}")
        return 0
    print(f"different from '{args.manifest}':", *manifest.differences(record, again), sep="\n  ")
    return 1


def _resume(args: argparse.Namespace) -> None:
    from . import outputs
    from .generate_command import follow, kept, report
    from .state import RunState

    path = Path(args.state)
    state = RunState.load(path)
    target = Path(args.output) if args.output else path.with_suffix(".png" if state.run.frames == 1 else ".mp4")
    outputs.check(target, overwrite=args.overwrite)
    pipe, settings = _again(state.run, args)
    with kept(path, target, args) as keep:
        result = follow(pipe, {**settings, "resume": state}, keep)
        files = result.save(target, overwrite=args.overwrite)
    report(args, pipe, result, files)


def _again(record: Run, args: argparse.Namespace) -> tuple[Pipeline, dict[str, Any]]:
    """The pipeline of a record, and the settings of its run; ValueError that says what has to be given again."""
    pm = plugin_manager()
    given = {part: getattr(args, part) for part in (*PARTS, "context")}
    if given["context"] is None and given["text_encoder"] is None and record.context is not None:
        raise ValueError(f"the run read context folder '{record.context}', which a manifest cannot open: give it again with --context")
    if args.model is None:
        for part in PARTS:
            used = getattr(record.parts, part)
            if given[part] is None and used is not None and not (part == "text_encoder" and given["context"]):
                given[part] = _recorded(part, used, pm)

    import torch

    from ._shared.weights import best_device, usable_device
    from .find_model import is_installed
    from .pipeline import Pipeline
    from .setup import BackboneSetup
    from .tasks.record import from_record

    try:
        device = usable_device(args.device or record.device)
    except ValueError as error:
        raise ValueError(f"{error}; replay with --device {best_device()}") from error
    dtype = args.dtype or (getattr(torch, record.dtype) if record.dtype else None)
    model = args.model or _recorded("model", record.model, pm)
    preset = record.model.name if args.model and not is_installed(args.model, pm) else None
    pipe = Pipeline(
        model, **given, preset=preset, dtype=dtype, device=device, compat=record.options.compat or "fixed", pm=pm,
        setup=BackboneSetup.from_record(record.loras, record.options),
    )  # fmt: skip
    settings = {name: getattr(record, name) for name in SETTINGS}
    return pipe, {**settings, "task": from_record(record.task.model_dump()), "cache": record.options.cache}


def _recorded(part: str, record: Part, pm: PluginManager) -> Any:
    """The part that a record names; anything but an installed part has to be named again by the person who replays."""
    from .parts import KINDS

    kind = KINDS.get(part, "wan_models")
    if record.dist is None and not re.fullmatch(r"[\w.]+:[\w.]+", record.name):
        what, options = part.replace("_", " "), f"--{part.replace('_', '-')}" + (" or --model" if part == "backbone" else "")
        raise ValueError(f"the run used {what} '{record.name}', which no package offers: give it again with {options}")
    return find(kind, f"{record.dist}:{record.name}" if record.dist else record.name, pm, typed=False)

"""The command `wan-train validate`: what a run will see of each file of a data folder or tar, and all that is wrong with it."""

from __future__ import annotations

import argparse
import json
from collections import Counter
from dataclasses import asdict
from itertools import groupby
from typing import TYPE_CHECKING, Any

from wan_dit._shared.cli import add_common, show

from .data_source import add_source, buckets, source

if TYPE_CHECKING:
    from .data.buckets import Buckets
    from .data.folder import FolderSettings
    from .data.scan import Clip, Problem


def add_validate(commands: Any) -> None:
    """Add `validate` to the subparsers of `wan-train`."""
    parser = commands.add_parser(
        "validate",
        help="check a recipe and its data folder, before anything is trained",
        description="Tell what a run will see of each file, and every problem; exit code 2 where there is one.",
    )
    add_source(parser)
    parser.add_argument("--decode", action="store_true", help="decode all frames, which finds damage within films")
    add_common(parser, listing=True)
    parser.set_defaults(do=_validate)


def _validate(args: argparse.Namespace) -> int:
    given = source(args.source, args.overrides)
    from .config import read_settings
    from .data.folder import Folder

    target = given.target()
    if not (isinstance(target, type) and issubclass(target, Folder)):
        show([{"data set": given.dataset, "samples": len(given.open())}], as_json=args.json)
        return 0
    settings = read_settings(target.settings_type, given.settings, f"data set '{given.dataset}'")
    found, shapes = settings.scan(), buckets(args, settings.frames)
    problems, good = list(found.problems), []
    for clip in found.clips:
        wrong = _problem(clip, shapes, settings, decode=args.decode)
        if wrong:
            problems.append(wrong)
        else:
            good.append(clip)
    rows = [_row(list(clips), shapes, settings) for _, clips in groupby(good, key=lambda clip: clip.file)]
    _report(rows, len(good), sorted(problems, key=lambda problem: problem.file), as_json=args.json)
    return 2 if problems else 0


def _problem(clip: Clip, shapes: Buckets | None, settings: FolderSettings, *, decode: bool) -> Problem | None:
    """What is wrong with a sample beyond what a scan finds: no bucket takes it, or its frames do not decode."""
    from .data import film
    from .data.scan import Problem, file_name

    name, media = file_name(clip.file, settings.path), clip.media.film
    try:
        if shapes:
            shapes.of(clip.info)
    except ValueError as error:
        return Problem(name, "short", str(error))
    try:
        if decode and media:
            for _ in film.read(clip.file, media, clip.start / settings.cut.fps, clip.frames, settings.cut.fps):
                pass
    except ValueError as error:
        return Problem(name, "unreadable", f"frames from {clip.start} on: {error}")
    return None


def _row(clips: list[Clip], shapes: Buckets | None, settings: FolderSettings) -> dict[str, Any]:
    """What a run sees of a file."""
    from .data.scan import file_name

    first, media = clips[0], clips[0].media
    lengths = Counter(clip.frames for clip in clips)
    row = {
        "file": file_name(first.file, settings.path),
        "samples": len(clips),
        "frames": ", ".join(str(length) for length in lengths),
        "size": f"{media.width}x{media.height}",
        "seconds": f"{float(media.film.seconds):.2f}" if media.film else "",
        "fps": f"{media.film.fps:.3f}" if media.film else "",
        "captions": len(first.captions),
    }
    return {**row, "buckets": ", ".join(dict.fromkeys(str(shapes.of(clip.info)) for clip in clips))} if shapes else row


def _report(rows: list[dict[str, Any]], samples: int, problems: list[Problem], *, as_json: bool) -> None:
    """A row a file, then the problems; in JSON one object."""
    kinds = Counter(problem.kind for problem in problems)
    wrong = [asdict(problem) for problem in problems]
    if as_json:
        counts = {"files": len(rows), "samples": samples, "problems": dict(kinds)}
        print(json.dumps({"counts": counts, "files": rows, "problems": wrong}, indent=2, ensure_ascii=False))
        return
    show(rows, as_json=False, empty="no sample")
    if wrong:
        print()
        show(wrong, as_json=False)
    told = ", ".join(f"{count} {kind}" for kind, count in sorted(kinds.items()))
    print(f"\n{len(rows)} files, {samples} samples, {len(problems)} problems" + (f": {told}" if told else ""))

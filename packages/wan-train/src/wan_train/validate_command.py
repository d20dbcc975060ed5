"""The command `wan-train validate`: what a run will see of each file of its data, and all that is wrong with it."""

from __future__ import annotations

import argparse
import json
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from itertools import count, groupby
from typing import TYPE_CHECKING, Any

from wan_dit._shared.cli import add_common, show

from .data_source import Seen, Source, add_source, seen, sources

if TYPE_CHECKING:
    from .config import TrainConfig
    from .data.buckets import Bucket, Info
    from .data.folder import FolderSettings
    from .data.scan import Clip, Problem

Rows = list[dict[str, Any]]


def add_validate(commands: Any) -> None:
    """Add `validate` to the subparsers of `wan-train`."""
    parser = commands.add_parser(
        "validate",
        help="check a recipe and its data, before anything is trained",
        description="Tell what a run will see of each file, over all data sets and stages, and every problem; exit code 2 if there is one.",
    )
    add_source(parser)
    parser.add_argument("--decode", action="store_true", help="decode all frames, which finds damage within films")
    add_common(parser, listing=True)
    parser.set_defaults(do=_validate)


class _Files:
    """A data set of files as a run would have it, whatever its problems.

    clips: all samples, by file; `len` and `info` are of those that are trained on, in the same order
    """

    def __init__(self, settings: FolderSettings) -> None:
        from .data.folder import held_out

        found = settings.scan()
        self.settings, self.clips, self.problems = settings, found.clips, found.problems
        self.held_out = held_out({clip.file for clip in found.clips}, settings.holdout)
        self._trained = [clip for clip in found.clips if clip.file not in self.held_out]

    def __len__(self) -> int:
        return len(self._trained)

    def info(self, index: int) -> Info:
        return self._trained[index].info


class _Judged:
    """What becomes of samples, by index over all data sets: the buckets they are brought to, and what ends a run that draws them."""

    def __init__(self, found: Sequence[Seen]) -> None:
        self._asked = bool(found)
        self._buckets: dict[int | None, list[Bucket]] = defaultdict(list)
        self._wrong: dict[int | None, list[tuple[str, str]]] = defaultdict(list)
        for each in found:
            for index in each.samples:
                kind = "short"
                try:
                    bucket = each.bucket_of(index)
                    kind = "budget"
                    each.capacity(bucket)
                    self._buckets[index].append(bucket)
                except ValueError as error:
                    self._wrong[index].append((kind, str(error)))

    def wrong(self, index: int | None) -> Sequence[tuple[str, str]]:
        """The kind and message of each problem of a sample; None is one that is held out, which no stage draws."""
        return self._wrong.get(index, ())

    def column(self, indices: Iterable[int | None]) -> dict[str, str]:
        """The buckets of samples, each once; no column where no shapes are asked for."""
        shapes = dict.fromkeys(str(bucket) for index in indices for bucket in self._buckets.get(index, ()))
        return {"buckets": ", ".join(shapes)} if self._asked else {}


def _validate(args: argparse.Namespace) -> int:
    given, config = sources(args.source, args.overrides)
    sets = [_looked_at(source) for source in given]
    found, ended = _seen(args, given, config, sets)
    if len(sets) == 1 and not found and not isinstance(sets[0], _Files):
        show([{"data set": given[0].dataset, "samples": len(sets[0])}], as_json=args.json)
        return 0
    judged, start = _Judged(found), 0
    rows, problems, files = Rows(), Rows(), 0
    for source, dataset in zip(given, sets, strict=True):
        if isinstance(dataset, _Files):
            lines, wrong = _of_files(dataset, start, judged, decode=args.decode)
            files += len(lines)
        else:
            lines, wrong = _of_others(source.dataset, dataset, start, judged)
        start += len(dataset)
        name = {"set": source.name} if len(sets) > 1 else {}
        rows += [{**name, **line} for line in lines]
        problems += [{**name, **asdict(problem)} for problem in sorted(wrong, key=lambda problem: problem.file)]
    problems += [{**({"set": ""} if len(sets) > 1 else {}), **asdict(problem)} for problem in ended]
    _report(rows, problems, files, as_json=args.json)
    return 2 if problems else 0


def _looked_at(source: Source) -> Any:
    """A data set of files with its problems; another one opened."""
    from .config import read_settings
    from .data.folder import Folder

    target = source.target()
    if not (isinstance(target, type) and issubclass(target, Folder)):
        return source.open()
    return _Files(read_settings(target.settings_type, source.settings, f"data set '{source.dataset}'"))


def _seen(
    args: argparse.Namespace, given: Sequence[Source], config: TrainConfig | None, sets: Sequence[Any]
) -> tuple[list[Seen], list[Problem]]:
    """What is brought to buckets. Stages that cannot be are a problem beside those of the files, which may be why they cannot."""
    from .data.mix import Mix
    from .data.scan import Problem

    try:
        return seen(args, given, config, Mix({source.name: dataset for source, dataset in zip(given, sets, strict=True)})), []
    except ValueError as error:
        if not any(isinstance(dataset, _Files) and dataset.problems for dataset in sets):
            raise
        return [], [Problem("", "stage", str(error))]


def _of_files(files: _Files, start: int, judged: _Judged, *, decode: bool) -> tuple[Rows, list[Problem]]:
    """A row for each file that has samples without problems; start: the index of the first sample over all data sets"""
    from .data.scan import Problem, file_name

    good: list[tuple[Clip, int | None]] = []
    problems, indices = list(files.problems), count(start)
    for clip in files.clips:
        index = None if clip.file in files.held_out else next(indices)
        wrong = judged.wrong(index) or (_undecoded(clip, files.settings) if decode else ())
        problems += [Problem(file_name(clip.file, files.settings.path), *each) for each in wrong]
        if not wrong:
            good.append((clip, index))
    rows = []
    for _, group in groupby(good, key=lambda pair: pair[0].file):
        clips, places = zip(*group, strict=True)
        rows.append({**_row(clips, files.settings), **judged.column(places)})
    return rows, problems


def _undecoded(clip: Clip, settings: FolderSettings) -> Sequence[tuple[str, str]]:
    """What is wrong with the frames of a sample of a film."""
    from .data import film

    try:
        if media := clip.media.film:
            for _ in film.read(clip.file, media, clip.start / settings.cut.fps, clip.frames, settings.cut.fps):
                pass
    except ValueError as error:
        return [("unreadable", f"frames from {clip.start} on: {error}")]
    return ()


def _row(clips: Sequence[Clip], settings: FolderSettings) -> dict[str, Any]:
    """What a run sees of a file."""
    from .data.scan import file_name

    first, media = clips[0], clips[0].media
    return {
        "file": file_name(first.file, settings.path),
        "samples": len(clips),
        "frames": _each(clip.frames for clip in clips),
        "size": f"{media.width}x{media.height}",
        "seconds": f"{float(media.film.seconds):.2f}" if media.film else "",
        "fps": f"{media.film.fps:.3f}" if media.film else "",
        "captions": len(first.captions),
    }


def _of_others(name: str, dataset: Any, start: int, judged: _Judged) -> tuple[Rows, list[Problem]]:
    """One row for a data set that is not of files, and each of its problems once."""
    from .data.scan import Problem

    told = Counter(each for index in range(len(dataset)) for each in judged.wrong(start + index))
    good = [index for index in range(len(dataset)) if not judged.wrong(start + index)]
    infos = [dataset.info(index) for index in good] if hasattr(dataset, "info") else []
    row = {
        "file": name,
        "samples": len(good),
        "frames": _each(info[0] for info in infos),
        "size": _each(f"{info[2]}x{info[1]}" for info in infos),
        "seconds": "",
        "fps": _each(f"{info[3]:.3f}" for info in infos),
        "captions": "",
        **judged.column(start + index for index in good),
    }
    return [row] if good else [], [Problem(name, kind, f"{times} samples: {message}") for (kind, message), times in told.items()]


def _each(values: Iterable[object]) -> str:
    """Different values, in the order they come."""
    return ", ".join(dict.fromkeys(map(str, values)))


def _report(rows: Rows, problems: Rows, files: int, *, as_json: bool) -> None:
    """The rows, then the problems; in JSON one object."""
    kinds, samples = Counter(problem["kind"] for problem in problems), sum(row["samples"] for row in rows)
    if as_json:
        counts = {"files": files, "samples": samples, "problems": dict(kinds)}
        print(json.dumps({"counts": counts, "files": rows, "problems": problems}, indent=2, ensure_ascii=False))
        return
    show(rows, as_json=False, empty="no sample")
    if problems:
        print()
        show(problems, as_json=False)
    told = ", ".join(f"{times} {kind}" for kind, times in sorted(kinds.items()))
    print(f"\n{files} files, {samples} samples, {len(problems)} problems" + (f": {told}" if told else ""))

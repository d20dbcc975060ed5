"""What is in a folder of clips: the samples in it, and every problem with it, all at once. Imports no torch."""

from __future__ import annotations

import os
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any, Literal

from .buckets import Info
from .file_index import FILMS, PICTURES, FileIndex, Media, MediaFile
from .sidecars import LISTINGS, Listing, is_listing, read_listing, read_sidecar

OnProblem = Literal["strict", "skip"]
_SHOWN = 20


@dataclass(frozen=True)
class Cut:
    """How films become samples.

    fps: frames a second that samples have, taken by time
    frames: of a sample; longer films are cut into as many as they hold, `overlap` frames of each shared with the next
    min_frames: a film, or what is left at the end of one, that is shorter is no sample; 0 asks for all `frames`
    """

    fps: Fraction
    frames: int
    min_frames: int = 0
    overlap: int = 0

    def __post_init__(self) -> None:
        if self.fps <= 0 or self.frames < 1 or not 0 <= self.overlap < self.frames or not 0 <= self.min_frames <= self.frames:
            raise ValueError(
                f"fps and frames must be positive, overlap and min_frames less than frames: "
                f"got fps {float(self.fps):g}, frames {self.frames}, overlap {self.overlap}, min_frames {self.min_frames}"
            )

    @property
    def shortest(self) -> int:
        return self.min_frames or self.frames

    def of(self, count: int) -> list[tuple[int, int]]:
        """(first frame, frames) of each sample in a film of `count` frames at `fps`."""
        stride = self.frames - self.overlap
        parts = [(start, min(self.frames, count - start)) for start in range(0, count, stride)]
        return [(start, length) for start, length in parts if length >= self.shortest and (not start or length > self.overlap)]


@dataclass(frozen=True)
class Clip:
    """A sample: `frames` frames of a film from frame `start` on, counted at the sample's rate; or a picture."""

    file: MediaFile
    media: Media
    captions: tuple[str, ...]
    start: int
    frames: int
    fps: float

    @property
    def info(self) -> Info:
        return Info(self.frames, self.media.height, self.media.width, self.fps)


@dataclass(frozen=True)
class Problem:
    """kind: `caption`, `unreadable`, `short`, `small`, `missing` (a file that a listing or pattern names) or `listing`.

    Of `wan-train validate` also `budget`, a sample that is larger than a micro-batch of a stage may be, and `stage`, one that cannot be.
    """

    file: str
    kind: str
    message: str


@dataclass(frozen=True)
class Contents:
    """The films and pictures of a source before they are looked at, and what is wrong with the source itself.

    captions: those of a file; raises ValueError where they cannot be read
    advice: how a file that has no caption gets one
    """

    files: list[MediaFile]
    problems: list[Problem]
    captions: Callable[[Any], list[str]]
    advice: Callable[[Any], str]


@dataclass(frozen=True)
class Scan:
    """The samples of a folder in the order of their names, and what is wrong with it."""

    clips: list[Clip]
    problems: list[Problem]

    def settle(self, on_problem: OnProblem, source: Path) -> list[Clip]:
        """The samples. Where there are problems: ValueError that lists them for `strict`, a warning that counts them for `skip`."""
        if self.problems and on_problem == "strict":
            lines = [f"{problem.file}: {problem.message}" for problem in self.problems[:_SHOWN]]
            more = [f"and {len(self.problems) - _SHOWN} more"] if len(self.problems) > _SHOWN else []
            raise ValueError(
                f"'{source}' has {len(self.problems)} problems (on_problem = 'skip' leaves these out; "
                f"wan-train validate lists all): {'; '.join(lines + more)}"
            )
        if self.problems:
            kinds = ", ".join(f"{count} {kind}" for kind, count in sorted(Counter(problem.kind for problem in self.problems).items()))
            warnings.warn(f"'{source}': {len(self.problems)} files or lines are left out: {kinds}", RuntimeWarning, stacklevel=3)
        if not self.clips:
            raise ValueError(f"'{source}' has no sample: it needs {', '.join((*PICTURES, *FILMS))} with captions")
        return self.clips


def folder_contents(source: Path) -> Contents:
    """The media of a folder, its subfolders included, or of a listing. Raises FileNotFoundError, and ValueError where it is neither."""
    if not source.exists():
        raise FileNotFoundError(f"no folder or listing at path '{source}'")
    if source.is_file() and not is_listing(source):
        raise ValueError(f"'{source}' is no folder and no listing (.jsonl, .csv or .json)")
    listing, files = _listed(source)
    return Contents(
        list(files),
        [Problem(file_name(path, source), "listing", message) for path, message in listing.problems],
        lambda file: listing.captions.get(file) or read_sidecar(file),
        lambda file: f"write {file.stem}.txt beside it, or a line of {LISTINGS[0]}",
    )


def scan(
    source: Path,
    cut: Cut,
    *,
    captions: bool = True,
    min_side: int = 0,
    index: FileIndex | None = None,
    contents: Callable[[Path], Contents] = folder_contents,
) -> Scan:
    """The samples of a source, which `contents` lists.

    captions: whether a sample must have one; min_side: pixels that the shorter side must have
    Raises what `contents` does.
    """
    found = contents(source)
    clips, problems = list[Clip](), list(found.problems)
    for file, media in zip(found.files, (index or FileIndex()).media(found.files), strict=True):
        cuts = _clips(file, media, found, cut, captions, min_side)
        if isinstance(cuts, list):
            clips += cuts
        else:
            problems.append(Problem(file_name(file, source), *cuts))
    return Scan(clips, problems)


def _listed(source: Path) -> tuple[Listing, list[Path]]:
    """What listings say, and all files that are in the folder or listed, each once."""
    everything = sorted(walk(source)) if source.is_dir() else [source]
    merged, media = Listing(), [] if source.is_file() else [path for path in everything if path.suffix.lower() in (*PICTURES, *FILMS)]
    for path in everything:
        if path.name in LISTINGS or path == source:
            found = read_listing(path)
            merged.problems += found.problems
            for file, captions in found.captions.items():
                merged.captions.setdefault(file, []).extend(captions)
    return merged, sorted({*media, *merged.captions})


def walk(folder: Path) -> Iterator[Path]:
    """The files of a folder and its subfolders that are not hidden, in no order."""
    for place, folders, names in os.walk(folder, followlinks=True):
        folders[:] = [name for name in folders if not name.startswith(".")]
        yield from (Path(place) / name for name in names if not name.startswith("."))


def _clips(
    file: MediaFile, media: Media | Exception, found: Contents, cut: Cut, needed: bool, min_side: int
) -> list[Clip] | tuple[str, str]:
    """The samples of a file, or the kind of its problem and what it is."""
    if isinstance(media, FileNotFoundError):
        return "missing", "a listing names it, and it is not there"
    if isinstance(media, Exception):
        return "unreadable", str(media)
    try:
        captions = tuple(found.captions(file))
    except ValueError as error:
        return "caption", f"its captions cannot be read: {error}"
    if needed and not captions:
        return "caption", f"it has no caption: {found.advice(file)}"
    if min(media.height, media.width) < min_side:
        return "small", f"it is {media.width}x{media.height}, and the shorter side must have {min_side} pixels"
    if media.film is None:
        return [Clip(file, media, captions, 0, 1, 0.0)]
    count = media.film.frames(cut.fps)
    parts = cut.of(count)
    if not parts:
        rate = f"{count} frames at {float(cut.fps):g} a second ({float(media.film.seconds):.2f} s)"
        return "short", f"it has {rate}, {cut.shortest} are needed"
    return [Clip(file, media, captions, start, frames, float(cut.fps)) for start, frames in parts]


def file_name(file: MediaFile, source: Path) -> str:
    """A file as it is told: relative to the folder, or to that of the listing, tar or pattern."""
    path, root = Path(str(file)), source if source.is_dir() else source.parent
    return str(path.relative_to(root)) if path.is_relative_to(root) else str(path)

"""The files of a run, side by side under one name: the video, a contact sheet (.png) and the run's manifest (.json).

The video is an mp4, a GIF, or a folder of numbered PNG files, by the name that is given: `a.mp4`, `a.gif`, `a/%04d.png`; a single
frame may be `a.png`, which needs no contact sheet. Each appears whole or not at all.
"""

from __future__ import annotations

import os
import re
import secrets
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from itertools import count
from pathlib import Path

from ._shared.files import replacing

FORMATS = "FILE.mp4, FILE.gif, FOLDER/%04d.png for numbered frames, or FILE.png for a single one"  # for help texts
HELP = FORMATS.replace("%", "%%")  # as argparse wants it
SUFFIXES = (".mp4", ".png", ".json")
VIDEOS = (".mp4", ".gif")
PREVIEWS = (".png", ".gif")
NUMBER = re.compile(r"%(?:0?[1-9])?d")


def targets(path: str | os.PathLike[str]) -> tuple[Path, ...]:
    """Video, contact sheet and manifest of a run at `path`, or image and manifest; those of a folder of frames stand beside it.

    ValueError where `path` is none of `FORMATS`.
    """
    path = Path(path)
    if is_pattern(path):
        folder = path.parent
        return path, folder.with_name(f"{folder.name}.png"), folder.with_name(f"{folder.name}.json")
    if is_image(path):
        return path, path.with_suffix(".json")
    if path.suffix.lower() not in VIDEOS:
        raise ValueError(f"cannot write '{path}': give a name such as {FORMATS}")
    return path, path.with_suffix(".png"), path.with_suffix(".json")


def is_pattern(path: str | os.PathLike[str]) -> bool:
    """Whether `path` names numbered frames in a folder of their own; ValueError where it has a number, but not so."""
    path = Path(path)
    if path.suffix.lower() in VIDEOS or not NUMBER.search(str(path)):
        return False
    if path.suffix.lower() != ".png" or len(NUMBER.findall(path.name)) != 1 or NUMBER.search(str(path.parent)) or not path.parent.name:
        raise ValueError(f"cannot write frames to '{path}': name a folder of their own and one number, such as frames/%04d.png")
    return True


def is_image(path: str | os.PathLike[str]) -> bool:
    """Whether `path` names a single picture."""
    return Path(path).suffix.lower() == ".png" and not is_pattern(path)


def check(path: str | os.PathLike[str], *, overwrite: bool = False) -> tuple[Path, ...]:
    """The paths of `targets`, where each can be written; leaves nothing behind.

    Raises OSError where one exists, unless `overwrite`, is a folder (but for frames), or where the folder takes no new files.
    """
    files = targets(path)
    pattern = is_pattern(files[0])
    names = (files[0].parent if pattern else files[0], *files[1:])
    try:
        folder = next(parent for parent in names[0].absolute().parents if parent.exists())
        # named like the scratch files that will be written, and as long
        with tempfile.NamedTemporaryFile(dir=folder, prefix=f"..{names[0].stem}.{8 * '0'}.", suffix=SUFFIXES[-1]):
            pass
    except OSError as error:
        raise OSError(f"cannot write '{files[0]}': {error.strerror or error}") from error
    if pattern:
        _check_folder(files[0])
    for file in names:
        if file.is_dir() and not (pattern and file == names[0]):
            raise IsADirectoryError(f"cannot write '{file}': it is a folder, give a file name in it")
        if file.exists() and not overwrite and not (file.is_dir() and not any(file.iterdir())):
            raise FileExistsError(f"'{file}' exists: choose another name, or replace it with --overwrite (in Python overwrite=True)")
    return files


def check_preview(path: str | os.PathLike[str]) -> None:
    """ValueError where `path` does not name a kind of picture that a preview can be."""
    if Path(path).suffix.lower() not in PREVIEWS:
        raise ValueError(f"cannot write a preview to '{path}': give a name that ends in {' or '.join(PREVIEWS)}")


def frame_name(pattern: Path, i: int) -> Path:
    """The file of frame `i`."""
    return pattern.with_name(NUMBER.sub(lambda number: number[0] % i, pattern.name))


@contextmanager
def writing(path: str | os.PathLike[str], *, overwrite: bool = False) -> Iterator[tuple[Path, ...]]:
    """Scratch names for the files of `targets`, that take their own when all are written; on an error nothing is left.

    Raises as `check` does, and OSError that names `path` where the disk is full.
    """
    video, *others = check(path, overwrite=overwrite)
    with telling(video), ExitStack() as stack:
        scratch = stack.enter_context(replacing_frames(video) if is_pattern(video) else replacing(video))
        yield scratch, *[stack.enter_context(replacing(file)) for file in others]


@contextmanager
def replacing_frames(pattern: str | os.PathLike[str]) -> Iterator[Path]:
    """The pattern in a new folder, which takes the place of its own at the end; on any error or interrupt it is deleted.

    OSError where that is a folder with other files in it.
    """
    pattern = Path(pattern)
    _check_folder(pattern)
    final = Path(os.path.realpath(pattern.parent))
    scratch, old = (final.with_name(f".{final.name}.{secrets.token_hex(4)}") for _ in range(2))
    with telling(pattern):
        scratch.mkdir(parents=True)
        try:
            yield scratch / pattern.name
            if final.exists():
                os.replace(final, old)
            os.replace(scratch, final)
        finally:
            if old.exists() and not final.exists():  # stopped between the two
                os.replace(old, final)
            for folder in (scratch, old):
                shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def telling(path: Path) -> Iterator[None]:
    """What fails while `path` is written becomes an OSError that names it: a full disk, a limit, a lost drive."""
    try:
        yield
    except OSError as error:
        first: BaseException = error
        while isinstance(first.__cause__, OSError):
            first = first.__cause__
        if isinstance(first, OSError) and first.strerror is not None:
            raise OSError(f"cannot write '{path}': {first.strerror}") from first
        raise


def free_name(folder: Path, prompt: str, seed: int, suffix: str = ".mp4", *, overwrite: bool = False) -> Path:
    """`<prompt>-<seed>.mp4` in `folder`, numbered `-2`, `-3`, ... where one of its files is taken, unless `overwrite`."""
    words = re.sub(r"[^\w]+", "-", prompt.lower()).strip("-")[:60].strip("-") or "video"
    names = (f"{words}-{seed}" + (f"-{n}" if n > 1 else "") for n in count(1))
    return next(
        folder / f"{name}{suffix}" for name in names if overwrite or not any((folder / f"{name}{end}").exists() for end in SUFFIXES)
    )


def _check_folder(pattern: Path) -> None:
    """OSError where the folder of a pattern is a file, or holds anything but frames of that pattern."""
    folder = pattern.parent
    if not folder.exists():
        return
    if not folder.is_dir():
        raise NotADirectoryError(f"cannot write '{pattern}': '{folder}' is a file")
    start, end = NUMBER.split(pattern.name)
    frame = re.compile(rf"{re.escape(start)}\d+{re.escape(end)}")
    if other := next((entry for entry in sorted(folder.iterdir()) if not frame.fullmatch(entry.name)), None):
        raise FileExistsError(f"cannot write '{pattern}': the folder holds other files ('{other.name}'), name one for the frames alone")

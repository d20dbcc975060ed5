"""The three files of a run, side by side under one name: video (.mp4), contact sheet (.png) and manifest (.json)."""

from __future__ import annotations

import os
import re
import tempfile
from itertools import count
from pathlib import Path

SUFFIXES = (".mp4", ".png", ".json")


def targets(path: str | os.PathLike[str]) -> tuple[Path, Path, Path]:
    """The paths of the three files for a video at `path`; ValueError where that is no .mp4."""
    path = Path(path)
    if path.suffix.lower() != ".mp4":
        raise ValueError(f"cannot write '{path}': give a file name that ends in .mp4")
    return path, path.with_suffix(".png"), path.with_suffix(".json")


def check(path: str | os.PathLike[str], *, overwrite: bool = False) -> tuple[Path, Path, Path]:
    """The three paths, where each can be written; leaves nothing behind.

    Raises OSError where one exists, unless `overwrite`, is a folder, or where the folder takes no new files.
    """
    files = targets(path)
    try:
        folder = next(parent for parent in files[0].absolute().parents if parent.exists())
        # named like the scratch files that will be written, and as long
        with tempfile.NamedTemporaryFile(dir=folder, prefix=f"..{files[0].stem}.{8 * '0'}.", suffix=SUFFIXES[-1]):
            pass
    except OSError as error:
        raise OSError(f"cannot write '{files[0]}': {error.strerror or error}") from error
    for file in files:
        if file.is_dir():
            raise IsADirectoryError(f"cannot write '{file}': it is a folder, give a file name in it")
        if file.exists() and not overwrite:
            raise FileExistsError(f"'{file}' exists: choose another name, or replace it with --overwrite (in Python overwrite=True)")
    return files


def free_name(folder: Path, prompt: str, seed: int, *, overwrite: bool = False) -> Path:
    """`<prompt>-<seed>.mp4` in `folder`, numbered `-2`, `-3`, ... where one of its three files is taken, unless `overwrite`."""
    words = re.sub(r"[^\w]+", "-", prompt.lower()).strip("-")[:60].strip("-") or "video"
    names = (f"{words}-{seed}" + (f"-{n}" if n > 1 else "") for n in count(1))
    return next(folder / f"{name}.mp4" for name in names if overwrite or not any((folder / f"{name}{end}").exists() for end in SUFFIXES))

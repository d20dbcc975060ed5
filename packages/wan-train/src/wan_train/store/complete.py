"""Which checkpoints of a folder can be believed: those whose manifest and files are whole, to the byte."""

from __future__ import annotations

import hashlib
import warnings
from pathlib import Path

from .manifest import Manifest, folder_name, read_manifest, steps
from .ranks import Ranks


def newest_complete(folder: Path, ranks: Ranks, before: int | None = None) -> Manifest | None:
    """The newest checkpoint that is whole, None where there is none; rank 0 warns of each that is not, naming what is wrong.

    before: only checkpoints of earlier steps
    Collective: the processes share the reading of the files.
    """
    for step in ranks.first(steps(folder)):
        if before is not None and step >= before:
            continue
        try:
            return verify(folder / folder_name(step), ranks)
        except ValueError as error:
            if ranks.rank == 0:
                warnings.warn(f"{error}: this checkpoint is not used", stacklevel=3)
    return None


def verify(checkpoint: Path, ranks: Ranks) -> Manifest:
    """The manifest of a checkpoint, after its files are read and found to be what was written. ValueError on all processes alike."""
    manifest, problem = ranks.first(_read(checkpoint) if ranks.rank == 0 else (None, None))
    if manifest is not None:
        own = sorted(manifest.files)[ranks.rank :: ranks.size]
        found = ranks.gather(next(filter(None, (_damage(checkpoint / name, manifest.files[name].sha256) for name in own)), None))
        problem = next(filter(None, found), None)
    if manifest is None or problem:
        raise ValueError(problem)
    return manifest


def _read(checkpoint: Path) -> tuple[Manifest | None, str | None]:
    try:
        return read_manifest(checkpoint), None
    except (ValueError, OSError) as error:
        return None, str(error)


def _damage(path: Path, expected: str) -> str | None:
    try:
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        return f"'{path}' cannot be read: {error.strerror}"
    return None if digest == expected else f"'{path}' is damaged: its sha256 is {digest[:12]}..., expected {expected[:12]}..."

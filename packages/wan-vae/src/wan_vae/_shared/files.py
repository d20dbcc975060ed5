"""Files that appear whole or not at all, JSON that is read with its file's name in every error, and records that tell damage."""

from __future__ import annotations

import hashlib
import json
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A new scratch file beside `path` that takes its name at the end; on any error or interrupt it is deleted.

    Links are followed and missing folders made. Raises OSError or ValueError at once where `path` cannot be written.
    """
    final = Path(os.path.realpath(path))
    if final.exists() and not final.is_file():
        raise ValueError(f"cannot write '{path}': it exists and is not a file")
    scratch = final.with_name(f".{final.stem}.{secrets.token_hex(4)}{final.suffix}")
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
        scratch.touch(exist_ok=False)
    except OSError as error:
        raise OSError(f"cannot write '{path}': {error.strerror}") from error
    try:
        yield scratch
        scratch.chmod(0o644)  # some writers leave a file that its owner alone can read
        os.replace(scratch, final)
    finally:
        scratch.unlink(missing_ok=True)


def joined(path: Path) -> list[Path]:
    """The paths in `BASE+MODULE`, tensors of one model in several files; one path where it exists as it is."""
    return [path] if path.exists() else [Path(part) for part in str(path).split("+")]


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; ValueError names the file where there is none."""
    try:
        found = json.loads(path.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"'{path}' is not JSON: {error}") from error
    if not isinstance(found, dict):
        raise ValueError(f"'{path}' holds a {type(found).__name__}, expected a JSON object")
    return found


def sealed(record: dict[str, Any]) -> dict[str, Any]:
    """The record with a checksum of its other fields, as `check`."""
    text = json.dumps({key: value for key, value in record.items() if key != "check"}, sort_keys=True)
    return {**record, "check": hashlib.sha256(text.encode()).hexdigest()[:16]}


def check_seal(record: dict[str, Any], what: object) -> None:
    """ValueError where a record with a `check` is not what it was when it was sealed."""
    if "check" in record and sealed(record) != record:
        raise ValueError(f"{what} is damaged: its checksum is {record['check']!r}, expected {sealed(record)['check']!r}")

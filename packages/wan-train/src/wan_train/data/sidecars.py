"""Captions of a folder of clips as people keep them: a `.txt` beside each, a `metadata.jsonl` or `.csv`, or a `captions.json`.

Listings are read in the names of Hugging Face data sets, diffusers, finetrainers, musubi-tuner and diffusion-pipe.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

TEXTS = (".txt", ".caption")
LISTINGS = ("metadata.jsonl", "metadata.csv", "captions.json")
FILE_KEYS = ("file_name", "file", "file_path", "path", "video", "video_path", "image", "image_path", "media_path")
CAPTION_KEYS = ("text", "caption", "captions", "prompt", "prompts", "texts")


@dataclass
class Listing:
    """Captions by file, in the order of the listing, and what is wrong with its lines."""

    captions: dict[Path, list[str]] = field(default_factory=dict)
    problems: list[tuple[Path, str]] = field(default_factory=list)


def read_sidecar(media: Path) -> list[str]:
    """The captions beside a clip: the lines of `clip.txt` or `clip.mp4.txt`; none where there is no such file.

    Raises ValueError where it is not UTF-8.
    """
    names = [name for suffix in TEXTS for name in (media.with_suffix(suffix), media.with_name(media.name + suffix))]
    return [line for name in names if name.is_file() for line in read_text_captions(name.read_bytes())]


def read_text_captions(data: bytes) -> list[str]:
    """The captions in the bytes of a sidecar, one a line. Raises ValueError where they are not UTF-8."""
    return _cleaned(_decoded(data).splitlines())


def read_json_captions(data: bytes) -> list[str]:
    """The captions in the bytes of a JSON file: a text, a list of texts, or an object that holds them under one of CAPTION_KEYS.

    Raises ValueError where they are neither.
    """
    try:
        found = json.loads(_decoded(data))
    except json.JSONDecodeError as error:
        raise ValueError(f"it is not JSON: {error}") from error
    return _under_keys(found) if isinstance(found, dict) else _captions(found)


def is_listing(path: Path) -> bool:
    """Whether a file is a listing that is given by its own name."""
    return path.suffix.lower() in (".jsonl", ".csv", ".json")


def read_listing(path: Path) -> Listing:
    """The rows of a listing; files are relative to its folder. What is wrong with a row stands in `problems`."""
    listing = Listing()
    reader = {".jsonl": _json_lines, ".csv": _table, ".json": _mapping}[path.suffix.lower()]
    try:
        for number, row in reader(_decoded(path.read_bytes())):
            try:
                name, captions = _entry(row)
            except ValueError as error:
                listing.problems.append((path, f"line {number}: {error}"))
                continue
            listing.captions.setdefault(path.parent / name, []).extend(captions)
    except ValueError as error:
        listing.problems.append((path, str(error)))
    return listing


def _entry(row: Any) -> tuple[str, list[str]]:
    """The file and the captions of a row."""
    if not isinstance(row, dict):
        raise ValueError(f"expected an object with file_name and text, got {row!r}")
    names = [row[key] for key in FILE_KEYS if row.get(key)]
    if not names or not isinstance(names[0], str):
        raise ValueError(f"it names no file: expected one of {', '.join(FILE_KEYS)}, got {', '.join(map(str, row)) or 'nothing'}")
    return names[0], _under_keys(row)


def _under_keys(row: dict[str, Any]) -> list[str]:
    return [caption for key in CAPTION_KEYS if row.get(key) for caption in _captions(row[key])]


def _captions(value: Any) -> list[str]:
    """One caption or several; a cell of a table may hold a JSON list."""
    if isinstance(value, str) and value.lstrip().startswith("["):
        try:
            value = json.loads(value)
        except json.JSONDecodeError:
            value = [value]
    values = value if isinstance(value, list) else [value]
    if not all(isinstance(caption, str) for caption in values):
        raise ValueError(f"captions are text or a list of texts, got {value!r}")
    return _cleaned(values)


def _cleaned(lines: list[str]) -> list[str]:
    return [line.strip() for line in lines if line.strip()]


def _decoded(data: bytes) -> str:
    try:
        return io.TextIOWrapper(io.BytesIO(data), encoding="utf-8-sig").read()
    except UnicodeDecodeError as error:
        raise ValueError(f"it is not UTF-8 text: byte {error.start} is {error.object[error.start]:#x}") from error


def _json_lines(text: str) -> Iterator[tuple[int, Any]]:
    for number, line in enumerate(text.splitlines(), 1):
        if line.strip():
            try:
                yield number, json.loads(line)
            except json.JSONDecodeError as error:
                yield number, f"{line[:40]} ({error})"


def _table(text: str) -> Iterator[tuple[int, Any]]:
    rows = csv.DictReader(io.StringIO(text, newline=""))
    if not set(rows.fieldnames or ()) & set(FILE_KEYS):
        raise ValueError(f"its columns are {', '.join(rows.fieldnames or ()) or 'none'}; expected one of {', '.join(FILE_KEYS)}")
    for row in rows:
        yield rows.line_num, row


def _mapping(text: str) -> Iterator[tuple[int, Any]]:
    """`{"clip.mp4": ["a caption", ...], ...}`, or a list of rows."""
    try:
        found = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"it is not JSON: {error}") from error
    if isinstance(found, dict):
        found = [{"file_name": name, "captions": captions} for name, captions in found.items()]
    if not isinstance(found, list):
        raise ValueError(f"expected an object or a list of rows, got {type(found).__name__}")
    yield from enumerate(found, 1)

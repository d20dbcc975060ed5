"""What is in a context folder, whether it is whole, and how it is made so again."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load

from .cache import digest, lock, read_facts, read_lines, write_index

GRACE = 600  # seconds for which a file that no line names may be one that a writer is about to name


@dataclass(frozen=True)
class Problem:
    """Something wrong in a context folder.

    place: a file, or a line of the index
    prompt: whose context it is, where that is known
    """

    place: str
    what: str
    prompt: str = ""


@dataclass(frozen=True)
class Pruned:
    """What `prune` removed, or would: lines of the index, files, and their bytes."""

    lines: int
    files: tuple[str, ...]
    bytes: int


def verify(folder: Path) -> list[Problem]:
    """Everything that is damaged or missing; reads every context. FileNotFoundError where there is no context folder."""
    try:
        facts = _facts(folder)
    except ValueError as error:
        return [Problem("encoder.json", str(error))]
    rows, problems = _rows(folder)
    return problems + [problem for row in rows.values() if (problem := _damage(folder, row, facts))]


def entries(folder: Path) -> list[dict[str, Any]]:
    """A record a prompt: its text, tokens, whether it was cut, bytes and file. ValueError where the folder is damaged."""
    _facts(folder)
    rows, problems = _rows(folder)
    if problems:
        raise ValueError(f"{problems[0].place} of '{folder}': {problems[0].what}; mend it with: wan-text cache prune '{folder}'")
    made = []
    for row in rows.values():
        file = _file(folder, row)
        size = file.stat().st_size if file.exists() else 0
        made.append(
            {"prompt": row.get("prompt", ""), "tokens": row["tokens"], "truncated": row["truncated"], "bytes": size, "file": file.name}
        )
    return made


def leftovers(folder: Path, age: float = 0) -> Iterator[Path]:
    """Files older than `age` seconds that no line names: scratch files, and contexts of writers that were killed."""
    rows, _ = _rows(folder)
    named = {_file(folder, row).name for row in rows.values()}
    for file in sorted(folder.glob("*.safetensors")) + sorted(folder.glob(".*.json*")):
        if file.name not in named and time.time() - file.stat().st_mtime >= age:
            yield file


def prune(folder: Path, keep: list[str] | None = None, *, dry_run: bool = False, grace: float = GRACE) -> Pruned:
    """Remove what is damaged, what is left over, and, where `keep` is given, all prompts that are not in it.

    Files that no line names are left while they are younger than `grace` seconds: a writer may be about to name them.
    ValueError where `encoder.json` is damaged: then nothing in the folder can be told.
    """
    facts = _facts(folder)
    wanted = None if keep is None else {digest(prompt) for prompt in keep}
    with lock(folder):
        rows, problems = _rows(folder)
        good = [row for row in rows.values() if (wanted is None or row["sha256"] in wanted) and not _damage(folder, row, facts)]
        named = {_file(folder, row) for row in good}
        bad = {_file(folder, row) for row in rows.values()} - named
        files = sorted({file for file in bad if file.exists()} | set(leftovers(folder, grace)))
        pruned = Pruned(
            len(rows) - len(good) + len(problems), tuple(file.name for file in files), sum(file.stat().st_size for file in files)
        )
        if not dry_run:
            write_index(folder, good)
            for file in files:
                file.unlink(missing_ok=True)
    return pruned


def _facts(folder: Path) -> dict[str, Any]:
    facts = read_facts(folder)
    if facts is None:
        raise FileNotFoundError(f"no context folder at '{folder}': make one with wan-text encode")
    return facts


def _rows(folder: Path) -> tuple[dict[str, dict[str, Any]], list[Problem]]:
    rows: dict[str, dict[str, Any]] = {}
    problems = []
    for number, row in read_lines(folder):
        if isinstance(row, ValueError):
            problems.append(Problem(f"index.jsonl, line {number}", str(row)))
        else:
            rows[row["sha256"]] = row
    return rows, problems


def _file(folder: Path, row: dict[str, Any]) -> Path:
    return folder / f"{Path(row['key']).name}.safetensors"


def _damage(folder: Path, row: dict[str, Any], facts: dict[str, Any]) -> Problem | None:
    """What is wrong with the context of a line."""
    file, prompt = _file(folder, row), row.get("prompt", "")
    try:
        content = file.read_bytes()
    except OSError as error:
        return Problem(file.name, f"cannot be read: {error.strerror}", prompt)
    if row.get("file") not in (None, hashlib.sha256(content).hexdigest()):
        return Problem(file.name, "its content is not what was written", prompt)
    try:
        context = load(content)["context"]
    except (SafetensorError, KeyError, ValueError) as error:
        return Problem(file.name, f"is no context: {error}", prompt)
    expected = [row["tokens"], facts["embed_dim"]]
    if list(context.shape) != expected or str(context.dtype) != f"torch.{facts['dtype']}":
        return Problem(file.name, f"holds {context.dtype} {list(context.shape)}, expected {facts['dtype']} {expected}", prompt)
    return None if bool(context.isfinite().all()) else Problem(file.name, "holds numbers that are NaN or infinite", prompt)

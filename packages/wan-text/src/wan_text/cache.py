"""Context folders: prompts encoded once, read by a backbone where no text encoder is installed.

A folder holds `encoder.json` (which encoder), `index.jsonl` (a line a prompt: sha256 of its raw text, the text, key, tokens,
truncated, sha256 of the file) and `<key>.safetensors` with one tensor `context [L, D]`. The key covers all that decides the
tensor: weights, tokenizer, cleaner, type, limit and ids. Lines and `encoder.json` carry checksums of their own. The index grows
line by line, after the tensors it names, so that several processes may fill one folder; of two lines for one prompt the last
counts, one without an end is not there. All else is replaced whole.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock
from safetensors.torch import save_file

from ._shared.files import check_seal, read_json, replacing, sealed

_CHUNK = 64  # prompts between two writes of the index


@dataclass(frozen=True)
class Written:
    """What `write_contexts` did: prompts encoded, and prompts that were there already."""

    encoded: int
    present: int


def encoder_facts(encoder: Any, name: str) -> dict[str, Any]:
    """The content of `encoder.json`; `name` is what a person calls the encoder, the other fields decide what a prompt becomes.

    Raises ValueError where the encoder cannot say who it is.
    """
    if missing := [attribute for attribute in ("fingerprint", "cleaner", "tokenize") if not hasattr(encoder, attribute)]:
        raise ValueError(f"text encoder '{name}' has no {', '.join(missing)}: without them its contexts cannot be told from another's")
    return {
        "name": name,
        "fingerprint": encoder.fingerprint(),
        "embedding_space": encoder.spec.embedding_space,
        "embed_dim": encoder.spec.embed_dim,
        "max_tokens": encoder.spec.max_tokens,
        "cleaner": encoder.cleaner,
        "dtype": str(getattr(encoder, "dtype", None) or encoder.encode([""])[0].dtype).removeprefix("torch."),
    }


def read_facts(folder: Path) -> dict[str, Any] | None:
    """The `encoder.json` of a context folder; None where there is none yet. ValueError where it is damaged."""
    try:
        facts = read_json(folder / "encoder.json")
        check_seal(facts, f"'{folder / 'encoder.json'}'")
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise ValueError(f"{error}; remove the folder and encode again") from error
    return {key: value for key, value in facts.items() if key != "check"}


def read_index(folder: Path) -> dict[str, dict[str, Any]]:
    """The lines of `index.jsonl` by the sha256 of their prompt; empty where there is no index yet. ValueError for a damaged line."""
    rows = {}
    for number, row in read_lines(folder):
        if isinstance(row, ValueError):
            raise ValueError(
                f"'{folder / 'index.jsonl'}' is not readable: line {number}: {row}; mend it with: wan-text cache prune '{folder}'"
            )
        rows[row["sha256"]] = row
    return rows


def read_lines(folder: Path) -> Iterator[tuple[int, dict[str, Any] | ValueError]]:
    """Every line of the index that is there whole, from 1 on: its record, or what is wrong with it."""
    index = folder / "index.jsonl"
    for number, line in enumerate(index.read_bytes().splitlines() if index.exists() else [], 1):
        if line and not _is_torn(line):
            try:
                yield number, _row(json.loads(line))
            except (ValueError, TypeError, KeyError) as error:
                yield number, ValueError(f"{type(error).__name__}: {error}")


def _row(row: Any) -> dict[str, Any]:
    if not isinstance(row, dict):
        raise TypeError(f"it holds a {type(row).__name__}, expected a JSON object")
    check_seal(row, "it")
    for name, kind in {"check": str, "sha256": str, "key": str, "tokens": int, "truncated": bool}.items():
        if not isinstance(row[name], kind):
            raise TypeError(f"{name} is {row[name]!r}")
    return row


def write_index(folder: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Put these lines in the place of all others; while nobody appends, see `lock`."""
    with replacing(folder / "index.jsonl") as scratch:
        scratch.write_text("".join(json.dumps(row) + "\n" for row in rows))


def lock(folder: Path) -> FileLock:
    """Held by who changes the index; the system lets go of it where a process ends."""
    return FileLock(folder / ".index.lock")


def digest(prompt: str) -> str:
    """sha256 of a prompt's raw text, by which readers without an encoder find it. ValueError for a text that has no bytes."""
    try:
        return hashlib.sha256(prompt.encode()).hexdigest()
    except UnicodeEncodeError as error:
        shown = prompt[:40].encode(errors="backslashreplace").decode()
        raise ValueError(f"prompt '{shown}' holds half a character at {error.start} (a lone surrogate): it is no UTF-8 text") from error


def write_contexts(
    encoder: Any, prompts: Iterable[str], folder: Path, *, name: str, progress: Callable[[int], object] = lambda done: None
) -> Written:
    """Encode the prompts that are not in `folder` yet; `progress` gets the number of prompts done since the last call.

    Raises ValueError where the folder holds the contexts of another encoder.
    """
    facts = encoder_facts(encoder, name)
    _start(folder, facts)
    index = read_index(folder)
    wanted = {digest(prompt): prompt for prompt in prompts}
    new = [(name, prompt) for name, prompt in wanted.items() if not _present(folder, index.get(name))]
    at_once = getattr(encoder, "prompts_at_once", _CHUNK)
    for start in range(0, len(new), at_once):
        chunk = new[start : start + at_once]
        _append(folder, _encode_chunk(encoder, chunk, folder, _identity(facts)))
        progress(len(chunk))
    return Written(len(new), len(wanted) - len(new))


def _start(folder: Path, facts: dict[str, Any]) -> None:
    existing = read_facts(folder)
    if existing is None:
        folder.mkdir(parents=True, exist_ok=True)
        with replacing(folder / "encoder.json") as scratch:
            scratch.write_text(json.dumps(sealed(facts), indent=2) + "\n")
    elif differ := [key for key in _identity(facts) if existing.get(key) != facts[key]]:
        if "dtype" in differ:  # the same weights have another fingerprint in another type
            differ = [key for key in differ if key != "fingerprint"]
        pairs = ", ".join(f"{key} {existing.get(key)!r} instead of {facts[key]!r}" for key in differ)
        raise ValueError(
            f"'{folder}' holds contexts of the encoder '{existing.get('name')}': {pairs}; use that encoder in that type, or another folder"
        )


def _identity(facts: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in facts.items() if key != "name"}


def _present(folder: Path, row: dict[str, Any] | None) -> bool:
    return row is not None and (folder / f"{row['key']}.safetensors").exists()


def _encode_chunk(encoder: Any, chunk: list[tuple[str, str]], folder: Path, identity: dict[str, Any]) -> list[dict[str, Any]]:
    """Write the tensors of a chunk and return its lines of the index. The key covers the encoder and the ids it sees."""
    prompts = [prompt for _, prompt in chunk]
    rows = []
    for (name, prompt), tokens, context in zip(chunk, encoder.tokenize(prompts), encoder.encode(prompts), strict=True):
        if not context.isfinite().all():
            raise ValueError(f"the encoder makes NaN or infinite numbers of '{prompt[:40]}': use another type, such as fp32")
        key = hashlib.sha256(json.dumps([identity, list(tokens.ids)], sort_keys=True).encode()).hexdigest()[:32]
        with replacing(folder / f"{key}.safetensors") as scratch:
            save_file({"context": context.detach().cpu().contiguous()}, scratch, metadata={"format": "pt"})
            content = hashlib.sha256(scratch.read_bytes()).hexdigest()
        row = {"sha256": name, "prompt": prompt, "key": key, "tokens": len(tokens.ids), "truncated": tokens.truncated, "file": content}
        rows.append(sealed(row))
    return rows


def _append(folder: Path, rows: list[dict[str, Any]]) -> None:
    """Add lines, whole; a line torn by a crash is ended first."""
    with lock(folder), open(folder / "index.jsonl", "ab+", buffering=0) as file:
        if file.tell() and os.pread(file.fileno(), 1, file.tell() - 1) != b"\n":
            file.write(b"\n")
        file.write(b"".join(json.dumps(row).encode() + b"\n" for row in rows))


def _is_torn(line: bytes) -> bool:
    return line.startswith(b"{") and not line.endswith(b"}")

"""Context folders: prompts encoded once, read by a backbone where no text encoder is installed.

A folder holds `encoder.json` (which encoder), `index.jsonl` (a line a prompt: sha256 of its raw text, key, tokens, truncated)
and `<key>.safetensors` with one tensor `context [L, D]`. The index grows line by line, after the tensors it names, so that several
processes may fill one folder: of two lines for one prompt the last counts, one without an end is not there. All else is replaced whole.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from ._shared.files import read_json, replacing

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
        "dtype": str(encoder.encode([""])[0].dtype).removeprefix("torch."),
    }


def read_facts(folder: Path) -> dict[str, Any] | None:
    """The `encoder.json` of a context folder; None where there is none yet."""
    try:
        return read_json(folder / "encoder.json")
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise ValueError(f"{error}; remove the folder and encode again") from error


def read_index(folder: Path) -> dict[str, dict[str, Any]]:
    """The lines of `index.jsonl` by the sha256 of their prompt; empty where there is no index yet."""
    index = folder / "index.jsonl"
    try:
        lines = index.read_text().splitlines() if index.exists() else []
        rows = [json.loads(line) for line in lines if line and not _is_torn(line)]
        return {row["sha256"]: row for row in rows}
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"'{index}' is not readable: {error}; remove the folder and encode again") from error


def write_contexts(
    encoder: Any, prompts: Iterable[str], folder: Path, *, name: str, progress: Callable[[int], object] = lambda done: None
) -> Written:
    """Encode the prompts that are not in `folder` yet; `progress` gets the number of prompts done since the last call.

    Raises ValueError where the folder holds the contexts of another encoder.
    """
    facts = encoder_facts(encoder, name)
    _start(folder, facts)
    index = read_index(folder)
    wanted = {hashlib.sha256(prompt.encode()).hexdigest(): prompt for prompt in prompts}
    new = [(digest, prompt) for digest, prompt in wanted.items() if not _present(folder, index.get(digest))]
    for start in range(0, len(new), _CHUNK):
        chunk = new[start : start + _CHUNK]
        _append(folder / "index.jsonl", _encode_chunk(encoder, chunk, folder, _identity(facts)))
        progress(len(chunk))
    return Written(len(new), len(wanted) - len(new))


def _start(folder: Path, facts: dict[str, Any]) -> None:
    existing = read_facts(folder)
    if existing is None:
        folder.mkdir(parents=True, exist_ok=True)
        with replacing(folder / "encoder.json") as scratch:
            scratch.write_text(json.dumps(facts, indent=2) + "\n")
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
    for (digest, _), tokens, context in zip(chunk, encoder.tokenize(prompts), encoder.encode(prompts), strict=True):
        key = hashlib.sha256(json.dumps([identity, list(tokens.ids)], sort_keys=True).encode()).hexdigest()[:32]
        with replacing(folder / f"{key}.safetensors") as scratch:
            save_file({"context": context.detach().cpu().contiguous()}, scratch, metadata={"format": "pt"})
        rows.append({"sha256": digest, "key": key, "tokens": len(tokens.ids), "truncated": tokens.truncated})
    return rows


def _append(index: Path, rows: list[dict[str, Any]]) -> None:
    """Add lines in one write each, which never mixes with that of another process; a line torn by a crash is ended first."""
    with open(index, "ab+", buffering=0) as file:
        if file.tell() and os.pread(file.fileno(), 1, file.tell() - 1) != b"\n":
            file.write(b"\n")
        for row in rows:
            file.write(json.dumps(row).encode() + b"\n")


def _is_torn(line: str) -> bool:
    return line.startswith("{") and not line.endswith("}")

"""Context folders: prompts encoded once, read by a backbone where no text encoder is installed.

A folder holds `encoder.json` (which encoder), `index.jsonl` (a line a prompt: sha256 of its raw text, key, tokens, truncated)
and `<key>.safetensors` with one tensor `context [L, D]`. Every file is replaced whole; the index comes after the tensors it names.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import save

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
        return dict(json.loads((folder / "encoder.json").read_text()))
    except FileNotFoundError:
        return None
    except (ValueError, TypeError) as error:
        raise ValueError(f"'{folder / 'encoder.json'}' is not readable: {error}; remove the folder and encode again") from error


def read_index(folder: Path) -> dict[str, dict[str, Any]]:
    """The lines of `index.jsonl` by the sha256 of their prompt; empty where there is no index yet."""
    index = folder / "index.jsonl"
    try:
        rows = [json.loads(line) for line in index.read_text().splitlines() if line] if index.exists() else []
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
        index |= _encode_chunk(encoder, chunk, folder, _identity(facts))
        lines = [json.dumps(row) for row in index.values()]
        _replace(folder / "index.jsonl", "".join(f"{line}\n" for line in lines).encode())
        progress(len(chunk))
    return Written(len(new), len(wanted) - len(new))


def _start(folder: Path, facts: dict[str, Any]) -> None:
    existing = read_facts(folder)
    if existing is None:
        folder.mkdir(parents=True, exist_ok=True)
        _replace(folder / "encoder.json", (json.dumps(facts, indent=2) + "\n").encode())
    elif differ := [key for key in _identity(facts) if existing.get(key) != facts[key]]:
        pairs = ", ".join(f"{key} {existing.get(key)!r} instead of {facts[key]!r}" for key in differ)
        raise ValueError(f"'{folder}' holds contexts of the encoder '{existing.get('name')}': {pairs}; use that encoder or another folder")


def _identity(facts: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in facts.items() if key != "name"}


def _present(folder: Path, row: dict[str, Any] | None) -> bool:
    return row is not None and (folder / f"{row['key']}.safetensors").exists()


def _encode_chunk(encoder: Any, chunk: list[tuple[str, str]], folder: Path, identity: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Write the tensors of a chunk and return its lines of the index. The key covers the encoder and the ids it sees."""
    prompts = [prompt for _, prompt in chunk]
    rows = {}
    for (digest, _), tokens, context in zip(chunk, encoder.tokenize(prompts), encoder.encode(prompts), strict=True):
        key = hashlib.sha256(json.dumps([identity, list(tokens.ids)], sort_keys=True).encode()).hexdigest()[:32]
        _replace(folder / f"{key}.safetensors", save({"context": context.detach().cpu().contiguous()}, metadata={"format": "pt"}))
        rows[digest] = {"sha256": digest, "key": key, "tokens": len(tokens.ids), "truncated": tokens.truncated}
    return rows


def _replace(path: Path, data: bytes) -> None:
    """Write a file so that nobody ever sees half of it."""
    scratch = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        scratch.write_bytes(data)
        os.replace(scratch, path)
    finally:
        scratch.unlink(missing_ok=True)

"""Read the context folders that `wan-text encode` writes, so that a video can be made where no text encoder is installed.

A folder holds `encoder.json` (which encoder), `index.jsonl` (sha256 of the raw prompt -> key, sha256 of the file) and one
`<key>.safetensors` a prompt with the tensor `context [L, D]`. What has a checksum is checked.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shlex
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from ._shared.files import check_seal, read_json

if TYPE_CHECKING:
    from torch import Tensor

FACTS = {"embedding_space": str, "embed_dim": int, "max_tokens": int}


class ContextFiles:
    """A text encoder that only remembers: `encode` looks prompts up by the hash of their raw text.

    spec: name, embedding_space, embed_dim and max_tokens of the encoder that made the files
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        """Open a context folder, named by itself or by a file in it; reads no tensor."""
        if not Path(path).exists():
            raise FileNotFoundError(f"no context folder at '{path}': make one with wan-text encode")
        self.folder = Path(path) if Path(path).is_dir() else Path(path).parent
        try:
            encoder = read_json(self.folder / "encoder.json")
            check_seal(encoder, "encoder.json")
            facts = {name: _typed(encoder, name, kind) for name, kind in FACTS.items()}
            lines = (self.folder / "index.jsonl").read_text().splitlines()
            rows = [json.loads(line) for line in lines if line.strip() and not _is_torn(line)]
            self.rows = {_typed(row, "sha256", str): _row(row) for row in rows}
            self._fingerprint = None if encoder.get("fingerprint") is None else _typed(encoder, "fingerprint", str)
        except (OSError, ValueError) as error:
            raise ValueError(f"'{path}' is not a context folder ({error}): make one with wan-text encode") from error
        self.spec: Any = SimpleNamespace(name=str(path), **facts)

    def encode(self, prompts: list[str]) -> list[Tensor]:
        """One `[L, D]` a prompt; LookupError with the line that adds a prompt where it is not there."""
        return [self._read(prompt) for prompt in prompts]

    def fingerprint(self) -> str | None:
        """sha256 of the weights of the encoder that made the files."""
        return self._fingerprint

    def _read(self, prompt: str) -> Tensor:
        key, truncated, content = self.rows.get(hashlib.sha256(prompt.encode()).hexdigest(), (None, False, None))
        add = f"wan-text encode {shlex.quote(prompt)} --output {shlex.quote(str(self.folder))}"
        if key is None:
            raise LookupError(f"prompt '{_short(prompt)}' is not in context folder '{self.folder}'; add it: {add}")
        file = self.folder / f"{key}.safetensors"
        if not file.is_file():
            raise LookupError(f"'{file}', the context of prompt '{_short(prompt)}', is missing; encode it again: {add}")
        try:
            context = self._tensor(file, content)
        except (OSError, ValueError) as error:
            raise ValueError(f"'{file}' is no context ({error}); delete it and encode the prompt again: {add}") from error
        if truncated:
            warnings.warn(
                f"prompt '{_short(prompt)}' was cut to {self.spec.max_tokens} tokens when it was encoded", UserWarning, stacklevel=2
            )
        return context

    def _tensor(self, file: Path, content: str | None) -> Tensor:
        from safetensors import SafetensorError
        from safetensors.torch import load

        data = file.read_bytes()
        if content not in (None, hashlib.sha256(data).hexdigest()):
            raise ValueError("its content is not what was written")
        try:
            context = load(data)["context"]
        except SafetensorError as error:
            raise ValueError(str(error)) from error
        except KeyError as error:
            raise ValueError("it does not contain tensor context") from error
        length, width = self.spec.max_tokens, self.spec.embed_dim
        if context.ndim != 2 or not 1 <= context.shape[0] <= length or context.shape[1] != width or not context.is_floating_point():
            got = f"{str(context.dtype).removeprefix('torch.')} {list(context.shape)}"
            raise ValueError(f"it holds {got}, expected floating-point numbers [up to {length}, {width}]")
        if not context.isfinite().all():
            raise ValueError("it holds numbers that are NaN or infinite")
        return context


def _typed(record: Any, name: str, kind: type) -> Any:
    value = record.get(name) if isinstance(record, dict) else None
    if type(value) is not kind or (isinstance(value, int) and value < 1):
        raise ValueError(f"'{name}' is {value!r}, expected {'a text' if kind is str else 'a positive whole number'}")
    return value


def _is_torn(line: str) -> bool:
    """Lines are appended: one that a crash or a writer at work has left without its end is not there yet."""
    return line.startswith("{") and not line.endswith("}")


def _key(row: dict[str, Any]) -> str:
    """A key names a file of the folder, so it may be nothing that leads out of it."""
    key: str = _typed(row, "key", str)
    if not re.fullmatch("[0-9a-f]{1,128}", key):
        raise ValueError(f"key {key[:60]!r} is not a hexadecimal name")
    return key


def _row(row: dict[str, Any]) -> tuple[str, bool, str | None]:
    """Key, whether the prompt was cut, and the sha256 of the file where it is recorded."""
    check_seal(row, "a line of the index")
    return _key(row), bool(row.get("truncated")), None if row.get("file") is None else _typed(row, "file", str)


def _short(text: str) -> str:
    return text if len(text) <= 60 else f"{text[:57]}..."

"""Read the context folders that `wan-text encode` writes, so that a video can be made where no text encoder is installed.

A folder holds `encoder.json` (which encoder), `index.jsonl` (sha256 of the raw prompt -> key) and one `<key>.safetensors` a
prompt with the tensor `context [L, D]`.
"""

from __future__ import annotations

import hashlib
import json
import os
import shlex
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor


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
            encoder = json.loads((self.folder / "encoder.json").read_text())
            rows = [json.loads(line) for line in (self.folder / "index.jsonl").read_text().splitlines() if line.strip()]
            facts = {key: encoder[key] for key in ("embedding_space", "embed_dim", "max_tokens")}
            self.rows = {row["sha256"]: (row["key"], row.get("truncated", False)) for row in rows}
        except (OSError, json.JSONDecodeError, KeyError, TypeError) as error:
            raise ValueError(f"'{path}' is not a context folder ({error}): make one with wan-text encode") from error
        self.spec: Any = SimpleNamespace(name=str(path), **facts)
        self._fingerprint: str | None = encoder.get("fingerprint")

    def encode(self, prompts: list[str]) -> list[Tensor]:
        """One `[L, D]` a prompt; LookupError with the line that adds a prompt where it is not there."""
        return [self._read(prompt) for prompt in prompts]

    def fingerprint(self) -> str | None:
        """sha256 of the weights of the encoder that made the files."""
        return self._fingerprint

    def _read(self, prompt: str) -> Tensor:
        from safetensors.torch import load_file

        key, truncated = self.rows.get(hashlib.sha256(prompt.encode()).hexdigest(), (None, False))
        if key is None:
            add = f"wan-text encode {shlex.quote(prompt)} --output {shlex.quote(str(self.folder))}"
            raise LookupError(f"prompt '{_short(prompt)}' is not in context folder '{self.folder}'; add it: {add}")
        if truncated:
            warnings.warn(
                f"prompt '{_short(prompt)}' was cut to {self.spec.max_tokens} tokens when it was encoded", UserWarning, stacklevel=2
            )
        file = self.folder / f"{key}.safetensors"
        context = load_file(file)["context"]
        if context.ndim != 2 or context.shape[1] != self.spec.embed_dim:
            raise ValueError(f"'{file}': context is {tuple(context.shape)}, expected [tokens, {self.spec.embed_dim}]")
        return context


def _short(text: str) -> str:
    return text if len(text) <= 60 else f"{text[:57]}..."

"""Tensors in a folder, each in a file that is named by what decides its content; several processes may fill it at once.

There is no index: a file that is there is whole, and says in its header what it was made from and the checksum of its tensor.
A process that is killed leaves at most a scratch file, whose name starts with a dot.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from wan_dit._shared.files import replacing
from wan_dit._shared.weights import fingerprint

Facts = Mapping[str, Any]
_CLAIMS = ".claims"


def key_of(facts: Facts) -> str:
    """The name of what `facts` decide: a sha256 in hex."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


class TensorFiles:
    """One tensor a file, `<folder>/<first two digits>/<key>.safetensors`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __contains__(self, key: str) -> bool:
        return self.path(key).is_file()

    def path(self, key: str) -> Path:
        return self.folder / key[:2] / f"{key}.safetensors"

    def keys(self) -> Iterator[str]:
        """Of all files that are there, in no order."""
        return (file.stem for file in self.folder.glob("??/*.safetensors") if not file.name.startswith("."))

    def write(self, facts: Facts, tensor: Tensor) -> None:
        """Keep a tensor under the key of `facts`."""
        state = {"tensor": tensor.detach().cpu().contiguous()}
        with replacing(self.path(key_of(facts))) as scratch:
            save_file(state, scratch, metadata={"facts": json.dumps(facts), "sha256": fingerprint(state)})

    def facts(self, key: str) -> dict[str, Any]:
        """What a file was made from. ValueError where its header is damaged."""
        return self._open(key, tensor=False)[1]

    def read(self, key: str) -> Tensor:
        """A tensor. KeyError where there is none, ValueError where its file is damaged."""
        if key not in self:
            raise KeyError(key)
        return self._open(key, tensor=True)[0]["tensor"]

    def remove(self, key: str) -> None:
        self.path(key).unlink(missing_ok=True)

    @contextmanager
    def claimed(self, key: str, *, wait: bool = False) -> Iterator[bool]:
        """Whether this process may make `key` now: False where another one is at it, unless it waits; a claim ends with its process."""
        place = self.folder / _CLAIMS / f"{key}.lock"
        place.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(place)
        try:
            lock.acquire(timeout=-1 if wait else 0)
        except Timeout:
            yield False
            return
        try:
            yield True
        finally:
            place.unlink(missing_ok=True)
            lock.release()

    def sweep(self) -> int:
        """Remove what killed processes left; while no other process fills the folder. Returns the number of files."""
        left = [*self.folder.glob("??/.*.safetensors"), *(self.folder / _CLAIMS).glob("*.lock")]
        for file in left:
            file.unlink(missing_ok=True)
        return len(left)

    def _open(self, key: str, *, tensor: bool) -> tuple[dict[str, Tensor], dict[str, Any]]:
        path = self.path(key)
        try:
            with safe_open(path, "pt") as file:
                metadata = file.metadata() or {}
                state = {name: file.get_tensor(name) for name in file.keys()} if tensor else {}  # noqa: SIM118
            facts: dict[str, Any] = json.loads(metadata["facts"])
        except (SafetensorError, OSError, KeyError, ValueError) as error:
            raise ValueError(f"'{path}' is damaged: {error}") from error
        if key_of(facts) != key or (tensor and fingerprint(state) != metadata.get("sha256")):
            raise ValueError(f"'{path}' is damaged: its content does not match its checksum")
        return state, facts

"""The record of a run: everything that decided the pixels, written as JSON beside the video and checked by a replay."""

from __future__ import annotations

import hashlib
import platform
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from .media import to_frames, whole_file

if TYPE_CHECKING:
    import os

    from torch import Tensor

PACKAGES = ("wan-dit", "wan-vae", "wan-text", "torch", "numpy", "av")


class Part(BaseModel):
    """A part by name. `dist` is None where a path, a Hub id, an import string or an object was given.

    weights: fingerprint of the weights as loaded
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    dist: str | None = None
    version: str | None = None
    weights: str | None = None


class Manifest(BaseModel):
    """One generated video.

    dtype: as asked for, None is each part's default
    size: (width, height); sigmas: sha256 of the float32 noise levels; frames_sha256: of the uint8 frames `[T, H, W, 3]`
    timings: seconds by phase
    """

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())

    format: Literal["wan-dit-run/1"] = "wan-dit-run/1"
    prompt: str
    negative_prompt: str
    model: Part
    parts: dict[str, Part]
    context: str | None
    steps: int
    shift: float
    guidance: float
    seed: int
    noise_device: str
    device: str
    dtype: str | None
    frames: int
    size: tuple[int, int]
    fps: int
    sigmas: str
    versions: dict[str, str]
    timings: dict[str, float]
    frames_sha256: str


def read(path: str | os.PathLike[str]) -> Manifest:
    """Read a manifest; ValueError in one line where the file is none."""
    try:
        return Manifest.model_validate_json(Path(path).read_text())
    except (ValidationError, UnicodeDecodeError) as error:
        first = error.errors()[0] if isinstance(error, ValidationError) else None
        reason = f"{'.'.join(map(str, first['loc'])) or 'content'}: {first['msg']}" if first else str(error)
        raise ValueError(f"'{path}' is not a run manifest: {reason}") from error


def write(record: Manifest, path: Path) -> Path:
    """Write a manifest as JSON, whole or not at all."""
    with whole_file(path) as scratch:
        scratch.write_text(record.model_dump_json(indent=2) + "\n")
    return path


def differences(before: Manifest, after: Manifest) -> list[str]:
    """What changed between two runs of one manifest, one line each; timings aside."""
    old, new = _flat(before.model_dump(exclude={"timings"})), _flat(after.model_dump(exclude={"timings"}))
    return [f"{key}: {old.get(key)} -> {new.get(key)}" for key in sorted({*old, *new}) if old.get(key) != new.get(key)]


def versions() -> dict[str, str]:
    """Versions of Python and of the installed packages that touch the pixels."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def tensor_sha256(tensor: Tensor) -> str:
    """sha256 of the bytes of a tensor."""
    return hashlib.sha256(tensor.detach().cpu().contiguous().numpy().tobytes()).hexdigest()


def frames_sha256(video: Tensor) -> str:
    """sha256 of the uint8 frames `[T, H, W, 3]`."""
    return hashlib.sha256(to_frames(video).tobytes()).hexdigest()


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(value, dict):
        return {prefix.rstrip("."): value}
    return {key: leaf for name, inner in value.items() for key, leaf in _flat(inner, f"{prefix}{name}.").items()}

"""The manifest of a checkpoint: written last, it says what the folder has to hold to be believed."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError
from wan_dit._shared.files import check_seal, read_json, sealed

from ..config import explain

NAME, FORMAT = "manifest.json", 1
VALUES = "values.json"
UNFINISHED = ".tmp-"  # in the name of a folder that is being written, or being deleted
_FOLDER = re.compile(r"step-(\d{8,})")


class File(BaseModel):
    """size: bytes"""

    model_config = ConfigDict(frozen=True, extra="forbid")
    size: int
    sha256: str


class Manifest(BaseModel):
    """step: optimiser steps done; layout: how the processes shared the work; created: UTC, ISO 8601."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    format: int = FORMAT
    step: int
    world_size: int
    layout: dict[str, Any]
    files: dict[str, File]
    versions: dict[str, str]
    created: str


def folder_name(step: int) -> str:
    return f"step-{step:08d}"


def steps(folder: Path) -> list[int]:
    """The steps of what is named like a checkpoint in `folder`, newest first."""
    found = [_FOLDER.fullmatch(path.name) for path in folder.iterdir()] if folder.is_dir() else []
    return sorted((int(match[1]) for match in found if match), reverse=True)


def to_json(manifest: Manifest) -> dict[str, Any]:
    return sealed(manifest.model_dump())


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a checkpoint whose files are there in their sizes; ValueError says what is wrong with it.

    Reads no file but the manifest.
    """
    path = folder / NAME
    if not path.is_file():
        raise ValueError(f"'{folder}' has no {NAME}: it was not finished")
    record = read_json(path)
    check_seal(record, f"'{path}'")
    try:
        manifest = Manifest.model_validate({key: value for key, value in record.items() if key != "check"})
    except ValidationError as error:
        raise ValueError(f"'{path}': {explain(error)}") from error
    if manifest.format != FORMAT:
        raise ValueError(f"'{path}' is of format {manifest.format}, this version reads {FORMAT}")
    if folder.name != folder_name(manifest.step):
        raise ValueError(f"'{path}' is of step {manifest.step}, not of this folder")
    for name, file in manifest.files.items():
        if not (inner := folder / name).is_file():
            raise ValueError(f"'{inner}' is missing")
        if (size := inner.stat().st_size) != file.size:
            raise ValueError(f"'{inner}' has {size:,} bytes, expected {file.size:,}")
    return manifest

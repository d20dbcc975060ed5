"""Prompts from a file: one a line, or, in a .jsonl file, one JSON object a line with settings of its own. Imports no torch."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, ValidationError

from .run_options import parse_size


def _size(value: Any) -> Any:
    return parse_size(value) if isinstance(value, str) else tuple(value) if isinstance(value, list) else value


class Line(BaseModel):
    """A line of a .jsonl file; what is not there, or null, is as for all lines."""

    model_config = ConfigDict(extra="forbid", strict=True)

    prompt: str
    negative_prompt: str | None = None
    steps: int | None = None
    shift: float | None = None
    seed: int | None = None
    frames: int | None = None
    guidance: float | tuple[float, float] | None = None
    size: Annotated[tuple[int, int] | None, BeforeValidator(_size)] = None


def read_prompts(path: Path) -> list[dict[str, Any]]:
    """The prompt, and in a .jsonl file the settings, of every line; empty lines and those that begin with # are left out.

    Raises FileNotFoundError, and ValueError that names the line which is wrong.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no file of prompts at '{path}'")
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"'{path}' is no text in UTF-8: {error.reason} at byte {error.start}") from error
    rows = [(i, text.strip()) for i, text in enumerate(lines, 1)]
    rows = [(i, text) for i, text in rows if text and not text.startswith("#")]
    if not rows:
        raise ValueError(f"'{path}' holds no prompts: one a line")
    return [_settings(path, i, text) if path.suffix.lower() == ".jsonl" else {"prompt": text} for i, text in rows]


def _settings(path: Path, i: int, text: str) -> dict[str, Any]:
    try:
        return Line.model_validate_json(text).model_dump(exclude_none=True)
    except ValidationError as error:
        first = error.errors()[0]
        known = f"; known are {', '.join(Line.model_fields)}" if first["type"] == "extra_forbidden" else ""
        reason = f"{'.'.join(map(str, first['loc'])) or 'content'}: {first['msg'].removeprefix('Value error, ')}{known}"
        raise ValueError(f"line {i} of '{path}' is not a prompt with settings: {reason}") from error

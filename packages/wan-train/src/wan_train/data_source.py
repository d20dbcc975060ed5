"""What the commands `validate` and `cache` are given: a recipe, or a folder, listing or tars of clips. Imports no torch."""

from __future__ import annotations

import argparse
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .data.buckets import Buckets


@dataclass(frozen=True)
class Source:
    """A data set by name with its settings, the settings of the objective, and where a run over it would write; from `source`."""

    dataset: str
    settings: dict[str, Any]
    objective: dict[str, Any]
    output: Path | None

    def target(self) -> Any:
        """The class of the data set, or what else makes it."""
        from .plugins import find

        return find("wan_datasets", self.dataset).resolve()

    def open(self) -> Any:
        """The data set. Raises ValueError with all of its problems."""
        try:
            return self.target()(**self.settings)
        except TypeError as error:
            raise ValueError(f"data set '{self.dataset}': {error}") from error


def source(given: str, overrides: Sequence[str]) -> Source:
    """A folder, listing or tars whose settings are the overrides, such as fps=24, or a recipe with fields changed, dotted."""
    from .data.tars import holds_tars, is_tar

    path = Path(given)
    tars = holds_tars(path) if path.is_dir() else is_tar(path)
    if tars or path.is_dir() or path.suffix.lower() in (".jsonl", ".csv", ".json"):
        return Source("webdataset" if tars else "folder", {"path": given, **dict(map(_setting, overrides))}, {}, None)
    from .config import TrainConfig

    config = TrainConfig.from_toml(given, list(overrides))
    return Source(config.data.name, dict(config.data.settings), dict(config.objective.settings), config.output)


def _setting(word: str) -> tuple[str, Any]:
    key, equals, text = word.partition("=")
    if not equals or not key:
        raise ValueError(f"'{word}' must read key=value, a setting of the data set such as fps=24")
    try:
        return key, tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return key, text


def add_source(parser: argparse.ArgumentParser) -> None:
    """The arguments that name a source, and the shapes that its samples are brought to."""
    parser.add_argument("source", help="a recipe, or films and pictures: a folder, a listing (.jsonl, .csv, .json) or tars (.tar)")
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="settings of the folder, such as fps=24 frames=81, or fields of the recipe"
    )
    shapes = parser.add_argument_group("buckets")
    shapes.add_argument("--size", metavar="WxH", help="of films; other proportions have the same area")
    shapes.add_argument("--image-size", metavar="WxH", help="of pictures (default: as of films)")
    shapes.add_argument("--frames", metavar="N,N", help="lengths, each 1 + 4k (default: the frames of the data set)")
    shapes.add_argument("--grid", metavar="TxHxW", default="4x16x16", help="frames, rows and columns of a token (default: 4x16x16)")


def buckets(args: argparse.Namespace, frames: int) -> Buckets | None:
    """The shapes that are asked for; None where no size is."""
    if not args.size:
        if args.image_size or args.frames:
            raise ValueError("--image-size and --frames go with --size, such as --size 832x480")
        return None
    lengths = _numbers(args.frames, ",", "--frames") if args.frames else (frames,)
    time, rows, columns = _numbers(args.grid, "x", "--grid", 3)
    width, height = _numbers(args.size, "x", "--size", 2)
    image = _numbers(args.image_size, "x", "--image-size", 2)[::-1] if args.image_size else None
    return Buckets(video=(height, width), image=image, frames=lengths, grid=(time, rows, columns))


def _numbers(text: str, between: str, name: str, count: int = 0) -> tuple[int, ...]:
    parts = text.split(between)
    if not all(part.isdecimal() and int(part) > 0 for part in parts) or (count and len(parts) != count):
        shape = between.join("N" * (count or 2))
        raise ValueError(f"{name} is {text!r}, expected {shape}, whole numbers above 0")
    return tuple(map(int, parts))

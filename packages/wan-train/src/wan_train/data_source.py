"""What the commands `validate` and `cache` are given: a recipe, or a folder, listing or tars of clips. Imports no torch."""

from __future__ import annotations

import argparse
import tomllib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .data.buckets import GRID, Bucket, Buckets, Grid

if TYPE_CHECKING:
    from .config import TrainConfig
    from .data.mix import Mix
    from .data.sampler import Sampler

FRAMES = 81  # of clips, where the settings of a data set do not say


@dataclass(frozen=True)
class Source:
    """A data set: the name that the weights of stages know it by, and what makes it with which settings; from `sources`."""

    name: str
    dataset: str
    settings: dict[str, Any]

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


@dataclass(frozen=True)
class Seen:
    """Samples of a mix, by index, that a stage of a recipe or the shapes that were asked for bring to buckets; from `seen`.

    bucket_of: the shape of one; capacity: how many of a shape go through at once
    Both raise ValueError, that of a stage with its name, where a run would.
    """

    samples: Sequence[int]
    bucket_of: Callable[[int], Bucket]
    capacity: Callable[[Bucket], int]

    def bucket(self, index: int) -> Bucket:
        """The shape of a sample, of which one or more go through at once."""
        bucket = self.bucket_of(index)
        self.capacity(bucket)
        return bucket


def sources(given: str, overrides: Sequence[str]) -> tuple[list[Source], TrainConfig | None]:
    """A folder, listing or tars whose settings are the overrides, such as fps=24; or the data sets of a recipe, with the recipe.

    overrides: of a recipe its fields, dotted
    """
    from .data.tars import holds_tars, is_tar

    path = Path(given)
    tars = holds_tars(path) if path.is_dir() else is_tar(path)
    if tars or path.is_dir() or path.suffix.lower() in (".jsonl", ".csv", ".json"):
        return [Source("data", "webdataset" if tars else "folder", {"path": given, **dict(map(_setting, overrides))})], None
    from .config import TrainConfig

    config = TrainConfig.from_toml(given, list(overrides))
    return [Source(name, part.name, dict(part.settings)) for name, part in {"data": config.data, **config.more_data}.items()], config


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
    shapes = parser.add_argument_group("buckets", "In place of those of the recipe's stages.")
    shapes.add_argument("--size", metavar="WxH", help="of films; other proportions have the same area")
    shapes.add_argument("--image-size", metavar="WxH", help="of pictures (default: as of films)")
    shapes.add_argument("--frames", metavar="N,N", help="lengths, each 1 + 4k (default: the frames of the data set)")
    shapes.add_argument("--grid", metavar="TxHxW", help="frames, rows and columns of a token (default: the recipe's, or 4x16x16)")


def seen(args: argparse.Namespace, given: Sequence[Source], config: TrainConfig | None, mix: Mix) -> list[Seen]:
    """What is brought to buckets: by --size, else by each stage of the recipe; nothing where there is neither.

    mix: the data sets of `given`; one without `info` is left out of --size
    Raises ValueError for shapes that cannot be, for stages that cannot, and for stages over a data set without `info`.
    """
    if args.size:
        grid, found, start = _grid(args, config), list[Seen](), 0
        for source, dataset in zip(given, mix.datasets, strict=True):
            shapes, samples = _shapes(args, source.settings.get("frames", FRAMES), grid), range(start, start + len(dataset))
            start += len(dataset)
            if hasattr(dataset, "info"):
                found.append(_seen_at(shapes, samples, mix))
        return found
    if args.image_size or args.frames:
        raise ValueError("--image-size and --frames go with --size, such as --size 832x480")
    if config is None or not config.stages:
        return []
    for source, dataset in zip(given, mix.datasets, strict=True):
        if not hasattr(dataset, "info"):
            raise ValueError(f"data set '{source.dataset}' has no `info` of its samples, which the stages of a recipe need")
    from .curriculum import Curriculum

    curriculum = Curriculum(config, mix, len(mix), _grid(args, config))
    return [_seen_in(curriculum.sampler(index)) for index in range(len(config.stages))]


def _seen_at(shapes: Buckets, samples: Sequence[int], mix: Mix) -> Seen:
    return Seen(samples, lambda index: shapes.of(mix.info(index)), lambda bucket: 1)


def _seen_in(sampler: Sampler) -> Seen:
    """What a sampler draws in some epoch."""
    drawn = [group.samples for group, count in zip(sampler.groups, sampler.counts, strict=True) if count]
    return Seen([index for samples in drawn for index in samples.tolist()], sampler.bucket_of, sampler.capacity)


def _shapes(args: argparse.Namespace, frames: int, grid: Grid) -> Buckets:
    lengths = _numbers(args.frames, ",", "--frames") if args.frames else (frames,)
    width, height = _numbers(args.size, "x", "--size", 2)
    image = _numbers(args.image_size, "x", "--image-size", 2)[::-1] if args.image_size else None
    return Buckets(video=(height, width), image=image, frames=lengths, grid=grid)


def _grid(args: argparse.Namespace, config: TrainConfig | None) -> Grid:
    """As is asked for, else as a run has it: what the objective makes of its parts, of which no weights are read here."""
    if args.grid:
        time, rows, columns = _numbers(args.grid, "x", "--grid", 3)
        return time, rows, columns
    if config is None:
        return GRID
    from .objectives.flow import RectifiedFlow
    from .plugins import find

    target, settings = find("wan_objectives", config.objective.name).resolve(), config.objective.settings
    if not (isinstance(target, type) and issubclass(target, RectifiedFlow)):
        return getattr(target, "grid", GRID)
    stride = find("wan_vaes", settings.get("vae", "tiny")).stride
    patch = settings.get("architecture", {}).get("patch_size") or find("wan_backbones", settings.get("backbone", "tiny")).patch
    return stride[0] * patch[0], stride[1] * patch[1], stride[2] * patch[2]


def _numbers(text: str, between: str, name: str, count: int = 0) -> tuple[int, ...]:
    parts = text.split(between)
    if not all(part.isdecimal() and int(part) > 0 for part in parts) or (count and len(parts) != count):
        shape = between.join("N" * (count or 2))
        raise ValueError(f"{name} is {text!r}, expected {shape}, whole numbers above 0")
    return tuple(map(int, parts))

"""The configuration of a run: one frozen pydantic model, TOML in, dotted overrides on the command line."""

from __future__ import annotations

import tomllib
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal, Self, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from wan_dit._shared.files import read_json

Settings = TypeVar("Settings", bound=BaseModel)


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class PartConfig(_Section):
    """A plugin by name (or import string) and the settings handed to it."""

    name: str
    settings: dict[str, Any] = Field(default_factory=dict)


class PlateauConfig(_Section):
    """Lower the rate where a figure of the previews has not got better.

    figure: such as `val_all_right` or `val_psnr`; better: which way is
    patience: previews that are waited for; least: what counts as better
    factor: what the rate is then multiplied by; floor: the least share of the peak
    """

    figure: str
    better: Literal["higher", "lower"] = "higher"
    patience: int = Field(default=2, ge=0)
    least: float = Field(default=0.0, ge=0)
    factor: float = Field(default=0.5, gt=0, lt=1)
    floor: float = Field(default=0.01, gt=0, le=1)


class OptimiserConfig(_Section):
    """AdamW on everything, or Muon on the matrices an objective marks for it and AdamW on the rest.

    name: `adamw`; `adamw8bit`, whose moments are in 8 bits (torchao's, which compiles its step); `muon`
    lr, muon_lr: peak rates
    schedule: `constant`, or `cosine` from `hold` (a share of the run) down to `final` (a share of the peak)
    warmup: steps of linear warm-up
    plateau: lowers the rate of either schedule further where a validation figure stands still
    clip: largest gradient norm, 0 for none
    """

    name: Literal["adamw", "adamw8bit", "muon"] = "adamw"
    lr: float = Field(default=1e-4, gt=0)
    muon_lr: float = Field(default=0.02, gt=0)
    betas: tuple[float, float] = (0.9, 0.99)
    weight_decay: float = Field(default=1e-3, ge=0)  # report, section 4.2
    schedule: Literal["constant", "cosine"] = "constant"
    hold: float = Field(default=0.0, ge=0, lt=1)
    final: float = Field(default=0.05, ge=0, le=1)
    warmup: int = Field(default=0, ge=0)
    plateau: PlateauConfig | None = None
    clip: float = Field(default=1.0, ge=0)


class ParallelConfig(_Section):
    """How many processes share what; the data ranks are what is left of all processes (`wan_train.layout`).

    ulysses, ring: processes that split the tokens of a sample, by heads and by neighbours in a ring
    fsdp: processes that the weights are split over; a multiple of ulysses x ring contains their group, as in the report
    """

    ulysses: int = Field(default=1, gt=0)
    ring: int = Field(default=1, gt=0)
    fsdp: int = Field(default=1, gt=0)


class MemoryConfig(_Section):
    """What activations of a block become between forward and backward: kept, moved to the host's memory, or computed again.

    policy: one for all blocks (`keep`, `offload`, `recompute`), or one a block
    """

    policy: Literal["keep", "offload", "recompute"] | tuple[Literal["keep", "offload", "recompute"], ...] = "keep"


class GuardConfig(_Section):
    """What to do about a step whose loss or gradient norm is not finite, or a spike (`wan_train.store.guard`).

    spike: robust deviations above the median of the last `window` good steps, after `start` of them; 0 looks for none
    skips: bad steps in a row that are left out before the last checkpoint is taken up; rollbacks: how often that is tried
    """

    window: int = Field(default=128, gt=0)
    start: int = Field(default=32, gt=0)
    spike: float = Field(default=20.0, ge=0)
    skips: int = Field(default=3, ge=0)
    rollbacks: int = Field(default=2, ge=0)


class StageConfig(_Section):
    """A stage of the curriculum (`wan_train.curriculum`).

    until: the step at which it ends; may_end_early: already where `optimiser.plateau` has brought the rate to its floor
    video, image: (height, width) in pixels that films and pictures are brought to, in proportions near their own
    frames: lengths of films, 1 + a multiple of the VAE's stride; a clip takes the longest that it fills
    weights: how often an epoch takes the samples of `image`, `video`, a source, or `source/video`
    tokens, squared, samples: what a micro-batch holds at most: tokens, and tokens squared, summed over its samples, and samples
    (0: no limit); many pictures have few tokens, but a prompt each
    batch_size, micro_batches: samples, or micro-batches, of a step; 0 and 0 for the run's batch_size
    lr: share of the peak rate; shift: of its noise levels, None for that of the objective's settings
    """

    name: str
    until: int = Field(gt=0)
    may_end_early: bool = False
    video: tuple[int, int]
    image: tuple[int, int] | None = None
    frames: tuple[int, ...] = (81,)
    weights: dict[str, float] = Field(default_factory=dict)
    tokens: int = Field(default=100_000, gt=0)
    squared: int = Field(default=0, ge=0)
    samples: int = Field(default=0, ge=0)
    batch_size: int = Field(default=0, ge=0)
    micro_batches: int = Field(default=0, ge=0)
    lr: float = Field(default=1.0, gt=0)
    shift: float | None = Field(default=None, gt=0)


class TrainConfig(_Section):
    """One run.

    more_data: further data sets by the name of their source; the first one is source `data`
    stages: what is trained on from when to when; none for one shape throughout
    steps, batch_size: optimiser steps and samples in each, over all processes
    micro_batch: samples that a process computes at a time, 0 for all of its share of the step
    precision: `fp32`; `bf16`, autocast over fp32 weights, which FSDP gathers in bf16 where all of a module is trained; `fp8`, autocast with
    the linear layers of the backbone's blocks in float8, for a backbone of which all is trained (`wan_train.float8`)
    ema: decay of the averaged weights that are previewed and exported, 0 for none
    output: folder of logs, previews, checkpoints and the exported parts
    log_every, preview_every, save_every: in steps, 0 for never
    keep: newest checkpoints that stay; keep_every: and those whose step is a multiple of it, 0 for no others
    threads: CPU threads, 0 for torch's own choice
    """

    name: str
    objective: PartConfig
    data: PartConfig
    optimiser: OptimiserConfig = OptimiserConfig()
    parallel: ParallelConfig = ParallelConfig()
    memory: MemoryConfig = MemoryConfig()
    guard: GuardConfig = GuardConfig()
    more_data: dict[str, PartConfig] = Field(default_factory=dict)
    stages: tuple[StageConfig, ...] = ()
    steps: int = Field(gt=0)
    batch_size: int = Field(gt=0)
    micro_batch: int = Field(default=0, ge=0)
    seed: int = 0
    precision: Literal["fp32", "bf16", "fp8"] = "fp32"
    ema: float = Field(default=0.0, ge=0, lt=1)
    output: Path
    log_every: int = Field(default=20, ge=0)
    preview_every: int = Field(default=500, ge=0)
    save_every: int = Field(default=500, ge=0)
    keep: int = Field(default=3, gt=0)
    keep_every: int = Field(default=0, ge=0)
    threads: int = Field(default=0, ge=0)
    device: str = "cpu"

    @model_validator(mode="after")
    def _float8_is_trained(self) -> Self:
        """Said here too, before a backbone is loaded or a plan made."""
        train = self.objective.settings.get("train")
        if self.precision == "fp8" and train in ("lora", "context_embedder"):
            raise ValueError(
                f"precision = 'fp8' is of a backbone of which all is trained, and train = '{train}' leaves it as it is: "
                "use precision = 'bf16', and objective.settings.base = 'fp8' for its weights in 8 bits"
            )
        return self

    @classmethod
    def from_toml(cls, recipe: str | Path, overrides: list[str] | None = None) -> TrainConfig:
        """Read a recipe: a file, or the name of one in the package (`tiny-vae`, `tiny-t2v`).

        overrides: `dotted.key=value` with TOML values, such as `optimiser.lr=1e-3`; a bare word is a string.
        Raises ValueError that names the field, what it got and what is right.
        """
        path, recipes = Path(recipe), Path(str(files("wan_train") / "recipes"))
        if not path.is_file():
            path = recipes / f"{recipe}.toml"
        if not path.is_file():
            known = ", ".join(sorted(file.stem for file in recipes.glob("*.toml")))
            raise FileNotFoundError(f"no recipe '{recipe}': give a .toml file or one of {known}")
        try:
            values = tomllib.loads(path.read_text())
        except tomllib.TOMLDecodeError as error:
            raise ValueError(f"'{path}' is not TOML: {error}") from error
        return cls._changed(values, overrides, str(path))

    @classmethod
    def of_run(cls, folder: Path, overrides: list[str] | None = None) -> TrainConfig:
        """The settings of a run, from the `config.json` in its folder; FileNotFoundError or ValueError where there is none."""
        path = folder / "config.json"
        if not path.is_file():
            raise FileNotFoundError(f"'{folder}' holds no run: give the output folder of one")
        return cls._changed(read_json(path), overrides, str(path))

    @classmethod
    def _changed(cls, values: dict[str, Any], overrides: list[str] | None, source: str) -> TrainConfig:
        for override in overrides or []:
            _override(values, override)
        return read_settings(cls, values, source)


def read_settings(kind: type[Settings], values: dict[str, Any], source: str) -> Settings:
    """`values` as a pydantic model; ValueError in one line that names `source`, the fields, what they got and what is right."""
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        raise ValueError(f"'{source}': {explain(error)}") from error


def explain(error: ValidationError) -> str:
    """What is wrong with which field, in one line."""
    lines = []
    for problem in error.errors():
        field = ".".join(map(str, problem["loc"]))
        got = "" if problem["type"] == "missing" or not field else f" (got {problem['input']!r})"
        lines.append(f"{field}: {problem['msg']}{got}" if field else problem["msg"])
    return "; ".join(lines)


def _override(values: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise ValueError(f"override '{override}' must read dotted.key=value, such as optimiser.lr=1e-3")
    *parents, leaf = key.split(".")
    for parent in parents:
        values = values.setdefault(parent, {})
        if not isinstance(values, dict):
            raise ValueError(f"override '{override}': '{parent}' is a value, not a section")
    try:
        values[leaf] = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        values[leaf] = text

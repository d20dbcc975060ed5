"""The record of a run: everything that decided the pixels, written as JSON beside the video and checked by a replay."""

from __future__ import annotations

import hashlib
import platform
import re
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from .inputs import sha256_of
from .media import to_frames
from .request import LARGEST

if TYPE_CHECKING:
    import os

    from torch import Tensor

CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]")
Side = Annotated[int, Field(ge=1, le=LARGEST["size"])]
Finite = Annotated[float, Field(ge=0, allow_inf_nan=False)]
# a name may be a path: its bytes that are no UTF-8 are written as \udc.., since JSON has no place for them
Name = Annotated[str, AfterValidator(lambda name: name.encode("utf-8", "backslashreplace").decode())]

PACKAGES = ("wan-dit", "wan-vae", "wan-text", "torch", "numpy", "av")


class Part(BaseModel):
    """A part by name. `dist` is None where a path, a Hub id, an import string or an object was given.

    weights: fingerprint of the weights as loaded
    revision: commit of the Hub repository that they came from
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: Name
    dist: str | None = None
    version: str | None = None
    weights: str | None = None
    revision: str | None = None


class Parts(BaseModel):
    """What a pipeline is made of."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    backbone: Part
    vae: Part
    text_encoder: Part
    scheduler: Part
    low_noise_backbone: Part | None = None
    image_encoder: Part | None = None


class InputFile(BaseModel):
    """Something a run was given besides text; `path` is None where it was an object in memory."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    path: Name | None
    sha256: str


class TaskRecord(BaseModel):
    """A task (see `wan_dit.tasks.record`)."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str = "t2v"
    inputs: dict[str, InputFile] = {}
    settings: dict[str, Any] = {}


class LoraRecord(InputFile):
    """A LoRA, its strength, and the expert that it was for."""

    strength: Annotated[float, Field(allow_inf_nan=False)]
    expert: Literal["high", "low"] | None = None


class Options(BaseModel):
    """How the backbone was run; what is None is the default."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    precision: Literal["strict", "official", "diffusers", "fast"] | None = None
    attention: str | None = None
    cache: str | None = None
    offload: Literal["model", "blocks", "stream"] | None = None
    quantise: Literal["int8", "fp8"] | None = None
    compat: Literal["official"] | None = None
    context_embedder: InputFile | None = None
    processes: dict[str, int] = {}


class Run(BaseModel):
    """Everything that decides the pixels.

    dtype: as asked for, None is each part's default
    guidance: one number, or those of the low-noise and of the high-noise expert
    size: (width, height); sigmas: sha256 of the float32 noise levels
    """

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())

    format: Literal["wan-dit-run/1"] = "wan-dit-run/1"
    prompt: str
    negative_prompt: str
    model: Part
    parts: Parts
    context: Name | None
    task: TaskRecord = TaskRecord()
    loras: tuple[LoraRecord, ...] = ()
    options: Options = Options()
    steps: Annotated[int, Field(ge=1, le=LARGEST["steps"])]
    shift: Annotated[Finite, Field(gt=0)]
    guidance: Finite | tuple[Finite, Finite]
    seed: Annotated[int, Field(ge=0, le=LARGEST["seed"])]
    noise_device: Literal["cpu"]
    device: str
    dtype: Literal["float32", "bfloat16", "float16"] | None
    frames: Annotated[int, Field(ge=1, le=LARGEST["frames"])]
    size: tuple[Side, Side]
    fps: Annotated[int, Field(ge=1)]
    sigmas: str
    versions: dict[str, str]


class Manifest(Run):
    """One generated video.

    timings: seconds by phase; frames_sha256: of the uint8 frames `[T, H, W, 3]`
    cache: evaluations and what was skipped, where a cache was used
    """

    timings: dict[str, Finite]
    frames_sha256: str
    cache: dict[str, Any] | None = None


def read(path: str | os.PathLike[str]) -> Manifest:
    """Read a manifest; ValueError in one line that names the field where the file is none."""
    try:
        record = Manifest.model_validate_json(Path(path).read_bytes())
        # both are the model's; all other texts end up in messages, which must stay one line
        for key, value in _flat(record.model_dump(exclude={"prompt", "negative_prompt"})).items():
            if CONTROL.search(f"{key}{value}"):
                raise ValueError(f"{key}: control characters are not permitted")
    except ValueError as error:
        reason = str(error)
        if isinstance(error, ValidationError):
            first = error.errors()[0]
            reason = f"{'.'.join(map(str, first['loc'])) or 'content'}: {first['msg']}"
        raise ValueError(f"'{path}' is not a run manifest: {CONTROL.sub('?', reason[:200])}") from error
    return record


def differences(before: Run, after: Run) -> list[str]:
    """What changed between two runs of one manifest, one line each; timings aside."""
    old, new = _flat(before.model_dump(exclude={"timings", "cache"})), _flat(after.model_dump(exclude={"timings", "cache"}))
    return [f"{key}: {old.get(key)} -> {new.get(key)}" for key in sorted({*old, *new}) if old.get(key) != new.get(key)]


def recorded_file(what: str, file: InputFile) -> str:
    """The path of a file that a run was given; ValueError where it was none, is gone or has changed since."""
    if file.path is None:
        raise ValueError(f"the {what} of the run was an object in memory, which a record cannot hold: run it again from Python")
    if file.sha256 and not Path(file.path).exists():
        raise FileNotFoundError(f"the {what} of the run, '{file.path}', is gone")
    if file.sha256 and sha256_of(file.path) != file.sha256:
        raise ValueError(f"the {what} of the run, '{file.path}', has changed since")
    return file.path


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

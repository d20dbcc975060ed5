"""Tasks from options, and to and from the record of a run."""

from __future__ import annotations

import hashlib
import os
from typing import Any

import torch

from ..inputs import sha256_of
from ..manifest import InputFile, recorded_file
from .continuation import Continuation
from .image import ImageToVideo, TextToVideo
from .task import Task
from .vace import Vace

OVERLAP = 5


def task_of(
    *,
    vace: bool,
    image: Any = None,
    last_image: Any = None,
    video: Any = None,
    mask: Any = None,
    references: tuple[Any, ...] = (),
    vace_scale: float | None = None,
    outpaint: bool = False,
    overlap: int | None = None,
) -> Task:
    """The task that a set of inputs means, for a backbone that is VACE's or another.

    A video alone is continued; VACE edits or follows it, unless `overlap` says that it is to be continued.
    Raises ValueError where inputs do not go together.
    """
    editing = mask is not None or bool(references) or outpaint or vace_scale is not None
    if last_image is not None and image is None:
        raise ValueError("a last image needs a first one (--image)")
    if image is not None and (video is not None or editing):
        raise ValueError("give an image, or a video with what belongs to it, not both")
    if overlap is not None and (video is None or editing):
        raise ValueError("overlap is for a video that is continued: give --video, and no mask, reference or outpainting")
    if image is not None:
        return ImageToVideo(image, last_image)
    if video is not None and not editing and (overlap is not None or not vace):
        return Continuation(video, OVERLAP if overlap is None else overlap)
    if video is not None or editing:
        return Vace(video, mask, references, 1.0 if vace_scale is None else vace_scale, outpaint)
    return TextToVideo()


def recorded(task: Task) -> dict[str, Any]:
    """Name, settings, and the path and sha256 of each input, ready for JSON."""
    inputs = {name: _input(source) for name, source in task.inputs().items() if source is not None}
    return {"name": task.name, "inputs": inputs, "settings": task.settings()}


def from_record(record: dict[str, Any]) -> Task:
    """The task of a record; ValueError where an input was no file, is gone or has changed."""
    inputs = {name: recorded_file(name.replace("_", " "), InputFile(**entry)) for name, entry in record["inputs"].items()}
    settings = record["settings"]
    match record["name"]:
        case "t2v":
            return TextToVideo()
        case "i2v" | "flf2v":
            return ImageToVideo(inputs["image"], inputs.get("last_image"))
        case "continuation":
            return Continuation(inputs["video"], **settings)
        case "vace":
            references = tuple(source for name, source in inputs.items() if name.startswith("reference_"))
            scale = settings.get("scale", 1.0)
            scale = tuple(scale) if isinstance(scale, list) else scale
            return Vace(inputs.get("video"), inputs.get("mask"), references, **{**settings, "scale": scale})
    raise ValueError(f"the run was of task '{record['name']}', which is not one of t2v, i2v, flf2v, continuation, vace: run it from Python")


def _input(source: Any) -> dict[str, str | None]:
    if isinstance(source, str | os.PathLike):
        return {"path": os.path.abspath(source), "sha256": sha256_of(source)}
    data = source.detach().cpu().contiguous().numpy().tobytes() if isinstance(source, torch.Tensor) else source.convert("RGB").tobytes()
    return {"path": None, "sha256": hashlib.sha256(data).hexdigest()}

"""Take a part by its spec and make it trainable: as it is, or with fresh weights and a changed architecture."""

from __future__ import annotations

from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor

from .config import explain
from .published import published

CONDITIONED = {"timestep_conditioning": True}  # what may change of a VAE that keeps its weights


def fresh(spec: Any, init: str, architecture: dict[str, Any], device: str) -> Any:
    """The part of `spec` in training mode, its weights in fp32.

    init: `pretrained` keeps its weights, and may tell the decoder of a Wan VAE the timestep, which it does not heed before it is trained
    (`architecture` is then `timestep_conditioning = true` alone); `random` draws new ones, lets `architecture` change fields of its config,
    and leaves the weights of published backbones and VAEs where they are (a text encoder's tokenizer stands beside its own)
    Raises ValueError for another `init`, an architecture for pretrained weights, or fields that the config does not take.
    """
    conditions = architecture == CONDITIONED
    if init not in ("random", "pretrained") or (init == "pretrained" and architecture and not conditions):
        raise ValueError(
            f"init = '{init}' with architecture {architecture}: use 'random' (any architecture) or 'pretrained' (its own, or that of a Wan "
            "VAE with timestep_conditioning = true and no more)"
        )
    if init == "pretrained":
        part = spec.load(dtype=torch.float32, device=device)
        part = _conditioned(part) if conditions else part
    else:
        try:
            part = _model_of(spec).reinitialised(**architecture)
        except ValidationError as error:
            raise ValueError(f"architecture of '{spec.name}': {explain(error)}") from error
    return part.to(device).train().requires_grad_(True)


def _conditioned(part: Any) -> Any:
    if not hasattr(part, "conditioned"):
        raise ValueError(f"timestep_conditioning is for a Wan VAE, and this is a {type(part).__name__}: with 'pretrained' leave it out")
    return part.conditioned()


def _model_of(spec: Any) -> Any:
    """One that has the configuration of `spec`; without numbers where that is known without its weights."""
    if (config := published(spec)) is None:
        return spec.load(dtype=torch.float32)
    with torch.device("meta"):
        return spec.resolve()(config)


def check_clips(clips: Tensor, stride: tuple[int, ...], frames: int, height: int, width: int) -> None:
    """Raise ValueError where crops of `frames`, `height` and `width` do not fit into clips `[N, 3, T, H, W]` or a model's stride."""
    if any(have < want for have, want in zip(clips.shape[2:], (frames, height, width), strict=True)):
        have = "x".join(map(str, clips.shape[2:]))
        raise ValueError(f"crops of {frames}x{height}x{width} (frames, height, width) do not fit into the data's clips of {have}")
    time, *space = stride
    if (frames - 1) % time or any(size % unit for size, unit in zip((height, width), space, strict=True)):
        raise ValueError(
            f"clips of {frames}x{height}x{width} (frames, height, width) do not divide: "
            f"frames must be 1 + {time}k, height and width multiples of {space[0]} and {space[1]}"
        )

"""Known frames of a sample, as the backbone reads them: one format of mask for images, first and last frames, continuation and VACE.

Report, section 5.1: frames that are not known are zero, the latents of the frames and a mask of the known ones (4 channels) stand
beside the noisy latents; one training over image to video, continuation, first and last frame, and random interpolation. The new
input channels start at zero. The layout is that of `wan_dit.tasks`, which generates.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from pydantic import ValidationError
from torch import Tensor, nn
from wan_dit.contracts import Conditioning
from wan_dit.layers import PatchEmbedding
from wan_dit.tasks.conditioning import known_channels, vace_context

from ..config import explain

Task = Literal["t2v", "i2v", "flf2v", "continuation", "mixed", "vace"]
KNOWN = ("i2v", "flf2v", "continuation", "interpolation")  # what `mixed` draws from
AREAS = ("inpaint", "outpaint", "grey", "t2v")  # and `vace` besides
LUMA = (0.299, 0.587, 0.114)  # BT.601

Encode = Callable[[Tensor], Tensor]


def check_task(task: Task, backbone: Any) -> None:
    """ValueError where a backbone, given by its spec, has no inputs for the task, or needs others."""
    extra, wanted = backbone.in_channels - backbone.latent_channels, backbone.stride[0] + backbone.latent_channels
    if (task == "vace") != backbone.vace:
        takes = "a VACE context: train it with task = 'vace'" if backbone.vace else "no VACE context"
        raise ValueError(f"task = '{task}': backbone '{backbone.name}' takes {takes}")
    if backbone.image_dim is not None:
        raise ValueError(f"backbone '{backbone.name}' reads image tokens, which training here does not make: take one without that branch")
    if task == "t2v" and extra > 0:
        raise ValueError(f"task = 't2v': backbone '{backbone.name}' takes {extra} channels of known frames: use i2v, flf2v or mixed")
    if task not in ("t2v", "vace") and extra != wanted:
        right = backbone.latent_channels + wanted
        raise ValueError(
            f"task = '{task}' needs {wanted} channels of known frames, backbone '{backbone.name}' takes {extra}: "
            f"set architecture.in_dim = {right}"
        )


def conditioning_of(
    task: Task, clip: Tensor, stride: tuple[int, int, int], encode: Encode, generator: torch.Generator
) -> Conditioning | None:
    """What a clip `[3, T, H, W]` gives the backbone besides text, of the frames or areas that are drawn; None where it is text alone.

    encode: `[3, T, H, W]` to latents `[1, C, T', H', W']`
    """
    if task == "t2v":
        return None
    if task == "vace":
        frames, mask = vace_inputs(clip, stride[0], generator)
        return Conditioning(vace=vace_context(frames, mask, (), stride, encode))
    known = known_frames(task, clip.shape[1], stride[0], generator)
    return Conditioning(extra_latents=known_channels(only(clip, known), known, stride, encode))


def only(clip: Tensor, known: Tensor) -> Tensor:
    """The known frames of a clip, the others zero."""
    return clip * known.to(clip)[None, :, None, None]


def known_frames(task: str, frames: int, time: int, generator: torch.Generator) -> Tensor:
    """Which of the pixel frames are known, bool `[T]`, never all; of one frame alone none is.

    task: one of `KNOWN`, or `mixed` for any of them; time: temporal stride
    A continuation is of 1 + k * time frames, k from 1 where there are so many; interpolation knows each frame by one drawn probability.
    """
    known = torch.zeros(frames, dtype=torch.bool)
    if task == "mixed":
        task = KNOWN[_pick(len(KNOWN), generator)]
    if frames == 1:
        return known
    if task == "interpolation":
        known = torch.rand(frames, generator=generator) < torch.rand((), generator=generator)
        known[_pick(frames, generator)] = True
        known[_pick(frames, generator)] = False  # one at least is to be made
        return known
    known[0] = True
    if task == "flf2v":
        known[-1] = True
    if task == "continuation":
        overlaps = list(range(1, frames, time))
        overlaps = overlaps[1:] or overlaps
        known[: overlaps[_pick(len(overlaps), generator)]] = True
    return known


def vace_inputs(clip: Tensor, time: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Frames `[3, T, H, W]` and the mask `[1, T, H, W]` of what is made anew (1), for one kind of editing that is drawn.

    Known frames as in `known_frames`; a box that is painted in, or all around it; the clip in grey as a control; nothing at all.
    What is made anew is zero in the frames, except that a control stands there.
    """
    kinds = AREAS if clip.shape[1] == 1 else (*KNOWN, *AREAS)
    kind = kinds[_pick(len(kinds), generator)]
    mask = torch.ones_like(clip[:1])
    if kind == "grey":
        return torch.einsum("c,cthw->thw", torch.tensor(LUMA).to(clip), clip).expand_as(clip), mask
    if kind in KNOWN:
        mask[:, known_frames(kind, clip.shape[1], time, generator)] = 0
    elif kind != "t2v":
        inside = torch.zeros_like(mask)
        (top, bottom), (left, right) = (_span(side, generator) for side in clip.shape[2:])
        inside[..., top:bottom, left:right] = 1
        mask = inside if kind == "inpaint" else 1 - inside
    return clip * (1 - mask), mask


def joined(conditionings: Sequence[Conditioning | None]) -> Conditioning | None:
    """Those of several samples as one batch, on the CPU."""
    extra = [each.extra_latents for each in conditionings if each is not None and each.extra_latents is not None]
    vace = [each.vace for each in conditionings if each is not None and each.vace is not None]
    if not extra and not vace:
        return None
    return Conditioning(extra_latents=torch.cat(extra).cpu() if extra else None, vace=torch.cat(vace).cpu() if vace else None)


def moved(conditioning: Conditioning, device: str) -> Conditioning:
    """The tensors that `joined` makes, on a device."""
    extra, vace = conditioning.extra_latents, conditioning.vace
    return Conditioning(extra_latents=None if extra is None else extra.to(device), vace=None if vace is None else vace.to(device))


def with_input_channels(backbone: Any, in_dim: int) -> Any:
    """The backbone with more channels in, whose weights are zero: it computes what it did, whatever they hold. ValueError for fewer."""
    config, old = backbone.config, backbone.patch_embedding
    if not isinstance(in_dim, int) or in_dim < config.in_dim:
        raise ValueError(f"architecture.in_dim of a pretrained backbone can only grow: it has {config.in_dim}, got {in_dim!r}")
    try:
        backbone.config = type(config).model_validate({**config.model_dump(), "in_dim": in_dim})
    except ValidationError as error:
        raise ValueError(f"architecture.in_dim: {explain(error)}") from error
    new = PatchEmbedding(in_dim, config.dim, config.patch_size).to(old.weight)
    with torch.no_grad():
        nn.init.zeros_(new.weight)
        new.weight[:, : config.in_dim] = old.weight
    new.bias = old.bias
    backbone.patch_embedding = new
    return backbone


def _pick(count: int, generator: torch.Generator) -> int:
    return int(torch.randint(count, (), generator=generator))


def _span(side: int, generator: torch.Generator) -> tuple[int, int]:
    """A quarter to three quarters of a side, anywhere on it."""
    length = max(1, int(side * (0.25 + 0.5 * torch.rand((), generator=generator).item())))
    start = _pick(side - length + 1, generator)
    return start, start + length

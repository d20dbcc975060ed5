"""Write the layouts of others: one file in official names, and a folder for diffusers."""

from __future__ import annotations

import json
import os
from functools import reduce
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn

from ._shared.files import replacing
from ._shared.weights import PICKLES, Pretrained, State
from .diffusers_config import diffusers_config
from .model import WanVAE
from .names import diffusers_names

WEIGHTS = "diffusion_pytorch_model.safetensors"


def save_official(vae: Pretrained, path: str | os.PathLike[str]) -> None:
    """Write one file with official names, `.pth` or `.safetensors` by its suffix; ComfyUI and the official code read it.

    Halves of several types are written in the widest. ValueError for another suffix.
    """
    path = Path(path)
    if path.suffix not in (".pth", ".safetensors"):
        raise ValueError(f"cannot write '{path}': give a name that ends in .pth or .safetensors")
    state = _state(vae, vae.official_names(vae.config))
    with replacing(path) as scratch:
        if path.suffix == ".pth":
            torch.save(state, scratch)
        else:
            save_file(state, scratch, metadata={"format": "pt"})


def save_diffusers(vae: WanVAE, folder: str | os.PathLike[str]) -> None:
    """Write a folder that diffusers' `AutoencoderKLWan.from_pretrained` reads. ValueError where it holds other weights."""
    folder = Path(folder)
    if other := other_weights(folder, WEIGHTS):
        raise ValueError(f"cannot write to '{folder}': it holds other weights ('{other}'); name another folder")
    state, config = _state(vae, diffusers_names(vae.config)), diffusers_config(vae.config)
    with replacing(folder / "config.json") as facts, replacing(folder / WEIGHTS) as weights:
        facts.write_text(json.dumps(config, indent=2) + "\n")
        save_file(state, weights, metadata={"format": "pt"})


def other_weights(folder: Path, own: str) -> str | None:
    """A file with weights in `folder` that is not `own`, which a reader of the folder would take too; None where there is none."""
    suffixes = (".safetensors", ".safetensors.index.json", *PICKLES)
    names = sorted(file.name for file in folder.iterdir() if file.name.endswith(suffixes)) if folder.is_dir() else []
    return next((name for name in names if name != own and not name.startswith(".")), None)


def _state(vae: nn.Module, names: dict[str, str]) -> State:
    state = vae.state_dict()
    widest = reduce(torch.promote_types, {value.dtype for value in state.values()})
    return {names[key]: value.detach().to("cpu", widest).contiguous() for key, value in state.items()}

"""Write the layouts of others: one file in official names, and a folder for diffusers."""

from __future__ import annotations

import json
import os
from functools import reduce
from pathlib import Path
from typing import Any, cast

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

    Halves of several types are written in the widest. A codec with `to_official` gives the tensors and the metadata beside them.
    ValueError for another suffix, for `.pth` where there are metadata to keep, and for a VAE with what Wan's has not.
    """
    path = Path(path)
    _refuse_beyond_wan(vae, "the official code")
    if path.suffix not in (".pth", ".safetensors"):
        raise ValueError(f"cannot write '{path}': give a name that ends in .pth or .safetensors")
    codec: Any = vae
    facts: dict[str, str] = {}
    if hasattr(codec, "to_official"):
        facts, state = codec.to_official()
    else:
        state = _state(vae, vae.official_names(vae.config))
    if facts and path.suffix == ".pth":
        raise ValueError(f"cannot write '{path}': a {type(vae).__name__} has its configuration in the metadata of a .safetensors file")
    with replacing(path) as scratch:
        if path.suffix == ".pth":
            torch.save(state, scratch)
        else:
            save_file(state, scratch, metadata={"format": "pt", **facts})


def save_diffusers(vae: Pretrained, folder: str | os.PathLike[str]) -> None:
    """Write a folder that diffusers' `AutoencoderKLWan.from_pretrained` reads, or that of the class that `vae.to_diffusers` is for.

    ValueError where it holds other weights, for a codec that diffusers has no class for, and for a VAE with what Wan's has not.
    """
    folder, codec = Path(folder), cast(Any, vae)
    _refuse_beyond_wan(vae, "diffusers")
    if other := other_weights(folder, WEIGHTS):
        raise ValueError(f"cannot write to '{folder}': it holds other weights ('{other}'); name another folder")
    if isinstance(vae, WanVAE):
        state, config = _state(vae, diffusers_names(vae.config)), diffusers_config(vae.config)
    elif hasattr(codec, "to_diffusers"):
        config, state = codec.to_diffusers()
    else:
        raise ValueError(f"diffusers' AutoencoderKLWan cannot hold a {type(vae).__name__}; use --to official or --to wan")
    with replacing(folder / "config.json") as facts, replacing(folder / WEIGHTS) as weights:
        facts.write_text(json.dumps(config, indent=2) + "\n")
        save_file(state, weights, metadata={"format": "pt"})


def other_weights(folder: Path, own: str) -> str | None:
    """A file with weights in `folder` that is not `own`, which a reader of the folder would take too; None where there is none."""
    suffixes = (".safetensors", ".safetensors.index.json", *PICKLES)
    names = sorted(file.name for file in folder.iterdir() if file.name.endswith(suffixes)) if folder.is_dir() else []
    return next((name for name in names if name != own and not name.startswith(".")), None)


def _refuse_beyond_wan(vae: Pretrained, reader: str) -> None:
    if isinstance(vae, WanVAE) and (fields := vae.config.beyond_wan):
        said = " and ".join(f"{name} = {value}" for name, value in fields.items())
        raise ValueError(f"{reader} cannot run a VAE with {said}, which Wan's has not: use --to wan, or save_pretrained")


def _state(vae: nn.Module, names: dict[str, str]) -> State:
    state = vae.state_dict()
    widest = reduce(torch.promote_types, {value.dtype for value in state.values() if value.is_floating_point()})
    types = {key: widest if value.is_floating_point() else value.dtype for key, value in state.items()}
    return {names[key]: value.detach().to("cpu", types[key]).contiguous() for key, value in state.items()}

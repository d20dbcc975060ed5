"""Read checkpoints in every layout: ours, official, diffusers, with or without a prefix, whole or in shards."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from pkgutil import resolve_name

import torch

from ._shared.weights import PICKLES, State, locate, read_config, rename
from .config import VAEConfig
from .contents import DCAE, LTX, TAEHV, check_one_dtype, kind_of, read_header, read_tensors, shapes_of
from .diffusers_config import DIFFUSERS_CLASS, from_diffusers
from .diffusers_config import diffusers_config as diffusers_config
from .export import save_diffusers as save_diffusers
from .export import save_official as save_official
from .latents import is_latent_file
from .layouts import infer_config as infer_config
from .layouts import is_diffusers, refuse_others, validated
from .model import WanVAE, spec_of
from .names import diffusers_names, official_names
from .plugins import VAESpec

CONFIG_FILES = ("config.json", "model_index.json", "vae/config.json")
INDEX = ".index.json"
# what describes what is no Wan VAE, by what its tensors say, and by the class that config.json names
OTHERS = {TAEHV: "wan_vae.codecs.taehv:describe", DCAE: "wan_vae.codecs.dcae:describe", LTX: "wan_vae.codecs.ltx:describe"}
CLASSES = {"AutoencoderKLLTXVideo": "wan_vae.codecs.ltx:describe"}


def read_checkpoint(path: Path) -> tuple[VAEConfig, State]:
    """Configuration and tensors, under own names, of a checkpoint in any layout.

    Reads folders of ours and of diffusers, and single files in official or diffusers names, with or without a prefix; a
    file without a configuration is told by its names and shapes. ValueError names what is missing or extra, what mixes
    types or is NaN, and says what the file is where it is no whole Wan VAE.
    """
    path = inside(path)
    config, own = configured(path)
    state = read_tensors(path)
    shapes = shapes_of(state)
    refuse_others(shapes, path)
    if not own:  # ours may hold an encoder in fp32 and a decoder in bf16
        check_one_dtype(state, path)
    config = config or infer_config(shapes, path)
    names = diffusers_names(config) if is_diffusers(shapes) else official_names(config)
    return config, rename(state, {foreign: own_name for own_name, foreign in names.items()}, path)


def describe(path: str | os.PathLike[str]) -> VAESpec:
    """The facts of a checkpoint, from its config.json or the names and shapes in its header; reads no weights.

    Of a Hub repository the weights are fetched only where no config.json describes a VAE. A file in the layout of TAEHV, a
    DC-AE and the VAE of LTX-Video are described too, as what `wan_vae.codecs` reads.
    """
    from .codecs import dcae

    file = inside(locate(path, CONFIG_FILES))
    if dcae.is_described(read_config(file) or {}) and file.is_dir():
        return dcae.describe(path)
    if file.is_dir() and (other := CLASSES.get(str((read_config(file) or {}).get("_class_name")))):
        described: VAESpec = resolve_name(other)(path)
        return described
    if not _is_described(file):
        file = inside(locate(path, WanVAE.hub_files, WanVAE.hub_fallback))
    header = read_header(file) if file.is_file() else {}
    config, own = (None, False) if kind_of(header) in OTHERS else configured(file)
    if config is None:
        header = header or read_header(file)
        if (kind := kind_of(header)) in OTHERS:
            found: VAESpec = resolve_name(OTHERS[kind])(file)
            return found
        config = infer_config(shapes_of(header), file)
    if header and not own:
        check_one_dtype(header, file)
    return replace(spec_of(config), parameters=_parameters(config))


def inside(path: Path) -> Path:
    """The VAE within a model folder of several parts: `vae/` of a diffusers pipeline, `Wan2.1_VAE.pth` of an official one.

    An index of shards stands for its folder. ValueError for a latent file.
    """
    if path.is_dir():
        if (path / "model_index.json").exists() and (path / "vae").is_dir():
            return path / "vae"
        if files := sorted(file for file in path.glob("Wan2.*_VAE.*") if file.suffix in (*PICKLES, ".safetensors")):
            return files[0]
    elif path.name.endswith(INDEX):
        return path.parent
    elif is_latent_file(path):
        raise ValueError(f"'{path}' is a latent file, not a checkpoint: `wan-vae decode` makes a film of it")
    return path


def configured(path: Path) -> tuple[VAEConfig | None, bool]:
    """The configuration that a config.json gives, None where it gives none, and whether it is in our format."""
    fields = read_config(path) or {}
    if str(fields.get("format", "")).startswith("wan-vae/"):
        if fields.pop("format") != WanVAE.format:
            raise ValueError(f"'{path}' has another format version than {WanVAE.format}: update wan-vae")
        return validated(fields, path), True
    if fields.get("_class_name") == DIFFUSERS_CLASS:
        return from_diffusers(fields, path), False
    if fields and path.is_dir():
        found = next((fields[name] for name in ("_class_name", "format", "model_type") if fields.get(name)), "model")
        raise ValueError(f"'{path}/config.json' is of a {found}, expected format {WanVAE.format} or {DIFFUSERS_CLASS}")
    return None, False


def _is_described(path: Path) -> bool:
    fields = read_config(path) or {}
    return str(fields.get("format", "")).startswith("wan-vae/") or fields.get("_class_name") == DIFFUSERS_CLASS


def _parameters(config: VAEConfig) -> int:
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in WanVAE(config).parameters())

"""Read checkpoints in every layout (ours, official, diffusers, with or without a prefix) and write the foreign ones."""

from __future__ import annotations

import json
import math
import os
import re
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from statistics import mode
from typing import Any

import torch
from pydantic import ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from ._shared.files import replacing
from ._shared.spec import UNKNOWN
from ._shared.weights import PICKLES, State, locate, read_config, read_state, rename, strip_prefix
from .config import WAN21, WAN22, VAEConfig
from .model import WanVAE, spec_of
from .names import diffusers_names, official_names
from .plugins import VAESpec
from .statistics import WAN21_MEAN, WAN21_STD

Shapes = dict[str, tuple[int, ...]]

DIFFUSERS_CLASS = "AutoencoderKLWan"
PREFIXES = ("model.", "vae.", "first_stage_model.")
CONFIG_FILES = ("config.json", "model_index.json", "vae/config.json")

# own field: diffusers field, and its default in AutoencoderKLWan
DIFFUSERS_FIELDS: dict[str, tuple[str, Any]] = {
    "base_dim": ("base_dim", 96),
    "decoder_base_dim": ("decoder_base_dim", None),
    "z_dim": ("z_dim", 16),
    "dim_mult": ("dim_mult", [1, 2, 4, 4]),
    "num_res_blocks": ("num_res_blocks", 2),
    "temporal_downsample": ("temperal_downsample", [False, True, True]),
    "residual": ("is_residual", False),
    "patch_size": ("patch_size", None),
    "latents_mean": ("latents_mean", list(WAN21_MEAN)),
    "latents_std": ("latents_std", list(WAN21_STD)),
}


def read_checkpoint(path: Path) -> tuple[VAEConfig, State]:
    """Configuration and tensors, under own names, of a checkpoint in any layout.

    Reads folders of ours and of diffusers, and single files in official or diffusers names, with or without a prefix; a
    file without a configuration is told by its names and shapes. ValueError names what is missing, extra or misshapen.
    """
    path = _inside(path)
    config, diffusers = _configured(path)
    state = strip_prefix(read_state(path), PREFIXES)
    if config is None:
        shapes = {key: tuple(value.shape) for key, value in state.items()}
        config, diffusers = infer_config(shapes, path), _is_diffusers(shapes)
    names = diffusers_names(config) if diffusers else official_names(config)
    return config, rename(state, {foreign: own for own, foreign in names.items()}, path)


def describe(path: str | os.PathLike[str]) -> VAESpec:
    """The facts of a checkpoint, from its config.json or the names and shapes in its header; reads no weights.

    Of a Hub repository the weights are fetched only where no config.json describes a VAE.
    """
    file = _inside(locate(path, CONFIG_FILES))
    if not _is_described(file):
        file = _inside(locate(path, WanVAE.hub_files, WanVAE.hub_fallback))
    config, _ = _configured(file)
    return spec_of(config or infer_config(_read_shapes(file), file))


def save_official(vae: WanVAE, path: str | os.PathLike[str]) -> None:
    """Write one file with official names, `.pth` or `.safetensors` by its suffix; ComfyUI and the official code read it."""
    path = Path(path)
    if path.suffix not in (".pth", ".safetensors"):
        raise ValueError(f"cannot write '{path}': give a name that ends in .pth or .safetensors")
    names = official_names(vae.config)
    state = {names[key]: value.detach().cpu().contiguous() for key, value in vae.state_dict().items()}
    with replacing(path) as scratch:
        if path.suffix == ".pth":
            torch.save(state, scratch)
        else:
            save_file(state, scratch, metadata={"format": "pt"})


def save_diffusers(vae: WanVAE, folder: str | os.PathLike[str]) -> None:
    """Write a folder that diffusers' `AutoencoderKLWan.from_pretrained` reads."""
    folder = Path(folder)
    names, config = diffusers_names(vae.config), diffusers_config(vae.config)
    state = {names[key]: value.detach().cpu().contiguous() for key, value in vae.state_dict().items()}
    with replacing(folder / "config.json") as facts, replacing(folder / "diffusion_pytorch_model.safetensors") as weights:
        facts.write_text(json.dumps(config, indent=2) + "\n")
        save_file(state, weights, metadata={"format": "pt"})


def diffusers_config(config: VAEConfig) -> dict[str, Any]:
    """The fields of AutoencoderKLWan's config.json."""
    fields = config.model_dump(mode="json")
    fields["latents_mean"] = fields["latents_mean"] or [0.0] * config.z_dim
    fields["latents_std"] = fields["latents_std"] or [1.0] * config.z_dim
    fields["patch_size"] = config.patch_size if config.patch_size > 1 else None
    channels = 3 * config.patch_size**2
    return {
        "_class_name": DIFFUSERS_CLASS,
        **{theirs: fields[own] for own, (theirs, _) in DIFFUSERS_FIELDS.items()},
        "attn_scales": [],
        "dropout": 0.0,
        "in_channels": channels,
        "out_channels": channels,
        "scale_factor_temporal": config.stride[0],
        "scale_factor_spatial": config.stride[1],
    }


def _inside(path: Path) -> Path:
    """The VAE within a model folder of several parts: `vae/` of a diffusers pipeline, `Wan2.1_VAE.pth` of an official one."""
    if path.is_dir():
        if (path / "model_index.json").exists() and (path / "vae").is_dir():
            return path / "vae"
        if files := sorted(file for file in path.glob("Wan2.*_VAE.*") if file.suffix in (*PICKLES, ".safetensors")):
            return files[0]
    return path


def _is_described(path: Path) -> bool:
    fields = read_config(path) or {}
    return str(fields.get("format", "")).startswith("wan-vae/") or fields.get("_class_name") == DIFFUSERS_CLASS


def _configured(path: Path) -> tuple[VAEConfig | None, bool]:
    """The configuration that a config.json gives, and whether names are diffusers'; None where it gives none."""
    fields = read_config(path) or {}
    if str(fields.get("format", "")).startswith("wan-vae/"):
        if fields.pop("format") != WanVAE.format:
            raise ValueError(f"'{path}' has another format version than {WanVAE.format}: update wan-vae")
        return _validated(fields, path), False
    if fields.get("_class_name") == DIFFUSERS_CLASS:
        values = {own: fields.get(theirs, default) for own, (theirs, default) in DIFFUSERS_FIELDS.items()}
        values["decoder_base_dim"] = values["decoder_base_dim"] or values["base_dim"]
        values["patch_size"] = values["patch_size"] or 1
        return _validated(values | {"latent_space": _space(values)}, path), True
    if fields and path.is_dir():
        raise ValueError(
            f"'{path}/config.json' is of a {fields.get('_class_name', 'model')}, expected format {WanVAE.format} or {DIFFUSERS_CLASS}"
        )
    return None, False


def _space(values: Mapping[str, Any]) -> str:
    """The published latent space whose statistics these are."""
    for preset in (WAN21, WAN22):
        if tuple(values["latents_mean"]) == preset.latents_mean and tuple(values["latents_std"]) == preset.latents_std:
            return preset.latent_space
    return UNKNOWN


def _validated(fields: Mapping[str, Any], path: Path) -> VAEConfig:
    try:
        return VAEConfig.model_validate(fields)
    except ValidationError as error:
        problems = "; ".join(f"{'.'.join(map(str, item['loc'])) or 'config'}: {item['msg']}" for item in error.errors())
        raise ValueError(f"the configuration of '{path}' is not valid: {problems}") from error


def _is_diffusers(shapes: Shapes) -> bool:
    return any(key.startswith("encoder.down_blocks.") for key in shapes)


def infer_config(shapes: Shapes, source: object = "checkpoint") -> VAEConfig:
    """The configuration of a checkpoint from its names (official or diffusers, no prefix) and shapes.

    Statistics are those of Wan2.1 or Wan2.2 where the layout is theirs at full or quarter width, else none.
    """

    def shape(official: str, diffusers: str) -> tuple[int, ...]:
        if found := shapes.get(official, shapes.get(diffusers)):
            return found
        raise ValueError(f"'{source}' is not a Wan VAE: it has neither '{official}' nor '{diffusers}'")

    conv_in = shape("encoder.conv1.weight", "encoder.conv_in.weight")
    z_dim = shape("conv2.bias", "post_quant_conv.bias")[0]
    decoder_dim = shape("decoder.head.0.gamma", "decoder.norm_out.gamma")[0]
    widths, blocks, times = _encoder_levels(shapes)
    if not widths:
        raise ValueError(f"'{source}' is not a Wan VAE: it has no encoder levels")
    mults = [width // conv_in[0] for width in widths]
    fields = {
        "base_dim": conv_in[0],
        "decoder_base_dim": decoder_dim // max(mults[0], 1),
        "z_dim": z_dim,
        "dim_mult": mults,
        "num_res_blocks": blocks,
        "temporal_downsample": times,
        "residual": any(re.match(r"encoder\.(downsamples\.\d+\.downsamples|down_blocks\.\d+\.resnets)\.", key) for key in shapes),
        "patch_size": math.isqrt(max(conv_in[1] // 3, 1)),
        "latent_space": UNKNOWN,
    }
    return _with_statistics(_validated(fields, Path(str(source))))


def _encoder_levels(shapes: Shapes) -> tuple[list[int], int, list[bool]]:
    """Width of every level, residual blocks a level, and for every level but the last whether it halves time.

    A level ends with its downsampler, so that the flat list of Wan2.1 and the nested one of Wan2.2 are read alike.
    """
    found = [
        (int(match[1]), match[2], shapes[key])
        for key in shapes
        if (match := re.match(r"encoder\.(?:downsamples|down_blocks)\.(\d+)\.(.+)", key))
    ]
    ends = sorted({index for index, name, _ in found if "resample." in name})
    widths, blocks, timed = defaultdict(list), defaultdict(set), set()
    for index, name, shape in found:
        level = sum(end < index for end in ends)
        if part := re.match(r"(.*?)(?:residual\.[236]|conv[12]|norm2)\.(?:weight|bias|gamma)$", name):
            widths[level].append(shape[0])
            blocks[level].add((index, part[1]))
        if "time_conv." in name:
            timed.add(level)
    levels = sorted(widths)
    return [mode(widths[i]) for i in levels], max((len(names) for names in blocks.values()), default=0), [i in timed for i in levels[:-1]]


def _with_statistics(config: VAEConfig) -> VAEConfig:
    for preset in (WAN21, WAN22):
        known = {"latents_mean": preset.latents_mean, "latents_std": preset.latents_std, "latent_space": preset.latent_space}
        for width in (1, 4):  # published models, and the pruned ones that share their latents
            dims = {"base_dim": preset.base_dim // width, "decoder_base_dim": preset.decoder_base_dim // width}
            if config.model_copy(update=known) == preset.model_copy(update=dims):
                return config.model_copy(update=known)
    return config


def _read_shapes(path: Path) -> Shapes:
    files = sorted(path.glob("*.safetensors")) if path.is_dir() else [path]
    if not files or any(file.suffix != ".safetensors" for file in files):
        header = read_state(path)
    else:
        header = {}
        for name in files:
            try:
                with safe_open(name, "pt") as file:
                    header |= {key: torch.empty(file.get_slice(key).get_shape(), device="meta") for key in file.keys()}  # noqa: SIM118
            except SafetensorError as error:
                raise ValueError(f"'{name}' is not a readable checkpoint: {error}") from error
    return {key: tuple(value.shape) for key, value in strip_prefix(header, PREFIXES).items()}

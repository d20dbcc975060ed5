"""Checkpoints of LTX-Video's VAE: ours, the official single file (alone or within a whole model) and diffusers' folder.

An official file carries its configuration in its metadata, as JSON under "config", and the statistics of the latents as tensors.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from pydantic import ValidationError
from safetensors import SafetensorError, safe_open

from .._shared.files import read_json
from .._shared.spec import UNKNOWN
from .._shared.weights import State, locate, read_config, rename
from ..contents import LTX, Shapes, check_one_dtype, kind_of, read_header, read_tensors, shapes_of
from ..layouts import problems
from ..plugins import VAESpec
from .ltx import LTXVAE, spec_of
from .ltx_config import PRESETS, LTXConfig
from .ltx_diffusers import DIFFUSERS_CLASS, diffusers_config, diffusers_names, from_diffusers

if TYPE_CHECKING:
    from collections.abc import Iterable

OFFICIAL_CLASS = "CausalVideoAutoencoder"
STATISTICS = "per_channel_statistics."
MEAN, STD = f"{STATISTICS}mean-of-means", f"{STATISTICS}std-of-means"
UNUSED = {f"{STATISTICS}{name}" for name in ("channel", "mean-of-stds", "mean-of-stds_over_std-of-means")}
CONFIG_FILES = ("config.json", "model_index.json", "vae/config.json")
# official field: the values that are known here, the first of which is the official default where it is given
FIXED: dict[str, tuple[Any, ...]] = {
    "dims": (3,), "in_channels": (3,), "out_channels": (3,), "scaling_factor": (1.0,), "norm_layer": ("pixel_norm",),
    "use_quant_conv": (False,), "normalize_latent_channels": (False,),
}  # fmt: skip
ASSUMED = {"norm_layer": "group_norm", "use_quant_conv": True}  # by the official code, where a field is not given
DEFAULTS: dict[str, Any] = {"patch_size": 1, "encoder_base_channels": 128, "decoder_base_channels": 128, "causal_decoder": False}
DEFAULTS |= {"timestep_conditioning": False, "spatial_padding_mode": "zeros"}
EXTRA = ("decode_timestep", "decode_noise_scale", "max_timestep", "latent_space")  # ours, which the official code does not read


def read_checkpoint(path: Path) -> tuple[LTXConfig, State]:
    """Configuration and tensors, in official names, of a checkpoint in any layout of this VAE.

    The configuration is that of a config.json of ours or diffusers', or in the metadata of an official file; a file without
    is told by its tensors where it is one of the released ones. ValueError names what is missing, extra or wrong.
    """
    path = inside(path)
    state = {key: value for key, value in read_tensors(path).items() if key not in UNUSED}
    refuse_others(state, path)
    config = read_configuration(path) or infer_config(shapes_of(state), path)
    state, mean, std = _renamed(config, state, path)
    if not _is_ours(path):
        check_one_dtype({key: value for key, value in state.items() if value.ndim}, path)
    # products of matrices and vectors round by where in memory the matrix begins, which in a file may be anywhere
    state = {key: value.clone() if value.ndim == 2 else value for key, value in state.items()}
    if std is not None:
        config = _with_statistics(config, torch.zeros_like(std) if mean is None else mean, std, path)
    return config, state


def _renamed(config: LTXConfig, state: State, path: Path) -> tuple[State, torch.Tensor | None, torch.Tensor | None]:
    """The tensors under their own names, and mean and deviation of the latents. ValueError where some are missing, or are too many."""
    theirs = any(".resnets." in key for key in state)
    mean, std = ("latents_mean", "latents_std") if theirs else (MEAN, STD)
    names = LTXVAE.official_names(config)
    names = diffusers_names(config, list(names)) if theirs else names
    rest = {key: value for key, value in state.items() if key not in (mean, std)}
    return rename(rest, {name: own for own, name in names.items()}, path), state.get(mean), state.get(std)


def describe(path: str | os.PathLike[str]) -> VAESpec:
    """The facts of a checkpoint of this VAE, from its configuration or the names and shapes in its header; reads no weights."""
    file = inside(locate(path, CONFIG_FILES))
    config = read_configuration(file)
    if config is None:
        file = inside(locate(path, LTXVAE.hub_files, LTXVAE.hub_fallback))
        header = read_header(file)
        refuse_others(header, file)
        config = infer_config(shapes_of(header), file)
    elif file.is_file() and file.suffix == ".safetensors":  # a file alone can be told to be whole
        _renamed(config, {key: value for key, value in read_header(file).items() if key not in UNUSED}, file)
    with torch.device("meta"):
        return replace(spec_of(config), parameters=sum(parameter.numel() for parameter in LTXVAE(config).parameters()))


def inside(path: Path) -> Path:
    """The VAE within a folder of several parts: `vae/` of a pipeline of diffusers; an index of shards stands for its folder."""
    if path.is_dir() and (path / "model_index.json").exists() and (path / "vae").is_dir():
        return path / "vae"
    return path.parent if path.name.endswith(".index.json") else path


def read_configuration(path: Path) -> LTXConfig | None:
    """The configuration of a config.json of ours, in a file's metadata or of a config.json of diffusers'; None where there is none."""
    fields = read_config(path) or {}
    if fields.get("format") == LTXVAE.format:
        return _validated({key: value for key, value in fields.items() if key != "format"}, path)
    if (official := _metadata(path).get("config")) is not None:
        try:
            said = json.loads(official)
            if not isinstance(said, dict) or not isinstance(said.get("vae"), dict):
                raise ValueError("there is no object 'vae' in the configuration in its metadata")
            config = named(_from_official(said["vae"]), path)
            _check_official(config)
            return config
        except (json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"'{path}': the configuration in its metadata cannot be read: {type(error).__name__}: {error}") from error
        except ValueError as error:
            raise ValueError(f"'{path}' holds a VAE of LTX-Video that is not known here: {error}") from error
    if fields.get("_class_name") == DIFFUSERS_CLASS:
        try:
            return named(from_diffusers(fields), path)
        except (IndexError, KeyError, TypeError, ValueError) as error:
            raise ValueError(f"the configuration of '{path}' is not valid: {type(error).__name__}: {error}") from error
    return None


def infer_config(shapes: Shapes, source: object) -> LTXConfig:
    """The configuration of a checkpoint that has none, by its names and shapes: one of the released ones. ValueError where it is none."""
    shapes = {key: shape for key, shape in shapes.items() if not key.startswith((STATISTICS, "latents_"))}
    for config in PRESETS.values():
        with torch.device("meta"):
            own = shapes_of(LTXVAE(config).state_dict())
        if shapes in (own, {name: own[key] for key, name in diffusers_names(config, list(own)).items()}):
            return config
    raise ValueError(
        f"'{source}' holds a VAE of LTX-Video without a configuration, and its tensors are of none of the released ones "
        f"({', '.join(PRESETS)}): expected it in the metadata of a .safetensors file, or in a config.json"
    )


def refuse_others(names: Iterable[str], source: object) -> None:
    """ValueError where the names are of something else than this VAE."""
    kind = kind_of(names)
    if kind != LTX:
        raise ValueError(f"'{source}' is not {LTX}: it holds {kind or 'none of its tensors'}")


def official_config(config: LTXConfig) -> dict[str, Any]:
    """The configuration as official files have it, with the fields that only we read at its end."""
    fixed = {name: values[0] for name, values in FIXED.items()}
    fields = config.model_dump(mode="json", exclude={"latents_mean", "latents_std", *EXTRA})
    return {"_class_name": OFFICIAL_CLASS, **fixed, **fields, **{name: getattr(config, name) for name in EXTRA}}


def to_official(vae: LTXVAE) -> tuple[dict[str, str], State]:
    """The metadata and the tensors of a .safetensors file as the official code and ComfyUI read it.

    ValueError for blocks of the decoder that the official code would run otherwise.
    """
    _check_official(vae.config)
    return {"config": json.dumps({"vae": official_config(vae.config)})}, _state(vae, MEAN, STD)


def to_diffusers(vae: LTXVAE) -> tuple[dict[str, Any], State]:
    """config.json and the tensors of a folder that `AutoencoderKLLTXVideo.from_pretrained` reads.

    ValueError for an architecture that it does not have.
    """
    config, names = diffusers_config(vae.config), diffusers_names(vae.config, list(vae.state_dict()))
    return config, {names.get(key, key): value for key, value in _state(vae, "latents_mean", "latents_std").items()}


def _state(vae: LTXVAE, mean: str, std: str) -> State:
    """All tensors, and the statistics under these names: 0 and 1 where there are none, in fp32 where the weights' type would round."""
    state = {key: value.detach().to("cpu").contiguous() for key, value in vae.state_dict().items()}
    wide = vae.config.latent_channels
    for name, values in ((mean, vae.config.latents_mean or (0.0,) * wide), (std, vae.config.latents_std or (1.0,) * wide)):
        exact = torch.tensor(values)
        narrow = exact.to(vae.last_layer.dtype)
        state[name] = narrow if torch.equal(narrow.float(), exact) else exact
    return state


def _from_official(fields: Mapping[str, Any]) -> dict[str, Any]:
    if (kind := fields.get("_class_name", OFFICIAL_CLASS)) != OFFICIAL_CLASS:
        raise ValueError(f"_class_name is '{kind}', expected '{OFFICIAL_CLASS}'")
    for name, values in FIXED.items():
        value = fields.get(name, ASSUMED.get(name, values[0]))
        if value not in values:
            raise ValueError(f"{name} is {value!r}, expected {values[0]!r}")
    if unknown := [name for name in fields if "padding" in name and name not in DEFAULTS]:  # LTX-2's, under the same _class_name
        raise ValueError(f"its configuration has {', '.join(unknown)}, as later models have it")
    if missing := [name for name in ("encoder_blocks", "decoder_blocks") if not isinstance(fields.get(name, fields.get("blocks")), list)]:
        raise ValueError(f"its configuration has no list {missing[0]}")
    logvar = fields.get("latent_log_var", "per_channel" if fields.get("double_z", True) else "none")
    blocks = {name: fields.get(name, fields.get("blocks")) for name in ("encoder_blocks", "decoder_blocks")}
    own = {name: fields[name] for name in EXTRA if name in fields}
    given = {name: fields.get(name, default) for name, default in DEFAULTS.items()}
    return {**blocks, **given, **own, "latent_log_var": logvar, "latent_channels": fields["latent_channels"]}


def _check_official(config: LTXConfig) -> None:
    for block in config.decoder_blocks:
        if block.kind in ("compress_time", "compress_space") and (block.residual or block.factor > 1):
            raise ValueError(f"'{block.kind}' with residual or multiplier: the official code heeds them in 'compress_all' alone")


def named(fields: Mapping[str, Any], path: Path) -> LTXConfig:
    """The configuration, with the latent space of the released VAE that it is of, where it says none."""
    config = _validated({"latent_space": UNKNOWN, **fields}, path)
    if "latent_space" in fields:
        return config
    space = next((preset.latent_space for preset in PRESETS.values() if preset.architecture == config.architecture), UNKNOWN)
    return config.model_copy(update={"latent_space": space})


def _with_statistics(config: LTXConfig, mean: torch.Tensor, std: torch.Tensor, path: Path) -> LTXConfig:
    values = {"latents_mean": tuple(mean.float().tolist()), "latents_std": tuple(std.float().tolist())}
    if not any(values["latents_mean"]) and all(value == 1 for value in values["latents_std"]):
        return config
    return _validated({**config.model_dump(), **values}, path)


def _validated(fields: Mapping[str, Any], path: Path) -> LTXConfig:
    try:
        return LTXConfig.model_validate(fields)
    except ValidationError as error:
        raise ValueError(f"the configuration of '{path}' is not valid: {problems(error)}") from error


def _metadata(path: Path) -> dict[str, str]:
    """The metadata of a .safetensors file, or of the only one in a folder; empty where there are none."""
    files = sorted(path.glob("*.safetensors")) if path.is_dir() else [path]
    if len(files) != 1 or files[0].suffix != ".safetensors":
        return {}
    try:
        with safe_open(files[0], "pt") as file:
            return dict(file.metadata() or {})
    except (SafetensorError, OSError):  # told where its tensors are read
        return {}


def _is_ours(path: Path) -> bool:
    config = path / "config.json" if path.is_dir() else path.with_name("config.json")
    return config.exists() and read_json(config).get("format") == LTXVAE.format

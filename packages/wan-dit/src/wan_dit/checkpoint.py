"""Checkpoint layouts of the transformer as tables of names: own, official (Wan-Video, ComfyUI) and diffusers.

Read: our folders, official folders (sharded or not), diffusers folders, and single files in official or diffusers names
with or without ComfyUI's prefix. Where no `config.json` says it, the configuration comes from the shapes of the tensors.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

from pydantic import ValidationError
from safetensors import safe_open

from ._shared.spec import UNKNOWN
from ._shared.weights import State, locate, read_config, read_state, rename, strip_prefix
from .config import DiTConfig
from .plugins import BackboneSpec

Layout = Literal["official", "diffusers"]
Shape = tuple[int, ...]

FORMAT = "wan-dit/1"
PREFIXES = ("model.diffusion_model.", "diffusion_model.")
HUB_FILES = ("config.json", "model_index.json", "model*.safetensors*", "diffusion_pytorch_model*", "transformer/*")
CONFIG_FILES = ("config.json", "model_index.json", "transformer/config.json")
HEAD_DIM = 128  # of every released model; no tensor shape tells it


class Row(NamedTuple):
    """One layer's name in each layout, and the ends that its tensors' names have there."""

    own: str
    official: str
    diffusers: str
    ends: tuple[str, ...]


_LAYER, _NORM, _TENSOR = (".weight", ".bias"), (".weight",), ("",)
TOP = (
    Row("patch_embedding", "patch_embedding", "patch_embedding", _LAYER),
    Row("context_embedder.0", "text_embedding.0", "condition_embedder.text_embedder.linear_1", _LAYER),
    Row("context_embedder.2", "text_embedding.2", "condition_embedder.text_embedder.linear_2", _LAYER),
    Row("time_embedding.0", "time_embedding.0", "condition_embedder.time_embedder.linear_1", _LAYER),
    Row("time_embedding.2", "time_embedding.2", "condition_embedder.time_embedder.linear_2", _LAYER),
    Row("time_projection.1", "time_projection.1", "condition_embedder.time_proj", _LAYER),
    Row("head.proj", "head.head", "proj_out", _LAYER),
    Row("head.modulation", "head.modulation", "scale_shift_table", _TENSOR),
)
BLOCK = (
    Row("modulation", "modulation", "scale_shift_table", _TENSOR),
    Row("self_attn.q", "self_attn.q", "attn1.to_q", _LAYER),
    Row("self_attn.k", "self_attn.k", "attn1.to_k", _LAYER),
    Row("self_attn.v", "self_attn.v", "attn1.to_v", _LAYER),
    Row("self_attn.o", "self_attn.o", "attn1.to_out.0", _LAYER),
    Row("cross_attn.q", "cross_attn.q", "attn2.to_q", _LAYER),
    Row("cross_attn.k", "cross_attn.k", "attn2.to_k", _LAYER),
    Row("cross_attn.v", "cross_attn.v", "attn2.to_v", _LAYER),
    Row("cross_attn.o", "cross_attn.o", "attn2.to_out.0", _LAYER),
    Row("ffn.0", "ffn.0", "ffn.net.0.proj", _LAYER),
    Row("ffn.2", "ffn.2", "ffn.net.2", _LAYER),
)
QK_NORM = (
    Row("self_attn.norm_q", "self_attn.norm_q", "attn1.norm_q", _NORM),
    Row("self_attn.norm_k", "self_attn.norm_k", "attn1.norm_k", _NORM),
    Row("cross_attn.norm_q", "cross_attn.norm_q", "attn2.norm_q", _NORM),
    Row("cross_attn.norm_k", "cross_attn.norm_k", "attn2.norm_k", _NORM),
)
CROSS_NORM = (Row("norm3", "norm3", "norm2", _LAYER),)

# fields of the other config.json; what is not written there has the value of the released models
OFFICIAL_FIELDS = (
    *("patch_size", "in_dim", "out_dim", "dim", "ffn_dim", "freq_dim", "text_dim", "text_len"),
    *("num_heads", "num_layers", "qk_norm", "cross_attn_norm", "eps"),
)
DIFFUSERS_FIELDS = {  # own: theirs
    "patch_size": "patch_size",
    "in_dim": "in_channels",
    "out_dim": "out_channels",
    "ffn_dim": "ffn_dim",
    "freq_dim": "freq_dim",
    "text_dim": "text_dim",
    "num_heads": "num_attention_heads",
    "num_layers": "num_layers",
    "cross_attn_norm": "cross_attn_norm",
    "eps": "eps",
}
# latent channels -> (latent space, stride) of the released VAEs
LATENTS = {16: ("wan2.1", (4, 8, 8)), 48: ("wan2.2", (4, 16, 16))}
UNSUPPORTED = {
    "img_emb.": "image conditioning through CLIP (Wan2.1 I2V and FLF2V)",
    "image_embedder.": "image conditioning through CLIP (Wan2.1 I2V and FLF2V)",
    "vace_": "VACE",
    "pose_patch_embedding": "Wan2.2 Animate",
    "casual_audio_encoder": "Wan2.2 S2V",
    "ref_conv": "Fun control with a reference image",
    "control_adapter": "Fun camera control",
    "scaled_fp8": "scaled fp8 storage",
    "scale_weight": "scaled fp8 storage",
    "weight_scale": "scaled fp8 storage",
}


def names(config: DiTConfig, layout: Layout) -> dict[str, str]:
    """Every tensor of a model of this configuration: own name -> name in `layout`, a bijection."""
    block = (*BLOCK, *(QK_NORM if config.qk_norm else ()), *(CROSS_NORM if config.cross_attn_norm else ()))
    table = {row.own + end: getattr(row, layout) + end for row in TOP for end in row.ends}
    for i in range(config.num_layers):
        table |= {f"trunk.blocks.{i}.{row.own}{end}": f"blocks.{i}.{getattr(row, layout)}{end}" for row in block for end in row.ends}
    return table


def read_checkpoint(path: Path) -> tuple[DiTConfig, State]:
    """Configuration and tensors, in our names, of a checkpoint in any layout; ValueError names what does not fit."""
    path = _weights_folder(path)
    state = strip_prefix(read_state(path), PREFIXES)
    config = config_of(path, {key: tuple(value.shape) for key, value in state.items()})
    table = {theirs: own for own, theirs in names(config, _layout(state, path)).items()}
    return config, rename(state, table, path)


def describe(path: str | os.PathLike[str]) -> BackboneSpec:
    """The facts of a checkpoint from its `config.json`, or from the header of its file; reads no weights."""
    return config_of(_weights_folder(locate(path, CONFIG_FILES)), None).spec(str(path), weights=str(path))


def config_of(path: Path, shapes: Mapping[str, Shape] | None) -> DiTConfig:
    """The configuration written beside the weights in any layout, else the one their shapes tell.

    shapes: tensors of the checkpoint, without prefix; None reads them from its header where they are needed.
    """
    written = read_config(path) or {}
    kind = written.get("format") or written.get("_class_name")
    try:
        if kind == FORMAT:
            return DiTConfig.model_validate({key: value for key, value in written.items() if key != "format"})
        if kind is not None and kind not in ("WanModel", "WanTransformer3DModel"):
            raise ValueError(f"its config.json says '{kind}', expected '{FORMAT}', 'WanModel' or 'WanTransformer3DModel'")
        if kind == "WanModel":
            return _from_official(written)
        if kind == "WanTransformer3DModel":
            return _from_diffusers(written)
    except ValidationError as error:
        problems = "; ".join(f"{'.'.join(map(str, item['loc']))}: {item['msg']}" for item in error.errors())
        raise ValueError(f"config.json of '{path}' is not valid: {problems}") from error
    except ValueError as error:
        raise ValueError(f"'{path}' is not a checkpoint of this backbone: {error}") from error
    return _from_shapes(shapes if shapes is not None else _header(path), path)


def _from_official(written: Mapping[str, Any]) -> DiTConfig:
    if tuple(written.get("window_size", (-1, -1))) != (-1, -1):
        raise ValueError(f"window_size {written['window_size']} is not supported: released models attend globally, [-1, -1]")
    if written.get("model_type") not in (None, "t2v", "ti2v", "i2v"):
        raise ValueError(f"model_type '{written['model_type']}' is not supported yet")
    return _with_spaces({name: written[name] for name in OFFICIAL_FIELDS if name in written})


def _from_diffusers(written: Mapping[str, Any]) -> DiTConfig:
    if written.get("image_dim") is not None or written.get("added_kv_proj_dim") is not None:
        raise ValueError(f"{UNSUPPORTED['img_emb.']} is not supported yet")
    fields = {own: written[theirs] for own, theirs in DIFFUSERS_FIELDS.items() if theirs in written}
    # its qk_norm is no choice: diffusers builds the norms whatever it says
    return _with_spaces(fields | {"dim": written["num_attention_heads"] * written["attention_head_dim"]})


def _from_shapes(shapes: Mapping[str, Shape], path: Path) -> DiTConfig:
    """T2V models alone: what else a file holds is an error that says what it is."""
    layout = _layout(shapes, path)
    top = {row.own: getattr(row, layout) for row in TOP}
    block = {row.own: f"blocks.0.{getattr(row, layout)}" for row in (*BLOCK, *QK_NORM, *CROSS_NORM)}
    try:
        dim, in_dim, *patch = shapes[top["patch_embedding"] + ".weight"]
        fields = {
            "patch_size": tuple(patch),
            "in_dim": in_dim,
            "out_dim": shapes[top["head.proj"] + ".weight"][0] // (patch[0] * patch[1] * patch[2]),
            "dim": dim,
            "ffn_dim": shapes[block["ffn.0"] + ".weight"][0],
            "freq_dim": shapes[top["time_embedding.0"] + ".weight"][1],
            "text_dim": shapes[top["context_embedder.0"] + ".weight"][1],
            "num_heads": max(dim // HEAD_DIM, 1),
            "num_layers": 1 + max(int(key.split(".")[1]) for key in shapes if key.startswith("blocks.")),
            "qk_norm": block["self_attn.norm_q"] + ".weight" in shapes,
            "cross_attn_norm": block["norm3"] + ".weight" in shapes,
        }
    except KeyError as error:
        raise ValueError(f"'{path}' has no tensor {error}: it is not a complete {layout} checkpoint of this backbone") from error
    return _with_spaces(fields)


def _with_spaces(fields: dict[str, Any]) -> DiTConfig:
    """Released models differ in their VAE by channels alone and share one text encoder; anything else is unknown."""
    config = DiTConfig(**fields)
    space, stride = LATENTS.get(config.out_dim, (UNKNOWN, (4, 8, 8)))
    text = "umt5-xxl" if config.text_dim == 4096 else UNKNOWN
    return config.model_copy(update={"latent_space": space, "stride": stride, "embedding_space": text})


def _layout(keys: Mapping[str, Any], path: Path) -> Layout:
    for key in keys:
        for part, what in UNSUPPORTED.items():
            if part in key:
                raise ValueError(f"'{path}' holds '{key}': {what} is not supported yet")
    if "time_projection.1.weight" in keys:
        return "official"
    if "condition_embedder.time_proj.weight" in keys:
        return "diffusers"
    first = ", ".join(sorted(keys)[:3])
    raise ValueError(f"'{path}' is no Wan backbone: neither official nor diffusers names in it (it starts with {first})")


def _weights_folder(path: Path) -> Path:
    """The folder of the transformer in a whole diffusers pipeline; an error that says which where there are two experts."""
    if (path / "high_noise_model").is_dir():
        raise ValueError(f"'{path}' holds two experts: give '{path / 'high_noise_model'}' or '{path / 'low_noise_model'}'")
    return path / "transformer" if (path / "model_index.json").exists() else path


def _header(path: Path) -> dict[str, Shape]:
    """Shapes of all tensors of a file or folder, without prefix; safetensors are read by their headers."""
    files = sorted(path.glob("*.safetensors")) if path.is_dir() else [path]
    if not files or files[0].suffix != ".safetensors":
        return {key: tuple(value.shape) for key, value in strip_prefix(read_state(path), PREFIXES).items()}
    shapes: dict[str, Any] = {}
    for file in files:
        try:
            with safe_open(file, "pt") as opened:
                shapes |= {key: tuple(opened.get_slice(key).get_shape()) for key in opened.keys()}  # noqa: SIM118 (not a mapping)
        except OSError:
            raise
        except Exception as error:
            raise ValueError(f"'{file}' is not a readable checkpoint: {type(error).__name__}: {error}") from error
    return dict[str, Any](strip_prefix(shapes, PREFIXES))

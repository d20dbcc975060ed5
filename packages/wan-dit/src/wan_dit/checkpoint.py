"""Reads the transformer in every layout that it is published in (`layouts`): whatever the container, packed or not.

Read: our folders, official folders (sharded or not), diffusers folders, single files in official or diffusers names with or
without a prefix, fp8 with and without scales, and GGUF; `BASE+MODULE` adds a file of VACE blocks alone. The configuration is
that of `config.json` where there is one; what that does not tell, and all of it where there is none, comes from the names
and shapes of the tensors.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from pydantic import ValidationError
from safetensors import safe_open
from torch import Tensor

from ._shared.files import joined, read_json
from ._shared.gguf_file import read_gguf
from ._shared.packed import PackedState, join_scales
from ._shared.spec import UNKNOWN
from ._shared.weights import locate, read_config, read_state, refuse_pointer, rename, strip_prefix
from .conditions import CAMERA_DOWNSCALE
from .config import DiTConfig
from .layouts import (
    BLOCK,
    CROSS_NORM,
    DIFFUSERS_CLASSES,
    DIFFUSERS_FIELDS,
    OFFICIAL_CLASSES,
    OFFICIAL_FIELDS,
    QK_NORM,
    TOP,
    UNSUPPORTED,
    Layout,
    names,
)
from .plugins import BackboneSpec

V = TypeVar("V")
Shape = tuple[int, ...]
Shapes = Mapping[str, Shape | None]  # None where only the name is known

FORMAT = "wan-dit/1"
PREFIXES = ("model.diffusion_model.", "diffusion_model.", "module.", "net.")
INDEX = "*.safetensors.index.json"
HUB_FILES = ("config.json", "model_index.json", "model*.safetensors*", "diffusion_pytorch_model*", "transformer/*")
CONFIG_FILES = ("config.json", "model_index.json", "transformer/config.json", INDEX, f"transformer/{INDEX}")
HEAD_DIM = 128  # of every released model; no tensor shape tells it
CLIP_DIM, CLIP_TOKENS = 1280, 257
# latent channels -> (latent space, stride) of the released VAEs
LATENTS = {16: ("wan2.1", (4, 8, 8)), 48: ("wan2.2", (4, 16, 16))}
SHAPE_FIELD = "comfy.gguf.orig_shape."  # GGUF holds at most four axes


def read_checkpoint(path: Path) -> tuple[DiTConfig, PackedState]:
    """Configuration and tensors, in our names, of a checkpoint in any layout; packed tensors stay packed, nothing is copied.

    ValueError names what does not fit.
    """
    path = weights_folder(path)
    state = read_tensors(path)
    config = config_of(path, {key: tuple(value.shape) for key, value in state.items()})
    table = {theirs: own for own, theirs in names(config, layout_of(state, path)).items()}
    return config, rename(state, table, path)


def read_tensors(path: Path) -> PackedState:
    """All tensors of a file or folder, without prefix, in the names they have there; scales are joined with their weights."""
    if len(paths := joined(path)) > 1:
        states = [read_tensors(part) for part in paths]
        return _merged(states, path)
    if path.suffix != ".gguf":
        return join_scales(strip_prefix(read_state(path), PREFIXES), path)
    found = read_gguf(path)
    state: PackedState = dict(strip_prefix(dict[str, Any](found.tensors), PREFIXES))
    for key, value in found.metadata.items():
        name = key.removeprefix(SHAPE_FIELD)
        if name != key and name in state:
            stored = state[name]
            state[name] = (stored if isinstance(stored, Tensor) else stored[:]).reshape([int(size) for size in value])
    return state


def _merged(parts: list[dict[str, V]], path: Path) -> dict[str, V]:
    """The tensors of several files; ValueError where one is in two of them."""
    found: dict[str, V] = {}
    for part in parts:
        if twice := found.keys() & part.keys():
            raise ValueError(f"'{path}': tensor '{min(twice)}' is in several of these files: they are not a model and a module for it")
        found |= part
    return found


def describe(path: str | os.PathLike[str]) -> BackboneSpec:
    """The facts of a checkpoint from its `config.json`, or from the header of its file; reads no weights."""
    return config_of(weights_folder(locate(path, CONFIG_FILES)), None).spec(str(path), weights=str(path))


def config_of(path: Path, shapes: Mapping[str, Shape] | None) -> DiTConfig:
    """The configuration written beside the weights in any layout, with what the weights tell, or all from their shapes.

    shapes: tensors of the checkpoint, without prefix; None reads them from its header or index where they are needed.
    """
    if len(parts := joined(path)) > 1:
        added = _branches(shapes if shapes is not None else header(path), {})
        vace = {name: value for name, value in added.items() if name in ("vace_layers", "vace_in_dim")}
        return DiTConfig(**{**config_of(parts[0], None).model_dump(), **vace})
    written = read_config(path) or {}
    kind = written.get("format") or written.get("_class_name")
    try:
        if kind == FORMAT:
            return DiTConfig.model_validate({key: value for key, value in written.items() if key != "format"})
        if kind is not None and kind not in (*OFFICIAL_CLASSES, *DIFFUSERS_CLASSES):
            expected = ", ".join(f"'{name}'" for name in (FORMAT, *OFFICIAL_CLASSES, *DIFFUSERS_CLASSES))
            raise ValueError(f"its config.json says '{kind}', expected one of {expected}")
        if kind in OFFICIAL_CLASSES:
            return _with_spaces({**_from_official(written), **_branches(shapes if shapes is not None else header(path), written)})
        if kind in DIFFUSERS_CLASSES:
            return _with_spaces(_from_diffusers(written))
    except ValidationError as error:
        problems = "; ".join(f"{'.'.join(map(str, item['loc']))}: {item['msg']}" for item in error.errors())
        raise ValueError(f"config.json of '{path}' is not valid: {problems}") from error
    except ValueError as error:
        raise ValueError(f"'{path}' is not a checkpoint of this backbone: {error}") from error
    return _from_shapes(shapes if shapes is not None else header(path), path)


def _from_official(written: Mapping[str, Any]) -> dict[str, Any]:
    if tuple(written.get("window_size", (-1, -1))) != (-1, -1):
        raise ValueError(f"window_size {written['window_size']} is not supported: released models attend globally, [-1, -1]")
    if (kind := written.get("model_type")) in ("s2v", "animate"):
        raise ValueError(f"model_type '{kind}' is not supported yet")
    return {name: written[name] for name in OFFICIAL_FIELDS if name in written}


def _from_diffusers(written: Mapping[str, Any]) -> dict[str, Any]:
    fields = {own: written[theirs] for own, theirs in DIFFUSERS_FIELDS.items() if theirs in written}
    # its qk_norm is no choice: diffusers builds the norms whatever it says
    return {**fields, "dim": written["num_attention_heads"] * written["attention_head_dim"]}


def _branches(shapes: Shapes, written: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of the parts that no official config.json tells, from names and shapes: a Wan2.2 I2V has no CLIP branch."""

    def width(key: str, axis: int, default: int) -> int:
        shape = shapes[key]
        return default if shape is None else shape[axis]

    found: dict[str, Any] = {}
    for norm, positions in (
        ("img_emb.proj.0.weight", "img_emb.emb_pos"),
        ("condition_embedder.image_embedder.norm1.weight", "condition_embedder.image_embedder.pos_embed"),
    ):
        if norm in shapes:
            found["image_dim"] = width(norm, 0, CLIP_DIM)
        if positions in shapes:
            found["pos_embed_seq_len"] = width(positions, 1, 2 * CLIP_TOKENS)
    if "ref_conv.weight" in shapes:
        found["ref_dim"] = width("ref_conv.weight", 1, 16)
    if "control_adapter.conv.weight" in shapes:
        found["camera_dim"] = width("control_adapter.conv.weight", 1, 24 * CAMERA_DOWNSCALE**2) // CAMERA_DOWNSCALE**2
    if "vace_patch_embedding.weight" in shapes and "vace_layers" not in written:
        count, layers = (_blocks(shapes, name) for name in ("vace_blocks", "blocks"))
        found["vace_layers"] = tuple(range(0, layers, max(1, layers // count)))[:count]
        found["vace_in_dim"] = width("vace_patch_embedding.weight", 1, 96)
    return found


def _blocks(shapes: Shapes, name: str) -> int:
    numbers = [int(found[1]) for key in shapes if (found := re.match(rf"{name}\.(\d+)\.", key))]
    return 1 + max(numbers, default=-1)


def _from_shapes(shapes: Shapes, path: Path) -> DiTConfig:
    layout = layout_of(shapes, path)
    top = {row.own: getattr(row, layout) for row in TOP}
    block = {row.own: f"blocks.0.{getattr(row, layout)}" for row in (*BLOCK, *QK_NORM, *CROSS_NORM)}

    def shape(name: str) -> Shape:
        if (found := shapes[name + ".weight"]) is None:
            raise KeyError(name + ".weight")
        return found

    try:
        dim, in_dim, *patch = shape(top["patch_embedding"])
        fields = {
            "patch_size": tuple(patch),
            "in_dim": in_dim,
            "out_dim": shape(top["head.proj"])[0] // (patch[0] * patch[1] * patch[2]),
            "dim": dim,
            "ffn_dim": shape(block["ffn.0"])[0],
            "freq_dim": shape(top["time_embedding.0"])[1],
            "text_dim": shape(top["context_embedder.0"])[1],
            "num_heads": max(dim // HEAD_DIM, 1),
            "num_layers": _blocks(shapes, "blocks"),
            "qk_norm": block["self_attn.norm_q"] + ".weight" in shapes,
            "cross_attn_norm": block["norm3"] + ".weight" in shapes,
        }
    except (KeyError, ValueError, IndexError) as error:
        raise ValueError(f"'{path}' has no tensor {error}: it is not a complete {layout} checkpoint of this backbone") from error
    return _with_spaces({**fields, **_branches(shapes, {})})


def _with_spaces(fields: dict[str, Any]) -> DiTConfig:
    """Released models differ in their VAE by channels alone and share one text encoder; anything else is unknown."""
    config = DiTConfig(**fields)
    space, stride = LATENTS.get(config.out_dim, (UNKNOWN, (4, 8, 8)))
    text = "umt5-xxl" if config.text_dim == 4096 else UNKNOWN
    return config.model_copy(update={"latent_space": space, "stride": stride, "embedding_space": text})


def layout_of(keys: Mapping[str, Any], path: Path) -> Layout:
    """Which names a checkpoint has; ValueError that says what it is where it is no backbone, or one of another kind."""
    for key in keys:
        for part, what in UNSUPPORTED.items():
            if part in key:
                raise ValueError(f"'{path}' holds '{key}': {what} is not supported yet")
    if "time_projection.1.weight" in keys:
        return "official"
    if "condition_embedder.time_proj.weight" in keys:
        return "diffusers"
    if any(key.startswith("vace_") for key in keys):
        raise ValueError(f"'{path}' holds VACE blocks alone: they are read with the text-to-video model they are added to, as MODEL+{path}")
    first = ", ".join(sorted(keys)[:3])
    raise ValueError(f"'{path}' is no Wan backbone: neither official nor diffusers names in it (it starts with {first})")


def weights_folder(path: Path) -> Path:
    """The folder of the transformer in a whole diffusers pipeline; an error that says which where there are two experts."""
    if len(parts := joined(path)) > 1:
        return Path("+".join(str(weights_folder(part)) for part in parts))
    if (path / "high_noise_model").is_dir():
        raise ValueError(f"'{path}' holds two experts: give '{path / 'high_noise_model'}' or '{path / 'low_noise_model'}'")
    return path / "transformer" if (path / "model_index.json").exists() else path


def header(path: Path) -> Shapes:
    """Shapes of all tensors of a file or folder, without prefix; safetensors are read by their headers, or their index alone."""
    if len(parts := joined(path)) > 1:
        return _merged([dict(header(part)) for part in parts], path)
    files = sorted(path.glob("*.safetensors")) if path.is_dir() else [path]
    if not files and path.is_dir() and (index := next(path.glob(INDEX), None)):
        return dict[str, Any](strip_prefix(dict.fromkeys(read_json(index)["weight_map"]), PREFIXES))  # type: ignore[arg-type]
    if not files and path.is_dir() and not [file for file in path.iterdir() if file.suffix in (".pth", ".pt", ".bin", ".ckpt")]:
        return {}
    if not files or files[0].suffix != ".safetensors":
        return {key: tuple(value.shape) for key, value in read_tensors(path).items()}
    shapes: dict[str, Any] = {}
    for file in files:
        refuse_pointer(file)
        try:
            with safe_open(file, "np") as opened:  # as "pt" it reserves as much memory as the file is large
                shapes |= {key: tuple(opened.get_slice(key).get_shape()) for key in opened.keys()}  # noqa: SIM118 (not a mapping)
        except OSError:
            raise
        except Exception as error:
            raise ValueError(f"'{file}' is not a readable checkpoint: {type(error).__name__}: {error}") from error
    return dict[str, Any](strip_prefix(shapes, PREFIXES))

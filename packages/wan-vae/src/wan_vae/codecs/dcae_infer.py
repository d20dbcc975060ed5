"""The configuration of a DC-AE that has none beside it: by its name, or from the names and shapes of its tensors."""

from __future__ import annotations

import re
from collections import defaultdict
from pathlib import Path
from typing import Any

from ..contents import DCAE, Shapes, kind_of
from .dcae_config import HALVES, PRESETS, DCAEConfig, Half, validated
from .dcae_diffusers import DIFFUSERS_CLASS, with_space


def infer_config(shapes: Shapes, source: Path) -> DCAEConfig:
    """The configuration of a checkpoint in official names, from the shapes of its tensors.

    Shapes do not tell the scaling factor, and nothing tells those of the models on ImageNet and on a mixture apart: it is that of
    the release whose name is in the name of the file, of its folder or of its repository, if the shapes agree; that of Sana's
    models where the encoder is theirs; else 1, and the latent space is unknown.
    ValueError says what the file is where it has another layout.
    """
    if (kind := kind_of(shapes)) != DCAE:
        raise ValueError(f"'{source}' is not {DCAE}: it holds {kind or 'none of its tensors'}")
    if is_diffusers(shapes):
        raise ValueError(f"'{source}' is {DCAE} in diffusers' names without its config.json: give the folder of {DIFFUSERS_CLASS}")

    def size(key: str, axis: int) -> int:
        if len(shapes.get(key, ())) <= axis:
            raise ValueError(f"'{source}' does not fit {DCAE}: missing or misshapen '{key}'")
        return shapes[key][axis]

    def shortcut(half: Half, place: str) -> bool:
        return f"{half}.{place}.weight" in shapes

    fields: dict[str, Any] = {
        "encoder_shortcut": shortcut("encoder", "project_out.main.op_list.0.conv"),
        "decoder_shortcut": shortcut("decoder", "project_in.main.conv"),
        "downsample": "pixel_unshuffle" if any(re.match(r"encoder\.stages\..*\.main\.conv\.conv\.", key) for key in shapes) else "conv",
    }
    for half in HALVES:
        fields |= _stages(half, shapes, source)
    place = "project_out.main.op_list.0" if fields["encoder_shortcut"] else "project_out.op_list.0"
    fields["z_dim"] = size(f"encoder.{place}.conv.weight", 0)
    level = min(i for i, depth in enumerate(fields["decoder_depths"]) if depth)
    grown = size(f"decoder.stages.{level}.op_list.0.main.conv.conv.weight", 0)
    fields["upsample"] = "interpolate" if grown == fields["decoder_dims"][level] else "pixel_shuffle"
    fields["out_activation"] = "relu" if "attention" in fields["decoder_blocks"] else "silu"  # as the releases have it
    branch = next((shape for key, shape in shapes.items() if key.endswith(".aggreg.0.1.weight") and len(shape) == 4), None)
    fields["head_dim"] = branch[1] if branch else 32
    return _with_factor(validated(fields, source), source)


def is_diffusers(shapes: Shapes) -> bool:
    """Whether these names are diffusers'; otherwise they are official."""
    return any(key.startswith(("encoder.down_blocks.", "decoder.up_blocks.")) for key in shapes)


def _stages(half: Half, shapes: Shapes, source: Path) -> dict[str, Any]:
    """Width, blocks and norm of every stage."""
    found: dict[int, dict[str, tuple[int, ...]]] = defaultdict(dict)
    for key, shape in shapes.items():
        if match := re.match(rf"{half}\.stages\.(\d+)\.op_list\.(.+)", key):
            found[int(match[1])][match[2]] = shape
    stages = [_stage(found[index]) for index in range(max(found, default=-1) + 1)]
    if len(stages) < 3 or not all(stage["depths"] for stage in stages[1:]):
        depths = ", ".join(str(stage["depths"]) for stage in stages)
        raise ValueError(f"'{source}' does not fit {DCAE}: the stages of its {half} have [{depths}] blocks")
    if not stages[0]["depths"]:
        alike = {name: stages[1][name] for name in ("norms", "activations")}
        stages[0] |= {"dims": max(stages[1]["dims"] // 2, 1), **(alike if stages[1]["blocks"] == "residual" else {})}  # no tensor tells
    names = ("dims", "depths", "blocks", "scales", *(("norms", "activations") if half == "decoder" else ()))
    return {f"{half}_{name}": tuple(stage[name] for stage in stages) for name in names}


def _stage(tensors: dict[str, tuple[int, ...]]) -> dict[str, Any]:
    def of(pattern: str) -> list[tuple[int, ...]]:
        return [shape for key, shape in sorted(tensors.items()) if re.search(pattern, key) and len(shape) > 1]

    residual, attention = of(r"main\.conv1\.conv\.weight$"), of(r"main\.qkv\.conv\.weight$")
    branch = re.compile(r"\d+(\.context_module\.main\.aggreg\.\d+\.0\.weight)$")
    branches = {match[1]: shape[-1] for key, shape in sorted(tensors.items()) if (match := branch.match(key))}  # alike in all blocks
    batch = any(key.endswith("conv2.norm.running_mean") for key in tensors)
    return {
        "dims": (attention or residual or [(0, 0)])[0][1],
        "depths": len(attention or residual),
        "blocks": "attention" if attention else "residual",
        "scales": tuple(branches.values()),
        "norms": "batch_norm" if batch else "rms_norm",
        "activations": "relu" if batch else "silu",
    }


def _with_factor(config: DCAEConfig, source: Path) -> DCAEConfig:
    name = _release(source)
    for preset in [PRESETS[name]] if name else [preset for key, preset in PRESETS.items() if "sana" in key]:
        scaled = config.model_copy(update={"scaling_factor": preset.scaling_factor})
        if with_space(scaled).latent_space == preset.latent_space:
            return with_space(scaled)
    return config


def _release(source: Path) -> str | None:
    """The release that a file, its folder, or the repository of a file in the Hub's cache has the name of."""
    path = source.absolute()
    repositories = [part.rpartition("--")[2] for part in path.parts if part.startswith("models--")]
    names = [name.lower().removesuffix("-diffusers") for name in (path.name, path.stem, path.parent.name, *repositories)]
    return next((name for name in names if name in PRESETS), None)

"""The configuration of a checkpoint that has none beside it, from the names and shapes of its tensors."""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from statistics import mode
from typing import Any

from pydantic import ValidationError

from ._shared.spec import UNKNOWN
from .config import WAN21, WAN22, VAEConfig
from .contents import DCAE, LTX, TAEHV, WAN, Shapes, kind_of


def is_diffusers(shapes: Shapes) -> bool:
    """Whether these names are diffusers'; otherwise they are official."""
    return any(key.startswith("encoder.down_blocks.") for key in shapes)


def infer_config(shapes: Shapes, source: object = "checkpoint") -> VAEConfig:
    """The configuration of a checkpoint from its names (official or diffusers, no prefix) and shapes.

    Statistics are those of Wan2.1 or Wan2.2 where the layout is theirs at full or quarter width, else none.
    ValueError says what the checkpoint is where it is no Wan VAE.
    """

    def shape(official: str, diffusers: str) -> tuple[int, ...]:
        if found := shapes.get(official, shapes.get(diffusers)):
            return found
        raise ValueError(f"'{source}' is not a Wan VAE: it has neither '{official}' nor '{diffusers}'")

    refuse_others(shapes, source)
    conv_in = shape("encoder.conv1.weight", "encoder.conv_in.weight")
    if len(conv_in) != 5:
        raise ValueError(f"'{source}' is not a Wan VAE: it holds an image VAE, with convolutions of {len(conv_in) - 2} dimensions")
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
        "timestep_conditioning": "decoder.timestep.linear1.weight" in shapes,
        "patch_size": math.isqrt(max(conv_in[1] // 3, 1)),
        "latent_space": UNKNOWN,
    }
    return _with_statistics(validated(fields, Path(str(source))))


def refuse_others(shapes: Shapes, source: object) -> None:
    """ValueError where the names are of something else than a Wan VAE that is known."""
    kind = kind_of(shapes)
    if kind == TAEHV:
        raise ValueError(f"'{source}' is not a Wan VAE: it holds {TAEHV}; load it with wan_vae.load_vae or wan_vae.codecs.taehv.TAEHV")
    if kind == DCAE:
        raise ValueError(f"'{source}' is not a Wan VAE: it holds {DCAE}; load it with wan_vae.load_vae or wan_vae.codecs.dcae.DCAE")
    if kind == LTX:
        raise ValueError(f"'{source}' is not a Wan VAE: it holds {LTX}; load it with wan_vae.load_vae or wan_vae.codecs.ltx.LTXVAE")
    if kind not in (WAN, None):
        raise ValueError(f"'{source}' is not a Wan VAE: it holds {kind}")


def validated(fields: Mapping[str, Any], path: Path) -> VAEConfig:
    """A configuration; ValueError names the file and every field that is wrong."""
    try:
        return VAEConfig.model_validate(fields)
    except ValidationError as error:
        raise ValueError(f"the configuration of '{path}' is not valid: {problems(error)}") from error


def problems(error: ValidationError) -> str:
    return "; ".join(f"{'.'.join(map(str, item['loc'])) or 'config'}: {item['msg']}" for item in error.errors())


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

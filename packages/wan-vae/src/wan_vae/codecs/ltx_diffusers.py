"""LTX-Video's VAE in diffusers' layout, AutoencoderKLLTXVideo: its config.json and its names of tensors, to and from ours.

diffusers counts levels, of residual blocks, what changes the size and what changes the width, where the official files count blocks.
A block's place in a level is its name there, so one walk over the blocks gives both the configuration and the names.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

from .ltx_config import Block, LTXConfig, Step

DIFFUSERS_CLASS = "AutoencoderKLLTXVideo"
PLAIN, FOLDED = "LTXVideoDownBlock3D", "LTXVideo095DownBlock3D"  # its levels of an encoder up to 0.9.1, and since 0.9.5
FOLDS = {"spatial": "compress_space_res", "temporal": "compress_time_res", "spatiotemporal": "compress_all_res"}
DEFAULTS: dict[str, Any] = {  # those of AutoencoderKLLTXVideo; the oldest files say no more than what differs
    "latent_channels": 128,
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": (PLAIN,) * 4,
    "decoder_block_out_channels": (128, 256, 512, 512),
    "layers_per_block": (4, 3, 3, 3, 4),
    "decoder_layers_per_block": (4, 3, 3, 3, 4),
    "spatio_temporal_scaling": (True, True, True, False),
    "decoder_spatio_temporal_scaling": (True, True, True, False),
    "decoder_inject_noise": (False,) * 5,
    "downsample_type": ("conv",) * 4,
    "upsample_residual": (False,) * 4,
    "upsample_factor": (1,) * 4,
    "timestep_conditioning": False,
    "patch_size": 4,
    "decoder_causal": False,
}
FIXED: dict[str, Any] = {
    "in_channels": 3, "out_channels": 3, "patch_size_t": 1, "resnet_norm_eps": 1e-6, "scaling_factor": 1.0, "encoder_causal": True,
}  # fmt: skip
TENSORS = {  # official: diffusers, within a module
    "res_blocks.": "resnets.",
    "conv_shortcut.": "conv_shortcut.conv.",
    "norm3.norm.": "norm3.",
    "decoder.last_time_embedder.": "decoder.time_embedder.",
    "decoder.last_scale_shift_table": "decoder.scale_shift_table",
}


class Level(NamedTuple):
    """A level of diffusers, in the order in which it runs: where each block stands in the official list, None for what it has not."""

    stack: int | None
    resample: int | None
    change: int | None


def from_diffusers(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of `LTXConfig` that an AutoencoderKLLTXVideo's config.json gives. ValueError for what ours cannot hold."""
    for name, value in FIXED.items():
        if fields.get(name, value) != value:
            raise ValueError(f"{name} is {fields[name]!r}, which is not known here: expected {value!r}")
    given = {name: fields.get(name, default) for name, default in DEFAULTS.items()}
    steps = _decoder_blocks(given)
    return {
        "encoder_blocks": _encoder_blocks(given),
        "decoder_blocks": steps[::-1],
        "latent_channels": given["latent_channels"],
        "encoder_base_channels": given["block_out_channels"][0],
        "decoder_base_channels": given["decoder_block_out_channels"][0] // given["upsample_factor"][0],
        "patch_size": given["patch_size"],
        "causal_decoder": given["decoder_causal"],
        "timestep_conditioning": given["timestep_conditioning"],
    }


def _encoder_blocks(given: Mapping[str, Any]) -> list[Any]:
    widths, kinds = given["block_out_channels"], set(given["down_block_types"])
    if kinds not in ({PLAIN}, {FOLDED}):
        raise ValueError(f"down_block_types is {list(given['down_block_types'])}: expected {PLAIN} or {FOLDED} for all")
    plain, blocks = kinds == {PLAIN}, list[Any]()
    pairs = list(pairwise((*widths, widths[-1]) if plain else widths))
    layers, scaled, types = (given[name] for name in ("layers_per_block", "spatio_temporal_scaling", "downsample_type"))
    for i, (dim, out_dim) in enumerate(pairs):
        blocks.append(["res_x", layers[i]])
        if plain:
            blocks += [["compress_all", {}]] * scaled[i]
            blocks += [["res_x_y", {"multiplier": _ratio(out_dim, dim)}]] * (dim != out_dim)
        elif scaled[i]:
            if types[i] not in FOLDS:
                raise ValueError(f"downsample_type is '{types[i]}', expected one of {', '.join(FOLDS)}")
            blocks.append([FOLDS[types[i]], {"multiplier": _ratio(out_dim, dim)}])
    return [*blocks, ["res_x", layers[-1]]]


def _decoder_blocks(given: Mapping[str, Any]) -> list[Any]:
    """In the order in which they run."""
    names = ("block_out_channels", "spatio_temporal_scaling", "layers_per_block", "inject_noise")
    widths, scaled, layers, noisy = (tuple(reversed(given[f"decoder_{name}"])) for name in names)
    residual, factors = (tuple(reversed(given[name])) for name in ("upsample_residual", "upsample_factor"))
    blocks, dim = [["res_x", {"num_layers": layers[0], "inject_noise": noisy[0]}]], widths[0]
    for i, (width, factor) in enumerate(zip(widths, factors, strict=True)):
        if width != dim:
            if factor > 1 or given["timestep_conditioning"]:
                raise ValueError(f"the decoder's level {i} goes from width {dim} to {width}, which its other fields do not allow")
            blocks.append(["res_x_y", {"multiplier": _ratio(dim, width)}])
        blocks += [["compress_all", {"residual": residual[i], "multiplier": factor}]] * scaled[i]
        blocks.append(["res_x", {"num_layers": layers[i + 1], "inject_noise": noisy[i + 1]}])
        dim = width // factor
    return blocks


def _ratio(wide: int, narrow: int) -> int:
    if wide % narrow:
        raise ValueError(f"widths {narrow} and {wide} do not divide")
    return wide // narrow


def diffusers_config(config: LTXConfig) -> dict[str, Any]:
    """The fields of AutoencoderKLLTXVideo's config.json. ValueError for a configuration that it has no words for."""
    down, up = config.encoder_steps, config.decoder_steps
    *levels, middle = encoder_levels(config)
    rising = decoder_levels(config)
    kinds = [down[level.resample].block.kind if level.resample is not None else None for level in levels]
    plain = set(kinds) <= {"compress_all", None}
    types = {kind: name for name, kind in FOLDS.items()} | {None: "conv"} | ({"compress_all": "conv"} if plain else {})
    if unknown := [kind for kind in kinds if kind not in types]:
        raise _unheld(config, f"'{unknown[0]}' in the encoder")
    ends = [down[next(at for at in reversed(level) if at is not None)].out_dim for level in levels]
    factors = [_block(up, level.resample).factor if level.resample is not None else 1 for level in rising[1:]]
    stacks = [_block(up, level.stack) for level in rising]
    fields: dict[str, Any] = {
        "latent_channels": config.latent_channels,
        "block_out_channels": [down[0].dim, *(ends[:-1] if plain else ends)],
        "down_block_types": [PLAIN if plain else FOLDED] * len(levels),
        "layers_per_block": [_block(down, level.stack).num_layers for level in (*levels, middle)],
        "spatio_temporal_scaling": [kind is not None for kind in kinds],
        "downsample_type": [types[kind] for kind in kinds],
        "decoder_block_out_channels": [
            up[_at(level.stack)].dim * factor for level, factor in zip(rising[:0:-1], reversed(factors), strict=True)
        ],
        "decoder_layers_per_block": [block.num_layers for block in reversed(stacks)],
        "decoder_spatio_temporal_scaling": [level.resample is not None for level in rising[:0:-1]],
        "decoder_inject_noise": [block.inject_noise for block in reversed(stacks)],
        "upsample_residual": [level.resample is not None and _block(up, level.resample).residual for level in rising[:0:-1]],
        "upsample_factor": factors[::-1],
        "timestep_conditioning": config.timestep_conditioning,
        "patch_size": config.patch_size,
        "decoder_causal": config.causal_decoder,
        "spatial_compression_ratio": config.stride[1],
        "temporal_compression_ratio": config.stride[0],
    }
    told = LTXConfig.model_validate({**from_diffusers(fields), "latent_space": config.latent_space})  # what diffusers makes of it
    if told.architecture != config.architecture:
        raise _unheld(config, next(name for name, value in told.architecture.items() if value != config.architecture[name]))
    return {"_class_name": DIFFUSERS_CLASS, **FIXED, **fields}


def diffusers_names(config: LTXConfig, keys: Sequence[str]) -> dict[str, str]:
    """Official name to diffusers', of `keys`."""
    *levels, middle = encoder_levels(config)
    first, *rising = decoder_levels(config)
    places = {f"encoder.down_blocks.{middle.stack}.": "encoder.mid_block.", f"decoder.up_blocks.{first.stack}.": "decoder.mid_block."}
    for half, change, resample, found in (
        ("encoder.down_blocks", "conv_out", "downsamplers", levels),
        ("decoder.up_blocks", "conv_in", "upsamplers", rising),
    ):
        for i, level in enumerate(found):
            for at, inner in zip(level, ("", f"{resample}.0.", f"{change}."), strict=True):
                places[f"{half}.{at}."] = f"{half}.{i}.{inner}"
    return {key: _renamed(key, places) for key in keys}


def _renamed(key: str, places: Mapping[str, str]) -> str:
    prefix = ".".join(key.split(".")[:3]) + "."
    key = places[prefix] + key.removeprefix(prefix) if prefix in places else key
    for theirs, ours in TENSORS.items():
        key = key.replace(theirs, ours)
    return key


def encoder_levels(config: LTXConfig) -> list[Level]:
    """The levels of the encoder; the last is diffusers' middle. ValueError where its blocks are in another order than there."""
    return list(_levels(config, config.encoder_steps, ("res_x", "compress", "res_x_y")))


def decoder_levels(config: LTXConfig) -> list[Level]:
    """The levels of the decoder; the first is diffusers' middle. ValueError where its blocks are in another order than there."""
    return list(_levels(config, config.decoder_steps, ("res_x_y", "compress", "res_x")))


def _levels(config: LTXConfig, steps: Sequence[Step], order: tuple[str, ...]) -> Iterator[Level]:
    """Cut the blocks where the order begins anew; every level has a stack."""
    level: dict[str, int] = {}
    for i, (block, *_) in enumerate(steps):
        kind = "compress" if block.kind.startswith("compress") else block.kind
        if level and order.index(kind) <= max(order.index(name) for name in level):
            yield _level(config, level)
            level = {}
        level[kind] = i
    yield _level(config, level)


def _level(config: LTXConfig, level: Mapping[str, int]) -> Level:
    if "res_x" not in level:
        raise _unheld(config, "a level without res_x")
    return Level(level["res_x"], level.get("compress"), level.get("res_x_y"))


def _unheld(config: LTXConfig, what: str) -> ValueError:
    return ValueError(f"diffusers' {DIFFUSERS_CLASS} cannot hold '{config.latent_space}': {what}; use --to official or --to wan")


def _block(steps: Sequence[Step], at: int | None) -> Block:
    return steps[_at(at)].block


def _at(at: int | None) -> int:
    assert at is not None
    return at

"""The configuration of a TAEHV-style autoencoder, and how a checkpoint without one tells it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, PositiveInt, ValidationError, model_validator

from .._shared import weights
from .._shared.spec import UNKNOWN
from ..contents import TAEHV, Shapes, kind_of
from ..layouts import problems

FOLDS, UNFOLDS, SUPER_UNFOLDS = (2, 7, 12), (7, 13, 19), (7, 14, 21)  # places of the layers that change the rate of frames
OTHER_CLOCKS = ("taecvx", "taeh3")  # released files of this layout whose frames are counted otherwise: CogVideoX, MiniMax H3


class TAEHVConfig(BaseModel):
    """Widths and strides, and whose latents these are.

    encoder_dim, decoder_dims: width of the encoder, and of the decoder before, between and after its three steps
    temporal_downsample, temporal_upsample: whether each of the three steps halves or doubles time, as all do height and width
    wide_blocks: the decoder of the "super" models
    patch_size: pixels per side folded into channels
    latent_space: tag of the space of the VAE that this one stands in for
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    z_dim: PositiveInt
    patch_size: PositiveInt = 1
    encoder_dim: PositiveInt = 64
    decoder_dims: tuple[PositiveInt, ...] = Field(default=(256, 128, 64, 64), min_length=4, max_length=4)
    temporal_downsample: tuple[bool, bool, bool] = (True, True, False)
    temporal_upsample: tuple[bool, bool, bool] = (False, True, True)
    wide_blocks: bool = False
    latent_space: str

    @model_validator(mode="after")
    def _rates_agree(self) -> TAEHVConfig:
        if sum(self.temporal_downsample) != sum(self.temporal_upsample):
            down, up = 2 ** sum(self.temporal_downsample), 2 ** sum(self.temporal_upsample)
            raise ValueError(f"the encoder takes {down} frames to a latent, the decoder makes {up} of one: expected the same")
        return self

    @property
    def stride(self) -> tuple[int, int, int]:
        """Pixels per latent in (time, height, width)."""
        return (2 ** sum(self.temporal_downsample), 8 * self.patch_size, 8 * self.patch_size)


TAEW21 = TAEHVConfig(z_dim=16, latent_space="wan2.1")
TAEW22 = TAEHVConfig(z_dim=48, patch_size=2, latent_space="wan2.2")


def read_config(path: Path, format_: str) -> TAEHVConfig | None:
    """The configuration in our config.json in a folder or beside a file; None where there is none of this format."""
    fields = weights.read_config(path) or {}
    if fields.pop("format", None) != format_:
        return None
    return _validated(fields, path)


def infer_config(shapes: Shapes, source: Path) -> TAEHVConfig:
    """The configuration of a checkpoint from the shapes of its tensors.

    The space of its latents is told by 48 channels in patches of 2 (Wan2.2), or by "taew2_1" in the file's name, since files
    for other models look the same; else it is unknown. ValueError says what the file is where it has another layout.
    """
    kind = kind_of(shapes)
    if kind != TAEHV:
        raise ValueError(f"'{source}' is not {TAEHV}: it holds {kind or 'none of its tensors'}")
    if name := next((name for name in OTHER_CLOCKS if name in source.stem), None):
        raise ValueError(f"'{source}': the decoders '{name}' count frames in another way, which wan-vae does not know")

    def size(key: str, axis: int) -> int:
        if key not in shapes or len(shapes[key]) != 4:
            raise ValueError(f"'{source}' does not fit {TAEHV}: missing or misshapen '{key}'")
        return shapes[key][axis]

    def doubles(half: str, place: int, axis: int) -> bool:
        key = f"{half}.{place}.conv.weight"
        wide, narrow = size(key, axis), size(key, 1 - axis)
        if wide not in (narrow, 2 * narrow):
            raise ValueError(f"'{source}' does not fit {TAEHV}: '{key}' is {shapes[key]}, expected a factor of 1 or 2")
        return wide == 2 * narrow

    wide = "decoder.0.weight" in shapes
    places = SUPER_UNFOLDS if wide else UNFOLDS
    within = tuple(size(f"decoder.{place}.conv.weight", 1) for place in places)
    z_dim, channels = size("encoder.17.weight", 0), size("encoder.0.weight", 1)
    fields = {
        "z_dim": z_dim,
        "patch_size": math.isqrt(max(channels // 3, 1)),
        "encoder_dim": size("encoder.0.weight", 0),
        "decoder_dims": (size("decoder.0.weight", 0), *within) if wide else (*within, size("decoder.20.weight", 0)),
        "temporal_downsample": tuple(doubles("encoder", place, 1) for place in FOLDS),
        "temporal_upsample": tuple(doubles("decoder", place, 0) for place in places),
        "wide_blocks": wide,
        "latent_space": UNKNOWN,
    }
    config = _validated(fields, source)
    return config.model_copy(update={"latent_space": _space(config, source)})


def _space(config: TAEHVConfig, source: Path) -> str:
    facts = (config.z_dim, config.stride)
    if facts == (TAEW22.z_dim, TAEW22.stride):
        return TAEW22.latent_space
    named = "taew2_1" in source.stem.lower().replace(".", "_")
    return TAEW21.latent_space if named and facts == (TAEW21.z_dim, TAEW21.stride) else UNKNOWN


def _validated(fields: Mapping[str, Any], path: Path) -> TAEHVConfig:
    try:
        return TAEHVConfig.model_validate(fields)
    except ValidationError as error:
        raise ValueError(f"the configuration of '{path}' is not valid: {problems(error)}") from error

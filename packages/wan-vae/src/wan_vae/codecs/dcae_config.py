"""The configuration of a DC-AE, and the published ones as presets by the names of their releases."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, PositiveFloat, PositiveInt, ValidationError, model_validator

from .._shared.spec import UNKNOWN
from ..layouts import problems

Half = Literal["encoder", "decoder"]
HALVES: tuple[Half, ...] = ("encoder", "decoder")
Block = Literal["residual", "attention"]
Norm = Literal["rms_norm", "batch_norm"]
Activation = Literal["relu", "silu"]
Dims = tuple[PositiveInt, ...]
Depths = tuple[int, ...]
Scales = tuple[tuple[PositiveInt, ...], ...]


class Stage(NamedTuple):
    """One resolution of a half: `depth` blocks of width `dim`; `scales` are kernel sizes of an attention block's further branches."""

    dim: int
    depth: int
    block: Block
    scales: tuple[int, ...]
    norm: Norm
    activation: Activation


class DCAEConfig(BaseModel):
    """Stages from the finest to the coarsest, each half the height and width of the one before.

    encoder_dims, decoder_dims: their widths. The first stage may have a depth of 0: then the picture is halved on its way into
        the second, and its width means nothing
    encoder_depths, decoder_depths: blocks of each
    encoder_blocks, decoder_blocks: what they are
    encoder_scales, decoder_scales: of each stage of attention blocks, the kernel sizes of branches that see more than one cell
    decoder_norms, decoder_activations: of each stage; attention blocks, and all of the encoder, have "rms_norm" and "silu"
    downsample, upsample: how a convolution changes the resolution, beside a shortcut without weights
    encoder_shortcut, decoder_shortcut: channel means around the encoder's last convolution, repeated channels around the
        decoder's first
    out_activation: before the decoder's last convolution
    head_dim: channels of an attention head
    scaling_factor: 1 / the root mean square of the encoder's output; normalised latents are that output times this
    latent_space: tag of the space; decoders for one encoder share it
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    z_dim: PositiveInt
    encoder_dims: Dims = Field(min_length=3)
    decoder_dims: Dims = Field(min_length=3)
    encoder_depths: Depths
    decoder_depths: Depths
    encoder_blocks: tuple[Block, ...]
    decoder_blocks: tuple[Block, ...]
    encoder_scales: Scales
    decoder_scales: Scales
    decoder_norms: tuple[Norm, ...]
    decoder_activations: tuple[Activation, ...]
    downsample: Literal["pixel_unshuffle", "conv"] = "pixel_unshuffle"
    upsample: Literal["pixel_shuffle", "interpolate"] = "pixel_shuffle"
    encoder_shortcut: bool = True
    decoder_shortcut: bool = True
    out_activation: Activation = "relu"
    head_dim: PositiveInt = 32
    scaling_factor: PositiveFloat = 1.0
    latent_space: str = UNKNOWN

    @property
    def stride(self) -> tuple[int, int, int]:
        """Pixels per latent in (time, height, width); a picture is a latent of its own."""
        side = 2 ** (len(self.encoder_dims) - 1)
        return (1, side, side)

    def stages(self, half: Half) -> list[Stage]:
        """The stages of a half, from the finest to the coarsest."""
        count = len(self.encoder_dims)
        norms, activations = (
            (self.decoder_norms, self.decoder_activations) if half == "decoder" else (("rms_norm",) * count, ("silu",) * count)
        )
        fields = (getattr(self, f"{half}_{name}") for name in ("dims", "depths", "blocks", "scales"))
        return [Stage(*values) for values in zip(*fields, norms, activations, strict=True)]

    @model_validator(mode="after")
    def _stages_agree(self) -> DCAEConfig:
        count = len(self.encoder_dims)
        for name, value in self:
            if isinstance(value, tuple) and len(value) != count:
                raise ValueError(f"{name} has {len(value)} stages, encoder_dims has {count}: expected as many")
        for half in HALVES:
            stages = self.stages(half)
            for index, stage in enumerate(stages):
                _check_stage(f"stage {index} of the {half}", stage, index, self.head_dim)
            self._check_widths(half, [stage.dim for stage in (stages if stages[0].depth else stages[1:])])
        return self

    def _check_widths(self, half: Half, dims: list[int]) -> None:
        """What is folded into channels, averaged or repeated comes out even."""
        shortcut = self.encoder_shortcut if half == "encoder" else self.decoder_shortcut
        folded = half == "encoder" and self.downsample == "pixel_unshuffle"
        for finer, coarser in pairwise(dims):
            if 4 * finer % coarser:
                raise ValueError(f"{half}_dims: {finer} and {coarser} have no shortcut, expected a divisor of {4 * finer} after {finer}")
        if uneven := [dim for dim in dims[len(dims) == len(self.encoder_dims) :] if folded and dim % 4]:
            raise ValueError(f"encoder_dims: {uneven[0]} is what pixel_unshuffle makes, expected a multiple of 4")
        if shortcut and dims[-1] % self.z_dim:
            raise ValueError(f"{half}_dims: {dims[-1]} at last is no multiple of z_dim {self.z_dim}, as a shortcut needs")


def _check_stage(name: str, stage: Stage, index: int, head_dim: int) -> None:
    if stage.depth < (index > 0):
        raise ValueError(f"{name} has {stage.depth} blocks, expected 1 or more, or 0 in the first")
    if stage.scales and stage.block == "residual":
        raise ValueError(f"{name} has scales {stage.scales}, which only attention blocks do")
    if any(scale % 2 == 0 for scale in stage.scales):
        raise ValueError(f"{name} has scales {stage.scales}, expected odd sizes")
    if stage.block == "attention" and stage.dim % head_dim:
        raise ValueError(f"{name} is {stage.dim} wide, expected a multiple of head_dim {head_dim}")
    if stage.block == "attention" and (stage.norm, stage.activation) != ("rms_norm", "silu"):
        raise ValueError(f"{name} has attention blocks with {stage.norm} and {stage.activation}, expected rms_norm and silu")


def validated(fields: Mapping[str, Any], path: Path) -> DCAEConfig:
    """A configuration; ValueError names the file and every field that is wrong."""
    try:
        return DCAEConfig.model_validate(fields)
    except ValidationError as error:
        raise ValueError(f"the configuration of '{path}' is not valid: {problems(error)}") from error


def _deep(z_dim: int, wider: tuple[int, ...], scaling_factor: float, latent_space: str) -> DCAEConfig:
    """A model of the paper: three stages of residual blocks, then stages of attention blocks."""
    dims = (128, 256, 512, 512, 1024, 1024, *wider)
    attending = len(dims) - 3
    fields: dict[str, Any] = {
        "z_dim": z_dim,
        "decoder_norms": (*("batch_norm",) * 3, *("rms_norm",) * attending),
        "decoder_activations": (*("relu",) * 3, *("silu",) * attending),
        "encoder_depths": (0, 4, 8, *(2,) * attending),
        "decoder_depths": (0, 5, 10, *(2,) * attending),
        "scaling_factor": scaling_factor,
        "latent_space": latent_space,
    }
    for half in HALVES:
        blocks = (*("residual",) * 3, *("attention",) * attending)
        fields |= {f"{half}_dims": dims, f"{half}_blocks": blocks, f"{half}_scales": ((),) * len(dims)}
    return DCAEConfig(**fields)


SANA = DCAEConfig(
    z_dim=32,
    encoder_dims=(128, 256, 512, 512, 1024, 1024),
    decoder_dims=(128, 256, 512, 512, 1024, 1024),
    encoder_depths=(2, 2, 2, 3, 3, 3),
    decoder_depths=(3, 3, 3, 3, 3, 3),
    encoder_blocks=("residual", "residual", "residual", "attention", "attention", "attention"),
    decoder_blocks=("residual", "residual", "residual", "attention", "attention", "attention"),
    encoder_scales=((), (), (), (5,), (5,), (5,)),
    decoder_scales=((), (), (), (5,), (5,), (5,)),
    decoder_norms=("rms_norm",) * 6,
    decoder_activations=("silu",) * 6,
    downsample="conv",
    upsample="interpolate",
    scaling_factor=0.41407,
    latent_space="dc-ae-f32c32-sana",
)
LITE = {  # a faster decoder for the same latents
    "decoder_depths": (0, 3, 5, 4, 4, 4),
    "decoder_blocks": ("residual",) * 6,
    "decoder_scales": ((),) * 6,
    "upsample": "pixel_shuffle",
    "out_activation": "silu",
}

# by the names of the releases; the scaling factors are those of the config.json in their folders for diffusers
PRESETS = {
    "dc-ae-f32c32-in-1.0": _deep(32, (), 0.3189, "dc-ae-f32c32-in"),
    "dc-ae-f32c32-mix-1.0": _deep(32, (), 0.4552, "dc-ae-f32c32-mix"),
    "dc-ae-f64c128-in-1.0": _deep(128, (2048,), 0.2889, "dc-ae-f64c128-in"),
    "dc-ae-f64c128-mix-1.0": _deep(128, (2048,), 0.4538, "dc-ae-f64c128-mix"),
    "dc-ae-f128c512-in-1.0": _deep(512, (2048, 2048), 0.4883, "dc-ae-f128c512-in"),
    "dc-ae-f128c512-mix-1.0": _deep(512, (2048, 2048), 0.3620, "dc-ae-f128c512-mix"),
    "dc-ae-f32c32-sana-1.0": SANA,
    "dc-ae-f32c32-sana-1.1": SANA,
    "dc-ae-lite-f32c32-sana-1.1": SANA.model_copy(update=LITE),
}

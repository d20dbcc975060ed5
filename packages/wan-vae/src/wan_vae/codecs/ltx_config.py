"""The configuration of LTX-Video's VAE: two lists of blocks as data, and the published ones as presets."""

from __future__ import annotations

import math
from typing import Any, Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, PositiveInt, model_serializer, model_validator

Stride = tuple[int, int, int]
Padding = Literal["zeros", "replicate"]
Kind = Literal[
    "res_x", "res_x_y", "compress_time", "compress_space", "compress_all", "compress_all_x_y",
    "compress_time_res", "compress_space_res", "compress_all_res",
]  # fmt: skip
STRIDES: dict[str, Stride] = {"time": (2, 1, 1), "space": (1, 2, 2), "all": (2, 2, 2)}
GROWTH = {"res_x_y": 2, "compress_all_x_y": 2, "compress_time_res": 2, "compress_space_res": 2, "compress_all_res": 2}


class Block(BaseModel):
    """One entry of a list of blocks, in JSON the pair `["res_x", {"num_layers": 4}]` or `["res_x", 4]`, as the official files have it.

    kind: `res_x` is a stack of residual blocks; `res_x_y` one residual block that changes the width; `compress_*` halves time, space
        or both in the encoder and doubles them in the decoder. In the encoder `compress_*` is a strided convolution (`_x_y`: one
        that changes the width), `compress_*_res` folds space and time into channels around a shortcut of channel means
    num_layers: residual blocks of a `res_x`
    multiplier: by which the encoder grows the width, or the decoder divides it. None: 2 where the kind changes the width in the
        encoder or is `res_x_y`, else 1
    residual: in the decoder, a shortcut of repeated channels around a `compress_*`
    inject_noise: in the decoder, noise per position, the same in all frames, scaled per channel, in every residual block
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Kind
    num_layers: PositiveInt = 1
    multiplier: PositiveInt | None = None
    residual: bool = False
    inject_noise: bool = False

    @model_validator(mode="before")
    @classmethod
    def _of_pair(cls, value: Any) -> Any:
        if isinstance(value, list | tuple) and len(value) == 2:
            kind, params = value
            value = {"kind": kind, **(params if isinstance(params, dict) else {"num_layers": params})}
        if not isinstance(value, dict):
            return value
        kind = value.get("kind")
        unsaid = {"multiplier": GROWTH.get(str(kind), 1), **({} if kind == "res_x" else {"num_layers": value.get("num_layers")})}
        return {name: given for name, given in value.items() if name not in unsaid or given != unsaid[name]}  # one way to say a thing

    @model_serializer
    def _as_pair(self) -> list[Any]:
        params = {"num_layers": self.num_layers} if self.kind == "res_x" else {}
        given = ((name, getattr(self, name), field.default) for name, field in type(self).model_fields.items() if name != "kind")
        return [self.kind, params | {name: value for name, value, default in given if value != default}]

    @property
    def factor(self) -> int:
        """By which the width changes."""
        return self.multiplier or GROWTH.get(self.kind, 1)

    @property
    def stride(self) -> Stride:
        """By which (time, height, width) shrink or grow."""
        return STRIDES[self.kind.split("_")[1]] if self.kind.startswith("compress") else (1, 1, 1)


class Step(NamedTuple):
    """A block at its place: what it is, and the width before and after it."""

    block: Block
    dim: int
    out_dim: int


class LTXConfig(BaseModel):
    """Blocks and widths of encoder and decoder, and the convention of the latents.

    encoder_blocks: from pixels to latents
    decoder_blocks: listed from pixels to latents too, so that they run from the last to the first
    encoder_base_channels, decoder_base_channels: width at the pixels' end
    patch_size: pixels per side folded into channels before the encoder
    latent_log_var: "uniform", one log-variance for all channels of a latent; "per_channel"; "constant", -30; "none"
    causal_decoder: frames depend on no later latent; else a frame is decoded from both sides, and streams come late
    timestep_conditioning: the decoder takes the last denoising step: it is given latents with some noise, and how much
    spatial_padding_mode: "zeros" or "replicate" around the picture
    decode_timestep: what a conditioned decoder is told, in [0, 1]; the released models take 0.05
    decode_noise_scale: the share of noise in what it is given, in [0, 1]; the released models take 0.025. 0: none
    max_timestep: in training, the share of noise is drawn from [0, max_timestep] for each video, and told as it is
    latents_mean, latents_std: per channel; latents are (mean - latents_mean) / latents_std. Empty: no normalisation
    latent_space: tag of the space; parts that carry one tag are interchangeable
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    encoder_blocks: tuple[Block, ...] = Field(min_length=1)
    decoder_blocks: tuple[Block, ...] = Field(min_length=1)
    latent_channels: PositiveInt = 128
    encoder_base_channels: PositiveInt = 128
    decoder_base_channels: PositiveInt = 128
    patch_size: PositiveInt = 4
    latent_log_var: Literal["uniform", "per_channel", "constant", "none"] = "uniform"
    causal_decoder: bool = False
    timestep_conditioning: bool = False
    spatial_padding_mode: Padding = "zeros"
    decode_timestep: float = Field(default=0.05, ge=0, le=1)
    decode_noise_scale: float = Field(default=0.025, ge=0, le=1)
    max_timestep: float = Field(default=0.2, gt=0, le=1)
    latents_mean: tuple[float, ...] = ()
    latents_std: tuple[float, ...] = ()
    latent_space: str

    @model_validator(mode="after")
    def _fits_together(self) -> LTXConfig:
        for step in self.encoder_steps:
            _check_down(step)
        for step in self.decoder_steps:
            _check_up(step)
        down, up = self.stride, _product(self.patch_size, self.decoder_blocks)
        if down != up:
            raise ValueError(f"the encoder takes {_words(down)} pixels (time, height, width) to a latent, the decoder makes {_words(up)}")
        for name, values in (("latents_mean", self.latents_mean), ("latents_std", self.latents_std)):
            if len(values) not in (0, self.latent_channels):
                raise ValueError(f"{name} has {len(values)} values, expected {self.latent_channels} (latent_channels) or none")
        if not all(math.isfinite(value) and value > 0 for value in self.latents_std):
            raise ValueError(f"latents_std must be positive and finite, got {self.latents_std}")
        return self

    @property
    def stride(self) -> Stride:
        """Pixels per latent in (time, height, width)."""
        return _product(self.patch_size, self.encoder_blocks)

    @property
    def encoder_steps(self) -> list[Step]:
        """The encoder's blocks in the order in which they run, with their widths."""
        steps, dim = [], self.encoder_base_channels
        for block in self.encoder_blocks:
            steps.append(Step(block, dim, dim * block.factor))
            dim *= block.factor
        return steps

    @property
    def decoder_steps(self) -> list[Step]:
        """The decoder's blocks in the order in which they run, with their widths."""
        steps, dim = [], self.decoder_base_channels
        for block in self.decoder_blocks:
            steps.append(Step(block, dim * block.factor, dim))
            dim *= block.factor
        return steps[::-1]

    @property
    def architecture(self) -> dict[str, Any]:
        """What decides the tensors and their use, without statistics, name and the amounts of noise."""
        apart = {"latents_mean", "latents_std", "latent_space", "decode_timestep", "decode_noise_scale", "max_timestep"}
        return self.model_dump(exclude=apart)


def _product(patch: int, blocks: tuple[Block, ...]) -> Stride:
    time, height, width = (math.prod(block.stride[axis] for block in blocks) for axis in range(3))
    return (time, patch * height, patch * width)


def _words(stride: Stride) -> str:
    return "x".join(map(str, stride))


def _check_down(step: Step) -> None:
    block, dim, out_dim = step
    if block.residual or block.inject_noise:
        raise ValueError(f"'{block.kind}' in the encoder takes neither residual nor inject_noise, which are the decoder's")
    if block.factor > 1 and block.kind not in GROWTH:  # which the official code would not heed
        raise ValueError(f"'{block.kind}' in the encoder keeps the width: it takes no multiplier {block.factor}")
    folded = math.prod(block.stride)
    if block.kind.endswith("_res") and (out_dim % folded or dim * folded % out_dim):
        raise ValueError(f"'{block.kind}' from width {dim} to {out_dim} does not divide: both must by {folded}")


def _check_up(step: Step) -> None:
    block, dim, out_dim = step
    if block.kind.endswith("_res") or block.kind == "compress_all_x_y":
        raise ValueError(f"'{block.kind}' is a block of the encoder; in the decoder: compress_time, compress_space, compress_all")
    if not block.kind.startswith("compress"):
        refused = {"residual": block.residual, "multiplier": block.kind == "res_x" and block.factor > 1}
        refused["inject_noise"] = block.kind == "res_x_y" and block.inject_noise
        if names := [name for name, given in refused.items() if given]:
            raise ValueError(f"'{block.kind}' in the decoder takes no {names[0]}")
        return
    if block.inject_noise:
        raise ValueError(f"'{block.kind}' in the decoder takes no inject_noise")
    folded = math.prod(block.stride)
    if dim * folded % block.factor or (block.residual and (dim % folded or folded % block.factor)):
        raise ValueError(f"'{block.kind}' from width {dim} to {out_dim} does not divide by {folded}")


_PLAIN = [
    ["res_x", 4], ["compress_all", {}], ["res_x_y", {}], ["res_x", 3], ["compress_all", {}], ["res_x_y", {}],
    ["res_x", 3], ["compress_all", {}], ["res_x", 3], ["res_x", 4],
]  # fmt: skip
_DOUBLE = ["compress_all", {"residual": True, "multiplier": 2}]
_NOISY = [["res_x", {"num_layers": layers, "inject_noise": True}] for layers in (5, 6, 7)]
LTX090 = LTXConfig.model_validate({"encoder_blocks": _PLAIN, "decoder_blocks": _PLAIN, "latent_space": "ltx-0.9"})
LTX091 = LTXConfig.model_validate(
    {
        "encoder_blocks": _PLAIN,
        "decoder_blocks": [_NOISY[0], _DOUBLE, _NOISY[1], _DOUBLE, _NOISY[2], _DOUBLE, ["res_x", 8]],
        "timestep_conditioning": True,
        "latent_space": "ltx-0.9.1",
    }
)
LTX095 = LTXConfig.model_validate(
    {
        "encoder_blocks": [
            ["res_x", 4], ["compress_space_res", {}], ["res_x", 6], ["compress_time_res", {}], ["res_x", 6],
            ["compress_all_res", {}], ["res_x", 2], ["compress_all_res", {}], ["res_x", 2],
        ],
        "decoder_blocks": [["res_x", 5], _DOUBLE, ["res_x", 5], _DOUBLE, ["res_x", 5], _DOUBLE, ["res_x", 5]],
        "timestep_conditioning": True,
        "latent_space": "ltx-0.9.5",
    }
)  # fmt: skip
PRESETS = {"ltx-video-0.9": LTX090, "ltx-video-0.9.1": LTX091, "ltx-video-0.9.5": LTX095, "ltx-video-0.9.7": LTX095}

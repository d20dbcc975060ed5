"""The VAE of LTX-Video: 32x32 pixels and 8 frames to a latent of 128 channels, with a decoder that takes the last denoising step.

The encoder is causal. The decoder of the released models is not: a frame depends on latents before and after it, so that streams
give frames late (`look_ahead`), and still hold the same amount however long they are. Own tensor names are the official ones.
Shapes: B batch, C channels, T frames, H height, W width.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, Self

import torch
from einops import rearrange
from torch import Tensor, nn

from .._shared.weights import Pretrained, State
from ..plugins import VAESpec
from ..sessions import stream
from ..shapes import check_latents, check_video
from .ltx_blocks import Conv, ResStack, TimestepEmbedder, activated, down_block, up_block
from .ltx_config import LTX095, LTXConfig
from .ltx_stream import LTXDecodeSession, LTXEncodeSession, LTXState, Noise, draw_seed

LOWEST = -30.0  # log-variance of latents without any


class Encoder(nn.Module):
    """Patches of video to latents and what stands for their log-variance."""

    def __init__(self, config: LTXConfig) -> None:
        super().__init__()
        conv: dict[str, Any] = {"causal": True, "padding_mode": config.spatial_padding_mode}
        steps, wide = config.encoder_steps, config.latent_channels
        moments = {"uniform": wide + 1, "constant": wide + 1, "per_channel": 2 * wide, "none": wide}[config.latent_log_var]
        self.conv_in = Conv(3 * config.patch_size**2, steps[0].dim, **conv)
        self.down_blocks = nn.ModuleList(down_block(step, **conv) for step in steps)
        self.conv_out = Conv(steps[-1].out_dim, moments, **conv)

    def forward(self, x_BCTHW: Tensor, state: LTXState) -> Tensor:
        x_BCTHW = self.conv_in(x_BCTHW, state)
        for block in self.down_blocks:
            x_BCTHW = block(x_BCTHW, state)
        made: Tensor = self.conv_out(activated(x_BCTHW), state)
        return made


class Decoder(nn.Module):
    """Latents to patches of video; told, where it is conditioned, how much noise is in them."""

    def __init__(self, config: LTXConfig) -> None:
        super().__init__()
        conv: dict[str, Any] = {"causal": config.causal_decoder, "padding_mode": config.spatial_padding_mode}
        steps, timed = config.decoder_steps, config.timestep_conditioning
        dim = steps[-1].out_dim
        self.conv_in = Conv(config.latent_channels, steps[0].dim, **conv)
        self.up_blocks = nn.ModuleList(up_block(step, timed=timed, **conv) for step in steps)
        self.conv_out = Conv(dim, 3 * config.patch_size**2, **conv)
        self.timestep_scale_multiplier = nn.Parameter(torch.tensor(1000.0)) if timed else None
        self.last_time_embedder = TimestepEmbedder(2 * dim) if timed else None
        self.last_scale_shift_table = nn.Parameter(torch.randn(2, dim) / dim**0.5) if timed else None

    def forward(self, z_BCTHW: Tensor, state: LTXState, timestep_B: Tensor) -> Tensor:
        if self.timestep_scale_multiplier is not None:
            timestep_B = timestep_B * self.timestep_scale_multiplier
        x_BCTHW = self.conv_in(z_BCTHW, state)
        for block in self.up_blocks:
            x_BCTHW = block(x_BCTHW, state, timestep_B) if isinstance(block, ResStack) else block(x_BCTHW, state)
        shift, scale = None, None
        if self.last_time_embedder is not None and self.last_scale_shift_table is not None:
            embedding_BD = self.last_time_embedder(timestep_B).unflatten(1, (2, -1)) + self.last_scale_shift_table
            shift, scale = embedding_BD[..., None, None, None].unbind(1)
        made: Tensor = self.conv_out(activated(x_BCTHW, shift, scale), state)
        return made


class LTXVAE(Pretrained):
    """The video VAE of LTX-Video 0.9, 0.9.1 and 0.9.5 to 0.9.8.

    Video is `[B, 3, T, H, W]` in [-1, 1] with T = 1 + k * stride[0] and H, W multiples of stride[1]; latents are
    `[B, latent_channels, 1 + k, H / stride[1], W / stride[2]]`, normalised per channel. `encode`, `decode` and the streams run
    without gradients in constant memory; `moments` and `reconstruct` are differentiable and take the clip whole.
    A decoder with `timestep_conditioning` mixes a share of noise (`config.decode_noise_scale`) into the normalised latents and
    decodes them as of `config.decode_timestep`; the noise is the generator's, or of a fixed seed.

    Example: `vae = load_vae("ltx-video-0.9.5"); video = vae.decode(latents, generator=torch.Generator().manual_seed(0))`
    """

    format = "wan-ltx/1"
    hub_files = ("config.json", "model_index.json", "vae/*")  # a whole video model may stand beside it
    hub_fallback = ("model.safetensors", "diffusion_pytorch_model.safetensors")

    def __init__(self, config: LTXConfig = LTX095) -> None:
        super().__init__()
        self.config = config
        self.encoder, self.decoder = Encoder(config), Decoder(config)
        for name, module in self.named_modules():
            module.slot = name  # type: ignore[assignment]
        self.closings = [str(conv.slot) for conv in self.decoder.modules() if isinstance(conv, Conv) and conv.after]  # as they run

    @property
    def look_ahead(self) -> int:
        """Frames by which `decode_stream` is behind the latents that it was given, before their end."""
        if self.config.causal_decoder:
            return 0
        worth, frames = self.config.stride[0], 0  # frames of video that a frame stands for, and those waited for
        for step in self.config.decoder_steps:
            convs = {"res_x": 2 * step.block.num_layers, "res_x_y": 2}.get(step.block.kind, 1)
            frames += convs * worth
            worth //= step.block.stride[0]
        return frames + self.config.stride[0] + 1  # and those of the first and the last convolution

    def encode_session(self) -> LTXEncodeSession:
        """A stream of frames to latents; its `push` takes the next chunk."""
        return LTXEncodeSession(self)

    def decode_session(self, *, generator: torch.Generator | None = None) -> LTXDecodeSession:
        """A stream of latents to frames; its `push` takes the next chunk, its `finish` gives the rest."""
        return LTXDecodeSession(self, Noise.of(generator))

    @torch.no_grad()
    def encode(self, video: Tensor) -> Tensor:
        """Video to normalised latents, the mean of the posterior. ValueError where T, H or W does not divide."""
        self.check_video(video)
        first, *rest = video.split([1, *[self.config.stride[0]] * (video.shape[2] // self.config.stride[0])], dim=2)
        return torch.cat(list(self.encode_stream([first, *rest])), dim=2)

    @torch.no_grad()
    def decode(self, latents: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
        """Normalised latents to video, clamped to [-1, 1].

        A conditioned decoder takes its noise from `generator`, or from a fixed seed: the same latents give the same video.
        """
        self.check_latents(latents)
        return torch.cat(list(self.decode_stream(latents.split(1, dim=2), generator=generator)), dim=2)

    def encode_stream(self, chunks: Iterable[Tensor]) -> Iterator[Tensor]:
        """Chunks of frames to chunks of latents: the first has 1 + k * stride[0] frames, every other k * stride[0].

        The generator holds the state, so streams may be interleaved. ValueError for a chunk that breaks the rule.
        """
        return stream(self.encode_session(), chunks)

    def decode_stream(self, chunks: Iterable[Tensor], *, generator: torch.Generator | None = None) -> Iterator[Tensor]:
        """Chunks of latents, of any number each, to chunks of frames, which come `look_ahead` frames late and the rest at the end.

        Frames do not depend on the chunks, and what is held not on their number. The generator holds the state, so streams may
        be interleaved.
        """
        return stream(self.decode_session(generator=generator), chunks)

    def moments(self, video: Tensor) -> tuple[Tensor, Tensor | None]:
        """Mean and log-variance of the latents, before normalisation; differentiable. None where no log-variance is encoded."""
        self.check_video(video)
        return self.encode_step(video, LTXState(carry=False))

    def reconstruct(
        self, video: Tensor, generator: torch.Generator | Sequence[torch.Generator] | None = None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """`(video, mean, logvar)`: the reconstruction, unclamped, and the moments; differentiable.

        In training mode or where a generator is given, one for all or one for each video, it decodes a sample of the posterior, else
        its mean. In training mode a conditioned decoder is given a share of noise drawn from [0, `config.max_timestep`] for each
        video, and told as much; else the share and the timestep of `decode`.
        """
        mean, logvar = self.moments(video)
        latents, drawn = mean, self.training or generator is not None
        own = list(generator) if isinstance(generator, Sequence) else [generator] * len(mean)
        if drawn and logvar is not None:
            noise = torch.stack([_normal(one, each) for one, each in zip(mean, own, strict=True)])
            latents = mean + noise.to(mean) * torch.exp(0.5 * logvar.clamp(LOWEST, 20))
        state = LTXState(carry=False, noise=Noise([draw_seed(each) for each in own] if drawn else [0]))
        levels = None
        if self.training and self.config.timestep_conditioning:
            levels = torch.stack([_uniform(each) for each in own]).to(mean.device) * self.config.max_timestep
        given = self.noised(self.normalise(latents), state, levels)
        return self.decode_step(given, state, levels), mean, logvar

    @torch.no_grad()
    def fit_normaliser(self, batches: Iterable[Tensor]) -> None:
        """Measure mean and standard deviation of the latents per channel over batches of video, and set them in `config`."""
        means = [self.moments(video)[0].transpose(0, 1).flatten(1).to("cpu", torch.float64) for video in batches]
        if not means:
            raise ValueError("fit_normaliser needs at least one batch of video, got none")
        count = sum(mean.shape[1] for mean in means)
        center = torch.stack([mean.sum(1) for mean in means]).sum(0) / count
        square = torch.stack([mean.square().sum(1) for mean in means]).sum(0) / count
        deviation = (square - center.square()).clamp_min(1e-12).sqrt()
        self.config = self.config.model_copy(update={"latents_mean": tuple(center.tolist()), "latents_std": tuple(deviation.tolist())})

    def parameter_groups(self) -> dict[str, list[nn.Parameter]]:
        """All parameters by the parts that staged training freezes and trains; the decoder's head has the last modulation."""
        head = ("decoder.conv_out.", "decoder.last_")
        groups: dict[str, list[nn.Parameter]] = {
            name: [] for name in ("encoder", "encoder_head", "decoder_input", "decoder", "decoder_head")
        }
        for name, parameter in self.named_parameters():
            if name.startswith("encoder."):
                group = "encoder_head" if name.startswith("encoder.conv_out.") else "encoder"
            else:
                group = "decoder_input" if name.startswith("decoder.conv_in.") else "decoder_head" if name.startswith(head) else "decoder"
            groups[group].append(parameter)
        return groups

    @property
    def last_layer(self) -> Tensor:
        """The weight of the last convolution, where losses are balanced by their gradients."""
        return self.decoder.conv_out.conv.weight

    @property
    def spec(self) -> VAESpec:
        """What this instance is, as the record that plugins list."""
        return spec_of(self.config, self.name)

    def fingerprint(self) -> str:
        """sha256 of all that decides what a video becomes: weights, statistics, and the noise of the decoder."""
        config = self.config
        facts = f"{super().fingerprint()} {config.latents_mean} {config.latents_std} {config.decode_timestep} {config.decode_noise_scale}"
        return hashlib.sha256(facts.encode()).hexdigest()

    def reinitialised(self, **architecture: Any) -> Self:
        """A new VAE with fresh weights and this one's config, with the fields in `architecture` changed and no statistics yet."""
        return super().reinitialised(**{"latents_mean": (), "latents_std": (), **architecture})

    @classmethod
    def read_checkpoint(cls, path: Path) -> tuple[LTXConfig, State]:
        """Configuration and tensors of a file or folder in any layout of this VAE. ValueError says what else it is, or what is wrong."""
        from .ltx_files import read_checkpoint

        return read_checkpoint(path)

    @classmethod
    def official_names(cls, config: LTXConfig) -> dict[str, str]:
        """Own names are the official ones."""
        with torch.device("meta"):
            return {key: key for key in cls(config).state_dict()}

    def to_official(self) -> tuple[dict[str, str], State]:
        """Metadata and tensors of an official file, for `wan_vae.checkpoint.save_official`."""
        from .ltx_files import to_official

        return to_official(self)

    def to_diffusers(self) -> tuple[dict[str, Any], State]:
        """config.json and tensors of a folder for diffusers, for `wan_vae.checkpoint.save_diffusers`."""
        from .ltx_files import to_diffusers

        return to_diffusers(self)

    def from_diffusers(self, fields: Mapping[str, Any], path: Path) -> LTXConfig:
        """What a folder of diffusers with these fields and this one's tensors is read as."""
        from .ltx_diffusers import from_diffusers
        from .ltx_files import named

        statistics = {"latents_mean": self.config.latents_mean, "latents_std": self.config.latents_std}
        return named(from_diffusers(fields), path).model_copy(update=statistics)

    def encode_step(self, video: Tensor, state: LTXState) -> tuple[Tensor, Tensor | None]:
        """Mean and log-variance of a chunk, before normalisation; unchecked, the core of `LTXEncodeSession.push`."""
        p, wide, kind = self.config.patch_size, self.config.latent_channels, self.config.latent_log_var
        patches = rearrange(video.to(self.last_layer.dtype), "b c t (h q) (w r) -> b (c r q) t h w", q=p, r=p)
        made = self.encoder(patches, state)
        mean, rest = made[:, :wide], made[:, wide:]
        if kind == "none":
            return mean, None
        if kind == "constant":
            return mean, torch.full_like(mean, LOWEST)
        return mean, rest.expand_as(mean)

    def decode_step(self, latents: Tensor, state: LTXState, timesteps: Tensor | None = None) -> Tensor:
        """The frames of a chunk of normalised latents, noise and all; unchecked and unclamped, the core of `LTXDecodeSession.push`.

        timesteps: one for each video; None: `config.decode_timestep`
        """
        p = self.config.patch_size
        if timesteps is None:
            timesteps = torch.full((len(latents),), self.config.decode_timestep, device=latents.device)
        patches = self.decoder(self.denormalise(latents.to(self.last_layer.dtype)), state, timesteps)
        return rearrange(patches, "b (c r q) t h w -> b c t (h q) (w r)", q=p, r=p)

    def noised(self, latents: Tensor, state: LTXState, levels: Tensor | None = None) -> Tensor:
        """Normalised latents with the share of noise that the decoder takes; levels: for each video, None: `decode_noise_scale`."""
        if not self.config.timestep_conditioning or state.noise is None:
            return latents
        share: Tensor | float = self.config.decode_noise_scale if levels is None else levels.view(-1, 1, 1, 1, 1)
        return ((1 - share) * latents + share * state.noise.frames(latents)).to(latents.dtype)

    def normalise(self, mean: Tensor) -> Tensor:
        """Latents by the statistics of the config."""
        if not self.config.latents_std:
            return mean
        center, deviation = _statistics(self.config, mean.device)
        return ((mean - center) / deviation).to(mean.dtype)

    def denormalise(self, latents: Tensor) -> Tensor:
        """The inverse of `normalise`."""
        if not self.config.latents_std:
            return latents
        center, deviation = _statistics(self.config, latents.device)
        return (latents * deviation + center).to(latents.dtype)

    def check_video(self, video: Tensor, started: bool = False) -> None:
        """ValueError where T, H or W does not divide, with the nearest that does; `started`: a chunk has passed before."""
        check_video(video, self.config.stride, started)

    def check_latents(self, latents: Tensor) -> None:
        """ValueError where the shape is not `[B, latent_channels, T', H', W']`."""
        check_latents(latents, self.config.latent_channels)


def describe(path: str | os.PathLike[str]) -> VAESpec:
    """The facts of a checkpoint of this VAE, from its configuration or the names and shapes in its header; reads no weights."""
    from .ltx_files import describe

    return describe(path)


def spec_of(config: LTXConfig, name: str | None = None) -> VAESpec:
    """The spec of a VAE with this configuration, named by its latent space where it has no name."""
    return VAESpec(
        name=name or config.latent_space,
        target="wan_vae.codecs.ltx:LTXVAE",
        latent_space=config.latent_space,
        latent_channels=config.latent_channels,
        stride=config.stride,
        format=LTXVAE.format,
        describe="wan_vae.codecs.ltx:describe",
    )


def _normal(like: Tensor, generator: torch.Generator | None) -> Tensor:
    return torch.randn(like.shape, generator=generator, device=generator.device if generator is not None else like.device)


def _uniform(generator: torch.Generator | None) -> Tensor:
    return torch.rand((), generator=generator, device=generator.device if generator is not None else "cpu").cpu()


@lru_cache(maxsize=16)
def _statistics(config: LTXConfig, device: torch.device) -> tuple[Tensor, Tensor]:
    with torch.inference_mode(False):  # what is kept must be of use to those who need gradients, too
        center = torch.tensor(config.latents_mean or (0.0,) * config.latent_channels, device=device)
        deviation = torch.tensor(config.latents_std, device=device)
        return center.view(1, -1, 1, 1, 1), deviation.view(1, -1, 1, 1, 1)

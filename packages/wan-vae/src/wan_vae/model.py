"""The Wan video VAE: Wan2.1, Wan2.2 and the built-in tiny one are one class (Wan report, section 4.1).

Time is causal: the first frame is coded alone and every later group of frames from itself and the past, so that a video
of any length passes through chunk by chunk with the same result as at once.
Shapes: B batch, C channels, T frames, H height, W width.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, Self

import torch
from einops import rearrange
from torch import Tensor, nn

from ._shared.weights import Pretrained, State
from .chunks import chunks_of
from .config import TINY, VAEConfig
from .convolution import Convolution, resolve_backend
from .halves import Decoder, Encoder
from .layers import CausalConv
from .plugins import VAESpec
from .sessions import DecodeSession, EncodeSession, joined, stream
from .shapes import check_latents, check_video
from .stream import Shard, StreamState
from .tiles import Half
from .timestep import draw, mixed
from .winograd import Winograd

HALVES: tuple[Half, Half] = ("encoder", "decoder")


class WanVAE(Pretrained):
    """A causal video VAE.

    Video is `[B, 3, T, H, W]` in [-1, 1] with T = 1 + k * stride[0] and H, W multiples of stride[1]; latents are
    `[B, z_dim, 1 + k, H / stride[1], W / stride[2]]`, normalised per channel. `encode`, `decode` and the streams run
    without gradients in constant memory; `moments` and `reconstruct` are differentiable and take the clip whole.

    Example: `vae = load_vae("tiny"); video = vae.decode(vae.encode(video))`
    """

    format = "wan-vae/1"
    hub_files = ("config.json", "model_index.json", "vae/*", "Wan2.*_VAE.*")  # a whole video model may stand beside it
    hub_fallback = ("model.safetensors", "diffusion_pytorch_model.safetensors")

    def __init__(self, config: VAEConfig = TINY) -> None:
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.quant_conv = CausalConv(2 * config.z_dim, 2 * config.z_dim, (1, 1, 1))
        self.post_quant_conv = CausalConv(config.z_dim, config.z_dim, (1, 1, 1))
        self.decoder = Decoder(config)
        self._backend = "auto"
        self._winograd = Winograd()
        for name, module in self.named_modules():
            module.slot = name  # type: ignore[assignment]
            if isinstance(module, CausalConv) and module.kernel_size == (3, 3, 3):
                module.ahead = int(config.chunk > 0)

    @property
    def backend(self) -> str:
        """How convolutions are computed here: "direct", "winograd" or "conv2d"; set it to one of them, or to "auto"."""
        found = {self._resolve(half) for half in HALVES}
        return "winograd" if "winograd" in found else found.pop()

    @backend.setter
    def backend(self, name: str) -> None:
        before, self._backend = self._backend, name
        try:
            resolved = self.backend
        except ValueError:
            self._backend = before
            raise
        if resolved != "winograd":
            self._winograd.filters.drop(self.modules())

    def backend_on(self, device: torch.device, dtype: torch.dtype = torch.float32) -> str:
        """What "auto" would choose on another device."""
        return resolve_backend("auto", device, dtype, self._suited(), self._winograd.filters.bytes_kept)

    def _resolve(self, half: str) -> str:
        """The backend of "encoder" or "decoder": their types may differ, and one of them may be able to do what is asked."""
        weights = {"encoder": self.quant_conv.weight, "decoder": self.last_layer}
        able = [name for name, weight in weights.items() if weight.dtype == torch.float32]
        asked = "direct" if self._backend == "winograd" and able and half not in able else self._backend
        return resolve_backend(asked, weights[half].device, weights[half].dtype, self._suited(), self._winograd.filters.bytes_kept)

    def _suited(self) -> int:
        """Bytes of the layers that Winograd's algorithm suits."""
        convs = [module for module in self.modules() if isinstance(module, nn.Conv2d | nn.Conv3d)]
        return sum(conv.weight.nbytes for conv in convs if self._winograd.takes(conv))

    def set_precision(self, *, encode: torch.dtype | None = None, decode: torch.dtype | None = None) -> Self:
        """Compute either half in another type; norms stay in fp32. On a GPU `from_pretrained` sets fp32 and bf16.

        Latents from bf16 shift what is generated from them, pictures from bf16 look the same and take three quarters of the time.
        """
        for dtype, modules in ((encode, (self.encoder, self.quant_conv)), (decode, (self.decoder, self.post_quant_conv))):
            if dtype is not None:
                for module in modules:
                    module.to(dtype)
        return self

    @classmethod
    def from_pretrained(cls, source: str | os.PathLike[str], *, dtype: Any = None, device: Any = None) -> Self:
        """Load a folder, a file or a Hub id in any layout this package reads.

        dtype None is fp32, and bf16 for decoding on a GPU; device None is the CPU.
        """
        vae = super().from_pretrained(source, dtype=dtype or torch.float32, device=device)
        if dtype is None and vae.last_layer.device.type != "cpu":
            vae.set_precision(decode=torch.bfloat16)
        if vae.last_layer.device.type == "cuda":
            vae.spread_channels()
        return vae

    def spread_channels(self) -> None:
        """Store filters with the channels last, the order in which a GPU's convolutions are fastest; no number changes."""
        formats = {4: torch.channels_last, 5: torch.channels_last_3d}
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Conv3d):
                module.weight.data = module.weight.data.contiguous(memory_format=formats[module.weight.ndim])

    def encode_session(self, *, shard: Shard | None = None, compile: Mapping[str, Any] | None = None) -> EncodeSession:
        """A stream of frames to latents; its `push` takes the next chunk."""
        return EncodeSession(self, shard=shard, compile=compile)

    def decode_session(
        self, *, shard: Shard | None = None, compile: Mapping[str, Any] | None = None, generator: torch.Generator | None = None
    ) -> DecodeSession:
        """A stream of latents to frames; its `push` takes the next chunk."""
        return DecodeSession(self, shard=shard, compile=compile, generator=generator)

    def convolution(self, half: str) -> Convolution:
        """What computes the convolutions of "encoder" or "decoder"; transformed filters of the other half make room."""
        other = self.decoder if half == "encoder" else self.encoder
        self._winograd.filters.drop(other.modules())
        return self._convolution(half)

    def _convolution(self, half: str) -> Convolution:
        backend = self._resolve(half)
        return Convolution(backend, self._winograd if backend == "winograd" else None)

    @torch.no_grad()
    def encode(self, video: Tensor) -> Tensor:
        """Video to normalised latents, the mean of the posterior. ValueError where T, H or W does not divide."""
        self.check_video(video)
        return _whole(self.encode_session(), self._split("encoder", video))

    @torch.no_grad()
    def decode(self, latents: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
        """Normalised latents to video, clamped to [-1, 1].

        A conditioned decoder takes its noise from `generator`, or from a fixed seed; others draw none.
        """
        self.check_latents(latents)
        return _whole(self.decode_session(generator=generator), self._split("decoder", latents))

    @torch.no_grad()
    def encode_stream(self, chunks: Iterable[Tensor]) -> Iterator[Tensor]:
        """Chunks of frames to chunks of latents: the first has 1 frame (or 1 + k * stride[0]), every other k * stride[0].

        Where the config has a `chunk`, latents come when that is full, and the rest at the end.
        The generator holds the state, so streams may be interleaved. ValueError for a chunk that breaks the rule.
        """
        yield from stream(self.encode_session(), chunks)

    @torch.no_grad()
    def decode_stream(self, chunks: Iterable[Tensor], *, generator: torch.Generator | None = None) -> Iterator[Tensor]:
        """Chunks of latents to chunks of frames: the first has 1 latent frame, every other one or more.

        Where the config has a `chunk`, frames come when that is full, and the rest at the end.
        The generator holds the state, so streams may be interleaved.
        """
        yield from stream(self.decode_session(generator=generator), chunks)

    def moments(self, video: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log-variance of the latents, before normalisation; differentiable."""
        self.check_video(video)
        state = StreamState(convolution=self._convolution("encoder"))
        mean, logvar = zip(*self._passed(self.encode_step, chunks_of(self.config, "encoder", video), state), strict=True)
        return joined(mean), joined(logvar)

    def reconstruct(
        self, video: Tensor, generator: torch.Generator | Sequence[torch.Generator] | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """`(video, mean, logvar)`: the reconstruction, unclamped, and the moments; differentiable.

        Decodes a sample of the posterior in training mode or where a generator is given, one for all or one for each video, else its mean.
        In training mode a conditioned decoder meets a share of noise from [0, `config.max_timestep`], drawn for each video, and is told as
        much; else what it meets in `decode`.
        """
        mean, logvar = self.moments(video)
        latents, each = mean, _each(generator, len(mean))
        if self.training or generator is not None:
            noise = torch.stack([_noise(one, own) for one, own in zip(mean, each, strict=True)])
            latents = mean + noise.to(mean) * torch.exp(0.5 * logvar.clamp(-30, 20))
        state = StreamState(convolution=self._convolution("decoder"))
        if self.config.timestep_conditioning:
            noise, share, state.timestep = draw(self.config, latents, each, self.training)
            latents = self.denormalise(mixed(self.normalise(latents), noise, share))
        return joined(self._passed(self.decode_step, chunks_of(self.config, "decoder", latents), state)), mean, logvar

    def _passed(self, step: Callable[[Tensor, StreamState], Any], chunks: Sequence[Tensor], state: StreamState) -> list[Any]:
        """All chunks of a clip, gradients going through what is carried from one to the next; the last leaves nothing behind."""
        made = []
        for left, chunk in zip(range(len(chunks) - 1, -1, -1), chunks, strict=True):
            state.carry = left > 0
            made.append(step(chunk, state))
            state.started = True
        return made

    def _split(self, half: Half, x: Tensor) -> Sequence[Tensor]:
        """A clip in the smallest chunks that may be computed one by one."""
        if self.config.chunk:
            return chunks_of(self.config, half, x)
        time = self.config.stride[0] if half == "encoder" else 1
        return x.split([1, *[time] * ((x.shape[2] - 1) // time)], dim=2)

    @torch.no_grad()
    def fit_normaliser(self, batches: Iterable[Tensor]) -> None:
        """Measure mean and standard deviation of the latents per channel over batches of video, and set them in `config`."""
        count, total, square = 0, torch.zeros(self.config.z_dim, dtype=torch.float64), torch.zeros(self.config.z_dim, dtype=torch.float64)
        for video in batches:
            mean = self.moments(video)[0].transpose(0, 1).flatten(1).to("cpu", torch.float64)
            count, total, square = count + mean.shape[1], total + mean.sum(1), square + mean.square().sum(1)
        if count == 0:
            raise ValueError("fit_normaliser needs at least one batch of video, got none")
        center = total / count
        deviation = (square / count - center.square()).clamp_min(1e-12).sqrt()
        self.config = self.config.model_copy(update={"latents_mean": tuple(center.tolist()), "latents_std": tuple(deviation.tolist())})

    def parameter_groups(self) -> dict[str, list[nn.Parameter]]:
        """All parameters by the parts that staged training freezes and trains."""
        parts: dict[str, list[nn.Module]] = {
            "encoder": [self.encoder.conv_in, self.encoder.levels, self.encoder.middle],
            "encoder_head": [self.encoder.head, self.quant_conv],
            "decoder_input": [self.post_quant_conv, self.decoder.conv_in],
            "decoder": [self.decoder.middle, self.decoder.levels, *filter(None, [self.decoder.timestep])],
            "decoder_head": [self.decoder.head],
        }
        return {name: [parameter for module in modules for parameter in module.parameters()] for name, modules in parts.items()}

    @property
    def last_layer(self) -> Tensor:
        """The weight of the last convolution, where losses are balanced by their gradients."""
        return self.decoder.head.conv.weight

    @property
    def spec(self) -> VAESpec:
        """What this instance is, as the record that plugins list."""
        return spec_of(self.config, self.name)

    def fingerprint(self) -> str:
        """sha256 of all that decides what a video becomes: weights, statistics, and what the config has beyond Wan's."""
        config = self.config
        facts = f"{super().fingerprint()} {config.latents_mean} {config.latents_std}{config.beyond_wan or ''}"
        if config.timestep_conditioning:
            facts += f" {config.decode_timestep} {config.decode_noise_scale}"
        return hashlib.sha256(facts.encode()).hexdigest()

    def conditioned(self) -> WanVAE:
        """A copy whose decoder is told the timestep (`wan_vae.timestep.conditioned`)."""
        from .timestep import conditioned

        return conditioned(self)

    def reinitialised(self, **architecture: Any) -> Self:
        """A new VAE with fresh weights and this one's config, with the fields in `architecture` changed and no statistics yet."""
        return super().reinitialised(**{"latents_mean": (), "latents_std": (), **architecture})

    @classmethod
    def read_checkpoint(cls, path: Path) -> tuple[VAEConfig, State]:
        from .checkpoint import read_checkpoint

        return read_checkpoint(path)

    @classmethod
    def official_names(cls, config: VAEConfig) -> dict[str, str]:
        from .names import official_names

        return official_names(config)

    def encode_step(self, video: Tensor, state: StreamState) -> tuple[Tensor, Tensor]:
        """Mean and log-variance of a chunk, before normalisation; unchecked, the core of `EncodeSession.push`."""
        p = self.config.patch_size
        video = video.to(self.quant_conv.weight.dtype)
        patches = rearrange(video, "b c t (h q) (w r) -> b (c r q) t h w", q=p, r=p)
        mean, logvar = self.quant_conv(self.encoder(patches, state), state).chunk(2, dim=1)
        return mean, logvar

    def decode_step(self, latents: Tensor, state: StreamState) -> Tensor:
        """The frames of a chunk of latents that are not normalised; unchecked and unclamped, the core of `DecodeSession.push`."""
        p = self.config.patch_size
        latents = latents.to(self.post_quant_conv.weight.dtype)
        patches = self.decoder(self.post_quant_conv(latents, state), state)
        return rearrange(patches, "b (c r q) t h w -> b c t (h q) (w r)", q=p, r=p)

    def normalise(self, mean: Tensor) -> Tensor:
        """Latents by the statistics of the config."""
        if not self.config.latents_std:
            return mean
        center, deviation = _statistics(self.config, mean.device, mean.dtype)
        return (mean - center) / deviation

    def denormalise(self, latents: Tensor) -> Tensor:
        """The inverse of `normalise`."""
        if not self.config.latents_std:
            return latents
        center, deviation = _statistics(self.config, latents.device, latents.dtype)
        return latents * deviation + center

    def check_video(self, video: Tensor, started: bool = False) -> None:
        """ValueError where T, H or W does not divide, with the nearest that does; `started`: a chunk has passed before."""
        check_video(video, self.config.stride, started)

    def check_latents(self, latents: Tensor) -> None:
        """ValueError where the shape is not `[B, z_dim, T', H', W']`."""
        check_latents(latents, self.config.z_dim)


def spec_of(config: VAEConfig, name: str | None = None) -> VAESpec:
    """The spec of a VAE with this configuration, named by its latent space where it has no name."""
    return VAESpec(
        name=name or config.latent_space,
        target="wan_vae.model:WanVAE",
        latent_space=config.latent_space,
        latent_channels=config.z_dim,
        stride=config.stride,
        format=WanVAE.format,
        describe="wan_vae.checkpoint:describe",
    )


def untrained(config: VAEConfig | None = None) -> WanVAE:
    """A VAE with fresh weights. ValueError without a config: it is of architectures that nobody has published weights for."""
    if config is None:
        raise ValueError(
            "this is an architecture without weights: train it with wan-train (objective 'vae', init = 'random'), and load what comes of it"
        )
    return WanVAE(config)


def _each(generator: torch.Generator | Sequence[torch.Generator] | None, count: int) -> Sequence[torch.Generator | None]:
    return generator if isinstance(generator, Sequence) else count * [generator]


def _noise(like: Tensor, generator: torch.Generator | None) -> Tensor:
    return torch.randn(like.shape, generator=generator, device=generator.device if generator else like.device)


@lru_cache(maxsize=16)
def _statistics(config: VAEConfig, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    with torch.inference_mode(False):  # what is kept must be of use to those who need gradients, too
        center = torch.tensor(config.latents_mean or (0.0,) * config.z_dim, device=device, dtype=dtype)
        return center.view(1, -1, 1, 1, 1), torch.tensor(config.latents_std, device=device, dtype=dtype).view(1, -1, 1, 1, 1)


def _whole(session: EncodeSession | DecodeSession, chunks: Sequence[Tensor]) -> Tensor:
    """All chunks of a clip, of which the last leaves nothing to remember."""
    *others, last = chunks
    made = [session.push(chunk) for chunk in others]
    session.state.carry = False
    return torch.cat([*made, session.push(last), *session.finish()], dim=2)

"""TAEHV-style tiny video autoencoders (madebyollin/taehv): `taew2_1` and `taew2_2` make and show Wan's latents for a fraction of the work.

To decode takes a 25th of the arithmetic of Wan2.1's decoder, a 200th of Wan2.2's.

2D convolutions over single frames; time passes through memory blocks, which see the frame before, and by folding frames
into channels. Latents are the normalised ones, and each stands for the frames up to its last: latent i for 4i to 4i + 3
when encoding, for 4i - 3 to 4i when decoding, so that an encoder waits for frames and a decoder drops the first ones.
Modules are numbered as in the released files, so that own names are the official ones.
Shapes: B batch, C channels, T frames, H height, W width, N = B * T.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from .._shared.weights import Pretrained, State, locate, rename
from ..plugins import VAESpec
from ..shapes import check_latents, check_video
from .taehv_config import TAEW21, TAEHVConfig, infer_config, read_config

Memory = dict[str, Tensor]  # by module: the last frame that it saw, [B, C, H, W]; empty before the first chunk


class Squash(nn.Module):
    """Latents softly held within [-3, 3]."""

    def forward(self, x_NCHW: Tensor) -> Tensor:
        return torch.tanh(x_NCHW / 3) * 3


class MemoryBlock(nn.Module):
    """Three convolutions of a frame and the one before it, with a shortcut."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.conv = nn.Sequential(_conv(2 * dim, dim), nn.ReLU(), _conv(dim, dim), nn.ReLU(), _conv(dim, dim))

    def forward(self, x_NCHW: Tensor, past_NCHW: Tensor) -> Tensor:
        return F.relu(self.conv(torch.cat([x_NCHW, past_NCHW], 1)) + x_NCHW)


class WideMemoryBlock(nn.Module):
    """The block of the "super" decoders: a 7x7 convolution per channel, then an inverted bottleneck."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.conv = nn.Sequential(
            nn.Conv2d(2 * dim, 2 * dim, 7, padding=3, groups=2 * dim, bias=False),
            nn.Conv2d(2 * dim, 4 * dim, 1),
            nn.ReLU(),
            nn.Conv2d(4 * dim, dim, 1, bias=False),
        )

    def forward(self, x_NCHW: Tensor, past_NCHW: Tensor) -> Tensor:
        out: Tensor = self.conv(torch.cat([x_NCHW, past_NCHW], 1))
        return out + x_NCHW


class FoldTime(nn.Module):
    """`factor` frames to one."""

    def __init__(self, dim: int, factor: int) -> None:
        super().__init__()
        self.factor, self.conv = factor, nn.Conv2d(dim * factor, dim, 1, bias=False)

    def forward(self, x_NCHW: Tensor) -> Tensor:
        out: Tensor = self.conv(rearrange(x_NCHW, "(n f) c h w -> n (f c) h w", f=self.factor))
        return out


class UnfoldTime(nn.Module):
    """One frame to `factor`."""

    def __init__(self, dim: int, factor: int) -> None:
        super().__init__()
        self.factor, self.conv = factor, nn.Conv2d(dim, dim * factor, 1, bias=False)

    def forward(self, x_NCHW: Tensor) -> Tensor:
        return rearrange(self.conv(x_NCHW), "n (f c) h w -> (n f) c h w", f=self.factor)


class TAEHV(Pretrained):
    """A tiny video autoencoder in the layout of TAEHV, for previews: same interface and latents as the VAE that it stands in for.

    Video is `[B, 3, T, H, W]` in [-1, 1] with T = 1 + k * stride[0] and H, W multiples of stride[1]; latents are
    `[B, z_dim, 1 + k, H / stride[1], W / stride[2]]`, normalised. It encodes no log-variance.

    Example: `preview = load_vae("taew2_1"); frames = preview.decode(latents)`
    """

    format = "wan-taehv/1"

    def __init__(self, config: TAEHVConfig = TAEW21) -> None:
        super().__init__()
        self.config = config
        self.encoder = _encoder(config)
        self.decoder = _super_decoder(config) if config.wide_blocks else _decoder(config)

    @torch.no_grad()
    def encode(self, video: Tensor) -> Tensor:
        """Video to normalised latents. ValueError where T, H or W does not divide."""
        check_video(video, self.config.stride)
        first, *rest = video.split([1, *[self.config.stride[0]] * (video.shape[2] // self.config.stride[0])], dim=2)
        return torch.cat(list(self.encode_stream([first, *rest])), dim=2)

    @torch.no_grad()
    def decode(self, latents: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
        """Normalised latents to video, clamped to [-1, 1]. The decoder draws no noise: `generator` is not used."""
        check_latents(latents, self.config.z_dim)
        return torch.cat(list(self.decode_stream(latents.split(1, dim=2))), dim=2)

    @torch.no_grad()
    def encode_stream(self, chunks: Iterable[Tensor]) -> Iterator[Tensor]:
        """Chunks of frames to chunks of latents: the first has 1 + k * stride[0] frames, every other k * stride[0].

        A latent needs stride[0] frames, so latents come one later than frames do, and the last, for which the last frame is
        repeated, when the frames end. The generator holds the state. ValueError for a chunk that breaks the rule.
        """
        step, memory = self.config.stride[0], Memory()
        waiting: Tensor | None = None
        for chunk in chunks:
            check_video(chunk, self.config.stride, started=waiting is not None)
            frames = chunk if waiting is None else torch.cat([waiting, chunk], dim=2)
            ready = frames.shape[2] // step * step
            waiting = frames[:, :, ready:].clone()
            if ready:
                yield self.encode_step(frames[:, :, :ready], memory)
        if waiting is not None and waiting.shape[2]:
            yield self.encode_step(torch.cat([waiting, *[waiting[:, :, -1:]] * (-waiting.shape[2] % step)], dim=2), memory)

    @torch.no_grad()
    def decode_stream(self, chunks: Iterable[Tensor]) -> Iterator[Tensor]:
        """Chunks of latents to chunks of frames, of any number of latents each.

        The generator holds the state, so streams may be interleaved.
        """
        memory = Memory()
        for chunk in chunks:
            check_latents(chunk, self.config.z_dim)
            yield self.decode_step(chunk, memory)

    def encode_step(self, video: Tensor, memory: Memory) -> Tensor:
        """The latents of the next k * stride[0] frames of a stream; unchecked, `memory` is read and written."""
        frames = (video.to(self._dtype) + 1) / 2
        folded = rearrange(frames, "b c t (h q) (w r) -> b t (c q r) h w", q=self.config.patch_size, r=self.config.patch_size)
        return rearrange(_run(self.encoder, "encoder", folded, memory), "b t c h w -> b c t h w")

    def decode_step(self, latents: Tensor, memory: Memory) -> Tensor:
        """The frames of the next latents of a stream, clamped; unchecked, `memory` is read and written."""
        started, p = bool(memory), self.config.patch_size
        frames = _run(self.decoder, "decoder", rearrange(latents.to(self._dtype), "b c t h w -> b t c h w"), memory)
        video = rearrange(frames, "b t (c q r) h w -> b c t (h q) (w r)", q=p, r=p)
        return (video if started else video[:, :, self.config.stride[0] - 1 :]).clamp(0, 1) * 2 - 1

    @property
    def spec(self) -> VAESpec:
        """What this instance is, as the record that plugins list."""
        return _spec_of(self.config, self.name)

    @classmethod
    def read_checkpoint(cls, path: Path) -> tuple[TAEHVConfig, State]:
        """Configuration and tensors of a file or folder in the layout of TAEHV. ValueError says what else it is, or what is wrong."""
        from ..contents import check_one_dtype, read_tensors, shapes_of

        state = read_tensors(path)
        check_one_dtype(state, path)
        config = read_config(path, cls.format) or infer_config(shapes_of(state), path)
        return config, rename(state, {key: key for key in cls.official_names(config)}, path)

    @classmethod
    def official_names(cls, config: TAEHVConfig) -> dict[str, str]:
        """Own names are the official ones."""
        with torch.device("meta"):
            return {key: key for key in cls(config).state_dict()}

    @property
    def _dtype(self) -> torch.dtype:
        return next(self.parameters()).dtype


def describe(path: str | os.PathLike[str]) -> VAESpec:
    """The facts of a checkpoint in the layout of TAEHV, from its config.json or the names and shapes in its header."""
    from ..contents import read_header, shapes_of

    file = locate(path)
    config = read_config(file, TAEHV.format) or infer_config(shapes_of(read_header(file)), file)
    with torch.device("meta"):
        return replace(_spec_of(config), parameters=sum(parameter.numel() for parameter in TAEHV(config).parameters()))


def _spec_of(config: TAEHVConfig, name: str | None = None) -> VAESpec:
    return VAESpec(
        name=name or config.latent_space,
        target="wan_vae.codecs.taehv:TAEHV",
        latent_space=config.latent_space,
        latent_channels=config.z_dim,
        stride=config.stride,
        format=TAEHV.format,
        describe="wan_vae.codecs.taehv:describe",
    )


def _run(layers: nn.Sequential, name: str, x_BTCHW: Tensor, memory: Memory) -> Tensor:
    """`layers` over the frames of a chunk. Memory blocks take the frame before from `memory`, or zeros, and leave the last there."""
    batch = x_BTCHW.shape[0]
    x_NCHW = x_BTCHW.flatten(0, 1)
    for index, layer in enumerate(layers):
        if not isinstance(layer, MemoryBlock | WideMemoryBlock):
            x_NCHW = layer(x_NCHW)
            continue
        slot, frames_BTCHW = f"{name}.{index}", x_NCHW.unflatten(0, (batch, -1))
        before = memory[slot] if slot in memory else torch.zeros_like(frames_BTCHW[:, 0])
        past_BTCHW = torch.cat([before[:, None], frames_BTCHW[:, :-1]], dim=1)
        memory[slot] = frames_BTCHW[:, -1].clone()  # a view would keep the whole chunk
        x_NCHW = layer(x_NCHW, past_BTCHW.flatten(0, 1))
    return x_NCHW.unflatten(0, (batch, -1))


def _conv(before: int, after: int, **options: Any) -> nn.Conv2d:
    return nn.Conv2d(before, after, 3, padding=1, **options)


def _encoder(config: TAEHVConfig) -> nn.Sequential:
    dim = config.encoder_dim
    layers: list[nn.Module] = [_conv(3 * config.patch_size**2, dim), nn.ReLU()]
    for halve in config.temporal_downsample:
        layers += [FoldTime(dim, 1 + halve), _conv(dim, dim, stride=2, bias=False), *(MemoryBlock(dim) for _ in range(3))]
    return nn.Sequential(*layers, _conv(dim, config.z_dim))


def _decoder(config: TAEHVConfig) -> nn.Sequential:
    dims = config.decoder_dims
    layers: list[nn.Module] = [Squash(), _conv(config.z_dim, dims[0]), nn.ReLU()]
    for dim, following, double in zip(dims, dims[1:], config.temporal_upsample, strict=False):
        layers += [*(MemoryBlock(dim) for _ in range(3)), nn.Upsample(scale_factor=2), UnfoldTime(dim, 1 + double)]
        layers += [_conv(dim, following, bias=False)]
    return nn.Sequential(*layers, nn.ReLU(), _conv(dims[-1], 3 * config.patch_size**2))


def _super_decoder(config: TAEHVConfig) -> nn.Sequential:
    dims = config.decoder_dims
    layers: list[nn.Module] = [nn.Conv2d(config.z_dim, dims[0], 1, bias=False)]
    for dim, following, double in zip(dims, dims[1:], config.temporal_upsample, strict=False):
        layers += [*(WideMemoryBlock(dim) for _ in range(3)), _conv(dim, 4 * following), nn.ReLU(), nn.PixelShuffle(2)]
        layers += [UnfoldTime(following, 1 + double)]
    return nn.Sequential(*layers, _conv(dims[-1], 3 * config.patch_size**2))

"""A decoder that takes out noise: what tells it how much there is, and where the noise comes from (as in LTX-Video).

Shapes: B batch, C channels, T frames, H height, W width, D width of the embedding.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .config import VAEConfig

if TYPE_CHECKING:
    from .model import WanVAE

FREQUENCIES = 256  # sines and cosines of a timestep
EMBEDDING = 256
RANGE = 1000  # timesteps from 0 to 1 are spread over what the frequencies tell apart
SEED = 0x7A5E  # of the noise where no generator is given
STEP = 0x9E3779B1  # odd, from the seed of a frame's noise to that of the next: torch's CPU generator looks at 32 bits


class TimestepEmbedding(nn.Module):
    """A timestep in [0, 1] to a vector: sines and cosines, then two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.linear1 = nn.Linear(FREQUENCIES, EMBEDDING)
        self.linear2 = nn.Linear(EMBEDDING, EMBEDDING)

    def forward(self, timestep_B: Tensor) -> Tensor:
        half = FREQUENCIES // 2
        rates = torch.exp(-math.log(10000) * torch.arange(half, dtype=torch.float32, device=timestep_B.device) / half)
        angles = RANGE * timestep_B.float()[:, None] * rates
        waves = torch.cat([angles.cos(), angles.sin()], dim=1)
        return _linear(self.linear2, F.silu(_linear(self.linear1, waves)))


class ScaleShift(nn.Linear):
    """What a norm's output is multiplied by, less 1, and what is added, from the timestep: a row of the table for each component of its
    embedding. At zero, as it starts, it changes nothing."""

    def __init__(self, dim: int) -> None:
        super().__init__(EMBEDDING, 2 * dim)

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.weight)
        nn.init.zeros_(self.bias)

    def forward(self, embedding_BD: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        scale_BC, shift_BC = _linear(self, F.silu(embedding_BD)).to(self.weight.dtype).chunk(2, dim=1)
        return scale_BC[..., None, None, None], shift_BC[..., None, None, None]


def _linear(layer: nn.Linear, x_BD: Tensor) -> Tensor:
    """The layer in fp32 at least, its sums in one order: that of a BLAS for one row depends on where in memory the weights lie."""
    dtype = torch.promote_types(layer.weight.dtype, torch.float32)
    return (x_BD.to(dtype)[:, None] * layer.weight.to(dtype)).sum(2) + layer.bias.to(dtype)


class FrameNoise:
    """Noise for the latent frames of a stream, one after the other, the same for all videos of a batch.

    A frame's noise depends on the seed and its index alone, so that neither chunks nor where a stream is resumed matter; it is drawn
    on the CPU, so that it is the same on every device.
    """

    def __init__(self, seed: int, index: int = 0) -> None:
        self.seed, self.index = seed, index

    @classmethod
    def of(cls, generator: torch.Generator | None) -> FrameNoise:
        """Of a generator, which moves on by one draw; of a fixed seed where there is none."""
        if generator is None:
            return cls(SEED)
        return cls(int(torch.randint(2**31, (), generator=generator, device=generator.device)))

    def frames(self, like_BCTHW: Tensor) -> Tensor:
        """Noise `[1, C, T, H, W]` for the next T frames."""
        _, channels, frames, height, width = like_BCTHW.shape
        seeds = [(self.seed + STEP * index) % 2**32 for index in range(self.index, self.index + frames)]
        self.index += frames
        drawn = [torch.randn(channels, height, width, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
        return torch.stack(drawn, dim=1)[None].to(like_BCTHW)


def mixed(latents: Tensor, noise: Tensor, share: Tensor | float) -> Tensor:
    """Normalised latents of which a share, one or `[B]`, has given way to noise."""
    share = share.to(latents).view(-1, 1, 1, 1, 1) if isinstance(share, Tensor) else share
    return (1 - share) * latents + share * noise


def told(config: VAEConfig, device: torch.device) -> Tensor | None:
    """The timestep `[1]` that `decode` tells the decoder; None where that is not conditioned."""
    return torch.tensor([config.decode_timestep], device=device) if config.timestep_conditioning else None


def draw(
    config: VAEConfig, latents: Tensor, generators: Sequence[torch.Generator | None], training: bool
) -> tuple[Tensor, Tensor | float, Tensor]:
    """Noise for latents, the share of it, and the timestep to tell, by a generator for each video.

    training: share and timestep are one, drawn from [0, `max_timestep`] for each video; else they are those of `decode`
    """
    if training:
        places = [own.device if own is not None else latents.device for own in generators]
        levels = [torch.rand((), generator=own, device=place).to(latents.device) for own, place in zip(generators, places, strict=True)]
        timestep = config.max_timestep * torch.stack(levels)
        pairs = zip(latents, generators, places, strict=True)
        noise = [torch.randn(one.shape, generator=own, device=place).to(one) for one, own, place in pairs]
        return torch.stack(noise), timestep, timestep
    noise = [FrameNoise.of(own).frames(one[None]) for one, own in zip(latents, generators, strict=True)]
    timestep = torch.full((len(latents),), config.decode_timestep, device=latents.device)
    return torch.cat(noise), config.decode_noise_scale, timestep


def conditioned(vae: WanVAE) -> WanVAE:
    """A copy of a plain VAE whose decoder is told a timestep, which changes nothing before it is trained.

    Every tensor of the plain one is taken over, and what is new is a `ScaleShift` or the `TimestepEmbedding`. Since `decode` mixes
    noise in, its pictures are those of the plain decoder for latents with that noise.
    ValueError where the decoder is conditioned already, or tensors do not fit.
    """
    if vae.config.timestep_conditioning:
        raise ValueError("the decoder of this VAE is conditioned on a timestep already")
    made = type(vae)(vae.config.model_copy(update={"timestep_conditioning": True}))
    new = {f"{name}." for name, module in made.named_modules() if isinstance(module, ScaleShift | TimestepEmbedding)}
    fresh = {key: value for key, value in made.state_dict().items() if key.startswith(tuple(new))}
    state = {key: value.clone() for key, value in vae.state_dict().items()}
    if wrong := state.keys() ^ (made.state_dict().keys() - fresh.keys()):
        raise ValueError(f"not the tensors of a plain VAE: {', '.join(sorted(wrong)[:3])}")
    weight = vae.last_layer
    made.load_state_dict({**state, **{key: value.to(weight) for key, value in fresh.items()}}, assign=True)
    made.requires_grad_(weight.requires_grad)
    return made.train(vae.training)

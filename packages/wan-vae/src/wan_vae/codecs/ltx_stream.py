"""What a stream through LTX-Video's VAE carries, and where its noise comes from.

The decoder sees as many later frames as earlier ones, so in a stream every convolution runs behind by the frames that it still
has to see, and shortcuts wait for it. What is held is a few frames a layer, however long the stream. At its end the convolutions
are closed one after the other, each over a copy of its last frame, and the frames that they held back run through the rest.
Shapes: B batch, C channels, T frames, H height, W width.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from .ltx import LTXVAE

SEED = 0  # of the noise where no generator is given


class Noise:
    """Noise for decoding, drawn on the CPU so that it is the same on every device.

    seeds: one, for all videos of a batch alike, or one for each. Every frame has its own draw, so that chunks do not matter
    """

    def __init__(self, seeds: Sequence[int]) -> None:
        self._latents = [torch.Generator().manual_seed(seed) for seed in seeds]
        self._maps = [torch.Generator().manual_seed(seed + 1) for seed in seeds]

    @classmethod
    def of(cls, generator: torch.Generator | None) -> Noise:
        """The noise of a generator, which moves on by one draw; of a fixed seed where there is none."""
        return cls([SEED if generator is None else draw_seed(generator)])

    def frames(self, like_BCTHW: Tensor) -> Tensor:
        """Noise for the next frames of the latents, `[1 or B, C, T, H, W]`."""
        channels, frames, height, width = like_BCTHW.shape[1:]
        videos = [torch.stack([torch.randn(channels, height, width, generator=own) for _ in range(frames)], dim=1) for own in self._latents]
        return torch.stack(videos).to(like_BCTHW.device)

    def map(self, like_BCTHW: Tensor) -> Tensor:
        """Noise for the positions of a frame, `[1 or B, 1, 1, H, W]`."""
        drawn = torch.stack([torch.randn(like_BCTHW.shape[3:], generator=own) for own in self._maps])
        return drawn[:, None, None].to(like_BCTHW)


def draw_seed(generator: torch.Generator | None) -> int:
    """A seed from a generator, or from torch's own."""
    device = generator.device if generator is not None else "cpu"
    return int(torch.randint(2**31, (), generator=generator, device=device))


@dataclass
class LTXState:
    """What one stream remembers, by the name of the layer.

    carry: False for a clip given whole: nothing is remembered, and both its ends are known
    noise: for decoders that take some
    history: frames that a layer still needs, before its next input
    maps: noise per position, drawn once a stream
    started: layers that have seen the first frame
    closing: the convolution that sees its last frame in this pass
    """

    carry: bool = True
    noise: Noise | None = None
    history: dict[str, Tensor] = field(default_factory=dict)
    maps: dict[str, Tensor] = field(default_factory=dict)
    started: set[str] = field(default_factory=set)
    closing: str = ""

    @property
    def nbytes(self) -> int:
        """Bytes of all that is held."""
        return sum(value.untyped_storage().nbytes() for held in (self.history, self.maps) for value in held.values())

    def around(self, slot: str, x_BCTHW: Tensor, before: int, after: int, stride: int) -> Tensor:
        """What a convolution of `before + 1 + after` frames may see now; fewer frames than that where it has to wait.

        Before the first frame there are copies of it, after the last one of that.
        """
        if not self.carry:
            return torch.cat([*[x_BCTHW[:, :, :1]] * before, x_BCTHW, *[x_BCTHW[:, :, -1:]] * after], dim=2)
        seen_BCTHW = self._joined(slot, x_BCTHW)
        if self.first(slot, seen_BCTHW):
            seen_BCTHW = torch.cat([*[seen_BCTHW[:, :, :1]] * before, seen_BCTHW], dim=2)
        if self.closing == slot:
            return torch.cat([seen_BCTHW, *[seen_BCTHW[:, :, -1:]] * after], dim=2)
        steps = max(0, (seen_BCTHW.shape[2] - before - after - 1) // stride + 1)
        self._keep(slot, seen_BCTHW[:, :, steps * stride :])
        return seen_BCTHW

    def aligned(self, slot: str, x_BCTHW: Tensor, frames: int) -> Tensor:
        """The next `frames` frames of a shortcut; later ones wait."""
        if not self.carry:
            return x_BCTHW
        seen_BCTHW = self._joined(slot, x_BCTHW)
        self._keep(slot, seen_BCTHW[:, :, frames:])
        return seen_BCTHW[:, :, :frames]

    def first(self, slot: str, x_BCTHW: Tensor) -> bool:
        """Whether `x` has the first frame that `slot` sees; asked once a chunk."""
        if not self.carry:
            return True
        first = slot not in self.started and x_BCTHW.shape[2] > 0
        if first:
            self.started.add(slot)
        return first

    def map(self, slot: str, x_BCTHW: Tensor) -> Tensor:
        """The noise map of a layer, the same for all frames of the stream."""
        assert self.noise is not None
        if slot not in self.maps:
            self.maps[slot] = self.noise.map(x_BCTHW)
        return self.maps[slot]

    def closes(self, slot: str) -> bool:
        """Whether the convolution that closes in this pass is within `slot`."""
        return self.closing.startswith(f"{slot}.")

    def _joined(self, slot: str, x_BCTHW: Tensor) -> Tensor:
        past_BCTHW = self.history.pop(slot, None)
        return x_BCTHW if past_BCTHW is None else torch.cat([past_BCTHW, x_BCTHW], dim=2)

    def _keep(self, slot: str, x_BCTHW: Tensor) -> None:
        if x_BCTHW.shape[2]:
            self.history[slot] = x_BCTHW.clone()  # a view would keep the whole chunk


class LTXSession:
    """What encoding and decoding share: a state, and frames of one size."""

    def __init__(self, vae: LTXVAE, noise: Noise | None = None) -> None:
        self.vae, self.state = vae, LTXState(noise=noise)
        self._size: tuple[int, ...] | None = None

    @property
    def started(self) -> bool:
        """Whether a chunk has passed."""
        return self._size is not None

    def _same_size(self, x_BCTHW: Tensor) -> None:
        size = (len(x_BCTHW), *x_BCTHW.shape[3:])
        if self._size not in (None, size):
            raise ValueError(f"the stream has batch, height and width {self._size}, this chunk {size}: start another session")
        self._size = size


class LTXEncodeSession(LTXSession):
    """Frames to latents: the first chunk has 1 + k * stride[0] frames, every other k * stride[0]."""

    @torch.no_grad()
    def push(self, video: Tensor, *, moments: bool = False) -> Any:
        """The latents of a chunk, normalised; with `moments` a pair of them and their log-variance.

        ValueError for a chunk that breaks the rule, and for `moments` of a VAE that encodes no log-variance.
        """
        if moments and self.vae.config.latent_log_var == "none":
            raise ValueError(f"'{self.vae.spec.name}' encodes no log-variance (latent_log_var is 'none')")
        self.vae.check_video(video, started=self.started)
        self._same_size(video)
        mean, logvar = self.vae.encode_step(video, self.state)
        latents = self.vae.normalise(mean)
        return (latents, logvar) if moments else latents


class LTXDecodeSession(LTXSession):
    """Latents to frames. A decoder that is not causal gives none before it has seen `vae.look_ahead` frames more; `finish` the rest."""

    @torch.no_grad()
    def push(self, latents: Tensor) -> Tensor:
        """The frames that are ready, `[B, 3, T, H, W]` in [-1, 1]; T may be 0."""
        self.vae.check_latents(latents)
        self._same_size(latents)
        return self.vae.decode_step(self.vae.noised(latents, self.state), self.state).clamp(-1, 1)

    @torch.no_grad()
    def finish(self) -> Iterator[Tensor]:
        """The frames that were held back, a few at a time; nothing may be pushed after it."""
        if self._size is None or self.vae.config.causal_decoder:
            return
        batch, *sizes = self._size
        weight = self.vae.last_layer
        nothing = weight.new_empty(batch, self.vae.config.latent_channels, 0, *sizes)
        for slot in self.vae.closings:
            self.state.closing = slot
            video = self.vae.decode_step(nothing, self.state).clamp(-1, 1)
            if video.shape[2]:
                yield video
        self.state.closing = ""

"""A stream through one half of a VAE, chunk by chunk: the session owns what has to be remembered, the model nothing.

So several sessions run on one model at once, and one can be saved and go on elsewhere.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .stream import Shard, StreamState

if TYPE_CHECKING:
    from .model import WanVAE

STARTED, HISTORY = "started", "history."


class Session:
    """What encoding and decoding share: a state that is carried, saved and restored.

    shard: the rows that this process holds, where several share one picture
    """

    half: str

    def __init__(self, vae: WanVAE, *, shard: Shard | None = None) -> None:
        self.vae = vae
        self.state = StreamState(convolution=vae.convolution(self.half), shard=shard)

    @property
    def started(self) -> bool:
        """Whether a chunk has passed."""
        return self.state.started

    @property
    def skipped(self) -> int:
        """Blocks that were not computed again, because the stream stood still."""
        return self.state.skipped

    def state_dict(self) -> dict[str, Tensor]:
        """Everything that the next chunk depends on, as tensors that safetensors can hold."""
        history = {f"{HISTORY}{name}": value.contiguous() for name, value in self.state.history.items()}
        return {STARTED: torch.tensor(self.state.started), **history}

    def load_state_dict(self, saved: Mapping[str, Tensor]) -> None:
        """Go on where another session of the same model stood. ValueError where the state is of another model or half."""
        names = {key.removeprefix(HISTORY) for key in saved if key.startswith(HISTORY)}
        layers = dict(self.vae.named_modules())
        strange = {name for name in names if name not in layers or not name.startswith(f"{self.half}.")}
        if STARTED not in saved or strange or len(names) + 1 != len(saved):
            raise ValueError(f"not a state of this model's {self.half}: {', '.join(sorted(strange)[:3]) or 'tensors are missing or extra'}")
        self.state.history = {name: saved[f"{HISTORY}{name}"].clone() for name in names}
        self.state.started = bool(saved[STARTED])
        self.state.last, self.state.held = None, False
        self.state.traces.clear()


class EncodeSession(Session):
    """Frames to latents: the first chunk has 1 frame (or 1 + k * stride[0]), every other k * stride[0].

    Example: `session = vae.encode_session(); first = session.push(video[:, :, :1]); rest = session.push(video[:, :, 1:])`
    """

    half = "encoder"

    @torch.no_grad()
    def push(self, video: Tensor, *, moments: bool = False) -> Any:
        """The latents of a chunk `[B, 3, T, H, W]`, normalised; with `moments` a pair of them and their log-variance.

        ValueError for a chunk that breaks the rule of the class.
        """
        self.vae.check_video(video, started=self.started)
        self.state.watch(video)
        mean, logvar = self.vae.encode_step(video, self.state)
        self.state.started = True
        latents = self.vae.normalise(mean)
        return (latents, logvar) if moments else latents


class DecodeSession(Session):
    """Latents to frames: the first chunk has 1 latent frame, every other one or more."""

    half = "decoder"

    @torch.no_grad()
    def push(self, latents: Tensor) -> Tensor:
        """The frames of a chunk `[B, z_dim, T', H', W']`, clamped to [-1, 1]."""
        self.vae.check_latents(latents)
        self.state.watch(latents)
        video = self.vae.decode_step(self.vae.denormalise(latents), self.state)
        self.state.started = True
        return video.clamp(-1, 1)

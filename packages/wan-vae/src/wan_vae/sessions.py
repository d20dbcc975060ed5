"""A stream through one half of a VAE, chunk by chunk: the session owns what has to be remembered, the model nothing.

So several sessions run on one model at once, and one can be saved and go on elsewhere.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .convolution import Convolution
from .layers import CausalConv
from .resample import Downsample
from .stream import Shard, StreamState

if TYPE_CHECKING:
    from .model import WanVAE

DIRECT = Convolution()
STEPS = {"encoder": "encode_step", "decoder": "decode_step"}
STARTED, HISTORY = "started", "history."


def step(vae: WanVAE, name: str, x: Tensor, history: Mapping[str, Tensor], started: bool) -> tuple[Any, dict[str, Tensor]]:
    """A step without state: what it makes of a chunk, and what is to be remembered."""
    state = StreamState(history=dict(history), started=started, convolution=DIRECT)
    return getattr(vae, name)(x, state), state.history


class Session:
    """What encoding and decoding share: a state that is carried, saved and restored.

    shard: the rows that this process holds, where several share one picture
    compile: options of `torch.compile`, such as `{"mode": "reduce-overhead"}` for CUDA graphs; each step is one graph, of which
        there are two, for the first chunk and for the others
    """

    half: str

    def __init__(self, vae: WanVAE, *, shard: Shard | None = None, compile: Mapping[str, Any] | None = None) -> None:
        if shard is not None and compile is not None:
            raise ValueError("a session of a shard of the picture cannot be compiled: leave out compile or shard")
        self.vae = vae
        self.state = StreamState(convolution=vae.convolution(self.half), shard=shard)
        self._size: tuple[int, ...] | None = None
        self._compiled = None if compile is None else torch.compile(step, fullgraph=True, **compile)

    def _step(self, x: Tensor) -> Any:
        """One chunk through the half; the state moves on. ValueError where the stream changes its size."""
        size = (len(x), *x.shape[3:])
        if self._size not in (None, size):
            raise ValueError(f"the stream has batch, height and width {self._size}, this chunk {size}: start another session")
        self._size = size
        if self._compiled is None:
            made = getattr(self.vae, STEPS[self.half])(self.state.watch(x), self.state)
        else:
            made, history = self._compiled(self.vae, STEPS[self.half], x, self.state.history, self.state.started)
            self.state.history = {name: value.clone() for name, value in history.items()}  # the next run writes over its outputs
        self.state.started = True
        return made

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

    def _memories(self) -> dict[str, tuple[int]]:
        """Every layer of the half that remembers frames, and its channels."""
        memories = {}
        for name, module in self.vae.named_modules():
            if name.startswith(f"{self.half}."):
                if isinstance(module, CausalConv) and module.kernel_size[0] > 1:
                    memories[name] = (module.in_channels,)
                if isinstance(module, Downsample) and module.time_conv is not None:
                    memories[name] = (module.time_conv.in_channels,)
        return memories

    def load_state_dict(self, saved: Mapping[str, Tensor]) -> None:
        """Go on where another session of the same model stood. ValueError where the state is of another model or half."""
        found = {key.removeprefix(HISTORY): value for key, value in saved.items() if key.startswith(HISTORY)}
        expected = self._memories() if STARTED in saved and bool(saved[STARTED]) else {}
        wrong = {name for name in expected.keys() | found.keys() if name not in found or found[name].shape[1:2] != expected.get(name, ())}
        strange = sorted(found.keys() - expected.keys()) or sorted(wrong)
        if STARTED not in saved or wrong or len(found) + 1 != len(saved):
            raise ValueError(f"not a state of this model's {self.half}: {', '.join(strange[:3]) or 'tensors are missing or extra'}")
        weight = next(getattr(self.vae, self.half).parameters())
        self.state.history = {name: value.to(weight.device, weight.dtype, copy=True) for name, value in found.items()}
        self._size = None
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
        mean, logvar = self._step(video)
        latents = self.vae.normalise(mean)
        return (latents, logvar) if moments else latents


class DecodeSession(Session):
    """Latents to frames: the first chunk has 1 latent frame, every other one or more."""

    half = "decoder"

    @torch.no_grad()
    def push(self, latents: Tensor) -> Tensor:
        """The frames of a chunk `[B, z_dim, T', H', W']`, clamped to [-1, 1]."""
        self.vae.check_latents(latents)
        video: Tensor = self._step(self.vae.denormalise(latents))
        return video.clamp(-1, 1)

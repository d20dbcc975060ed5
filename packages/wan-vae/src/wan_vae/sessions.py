"""A stream through one half of a VAE, chunk by chunk: the session owns what has to be remembered, the model nothing.

So several sessions run on one model at once, and one can be saved and go on elsewhere.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .chunks import Waiting
from .convolution import Convolution
from .layers import CausalConv
from .resample import Downsample
from .stream import Shard, StreamState
from .tiles import Half
from .timestep import FrameNoise, mixed, told

if TYPE_CHECKING:
    from .model import WanVAE

DIRECT = Convolution()
STEPS = {"encoder": "encode_step", "decoder": "decode_step"}
STARTED, HISTORY, WAITING, NOISE = "started", "history.", "waiting", "noise"


def step(
    vae: WanVAE, name: str, x: Tensor, history: Mapping[str, Tensor], started: bool, timestep: Tensor | None = None
) -> tuple[Any, dict[str, Tensor]]:
    """A step without state: what it makes of a chunk, and what is to be remembered."""
    state = StreamState(history=dict(history), started=started, convolution=DIRECT, timestep=timestep)
    return getattr(vae, name)(x, state), state.history


class Session:
    """What encoding and decoding share: a state that is carried, saved and restored.

    A VAE with `config.chunk` takes so many latent frames at a time: what is pushed waits until they are there, and `push` gives what
    has become ready, which may be nothing (0 frames). `finish` ends the stream and gives the rest.

    shard: the rows that this process holds, where several share one picture
    compile: options of `torch.compile`, such as `{"mode": "reduce-overhead"}` for CUDA graphs; each step is one graph, of which
        there are two, for the first chunk and for the others
    """

    half: Half

    def __init__(self, vae: WanVAE, *, shard: Shard | None = None, compile: Mapping[str, Any] | None = None) -> None:
        if shard is not None and compile is not None:
            raise ValueError("a session of a shard of the picture cannot be compiled: leave out compile or shard")
        self.vae = vae
        self.state = StreamState(convolution=vae.convolution(self.half), shard=shard)
        self.waiting, self.ended = Waiting(vae.config, self.half), False
        self.noise: FrameNoise | None = None
        self._size: tuple[int, ...] | None = None
        self._compiled = None if compile is None else torch.compile(step, fullgraph=True, **compile)

    def _ready(self, x: Tensor) -> list[Tensor]:
        """The chunks that can be computed now. ValueError where the stream changes its size or has ended."""
        size = (len(x), *x.shape[3:])
        if self.ended:
            raise ValueError("the stream has ended: start another session")
        if self._size not in (None, size):
            raise ValueError(f"the stream has batch, height and width {self._size}, this chunk {size}: start another session")
        self._size = size
        return self.waiting.push(x)

    def _rest(self) -> list[Tensor]:
        """The last chunk, where one waits; the stream ends."""
        self.ended = True
        return self.waiting.rest()

    def _step(self, x: Tensor) -> Any:
        """One chunk through the half; the state moves on."""
        if self._compiled is None:
            made = getattr(self.vae, STEPS[self.half])(self.state.watch(x), self.state)
        else:
            made, history = self._compiled(self.vae, STEPS[self.half], x, self.state.history, self.started, self.state.timestep)
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
        """Everything that the next chunk depends on, as tensors that safetensors can hold. ValueError after the end."""
        if self.ended:
            raise ValueError("the stream has ended, there is nothing to go on with: save the state before `finish`")
        waiting = {} if self.waiting.held_BCTHW is None else {WAITING: self.waiting.held_BCTHW.contiguous()}
        history = {f"{HISTORY}{name}": value.contiguous() for name, value in self.state.history.items()}
        noise = {} if self.noise is None else {NOISE: torch.tensor([self.noise.seed, self.noise.index])}
        return {STARTED: torch.tensor(self.state.started), **waiting, **noise, **history}

    def _memories(self) -> dict[str, tuple[int, int]]:
        """Every layer of the half that remembers frames: its channels, and how many frames."""
        memories = {}
        for name, module in self.vae.named_modules():
            if name.startswith(f"{self.half}."):
                if isinstance(module, CausalConv) and module.kernel_size[0] > 1:
                    memories[name] = (module.in_channels, module.behind)
                if isinstance(module, Downsample) and module.time_conv is not None:
                    memories[name] = (module.time_conv.in_channels, 1)
        return memories

    def load_state_dict(self, saved: Mapping[str, Tensor]) -> None:
        """Go on where another session of the same model stood. ValueError where the state is of another model or half."""
        found = {key.removeprefix(HISTORY): value for key, value in saved.items() if key.startswith(HISTORY)}
        expected = self._memories() if STARTED in saved and bool(saved[STARTED]) else {}
        wrong = {name for name in expected.keys() | found.keys() if name not in found or found[name].shape[1:3] != expected.get(name, ())}
        strange = sorted(found.keys() - expected.keys()) or sorted(wrong)
        held = saved.get(WAITING) if self.waiting.size else None
        noise = saved.get(NOISE) if self.noise is not None else None
        known = len(found) + sum(value is not None for value in (saved.get(STARTED), held, noise))
        if STARTED not in saved or wrong or known != len(saved) or (noise is None) != (self.noise is None):
            raise ValueError(f"not a state of this model's {self.half}: {', '.join(strange[:3]) or 'tensors are missing or extra'}")
        weight = next(getattr(self.vae, self.half).parameters())
        self.state.history = {name: value.to(weight.device, weight.dtype, copy=True) for name, value in found.items()}
        self.waiting.held_BCTHW = None if held is None else held.to(weight.device, copy=True)
        self._size = None if held is None else (len(held), *held.shape[3:])
        self.ended = False
        self.noise = None if noise is None else FrameNoise(*noise.tolist())
        self.state.started = self.waiting.started = bool(saved[STARTED])
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
        made = [self._encoded(chunk) for chunk in self._ready(video)]
        latents, logvar = map(joined, zip(*made, strict=True)) if made else [no_latents(self.vae, video)] * 2
        return (latents, logvar) if moments else latents

    @torch.no_grad()
    def finish(self, *, moments: bool = False) -> list[Any]:
        """What was still waiting, as `push` gives it: one chunk of latents or none. The stream ends."""
        made = [self._encoded(chunk) for chunk in self._rest()]
        return made if moments else [latents for latents, _ in made]

    def _encoded(self, chunk: Tensor) -> tuple[Tensor, Tensor]:
        mean, logvar = self._step(chunk)
        return self.vae.normalise(mean), logvar


class DecodeSession(Session):
    """Latents to frames: the first chunk has 1 latent frame, every other one or more.

    generator: what the noise of a conditioned decoder is drawn from; None: a fixed seed
    """

    half = "decoder"

    def __init__(
        self,
        vae: WanVAE,
        *,
        shard: Shard | None = None,
        compile: Mapping[str, Any] | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__(vae, shard=shard, compile=compile)
        if vae.config.timestep_conditioning:
            self.noise, self.state.timestep = FrameNoise.of(generator), told(vae.config, vae.last_layer.device)

    @torch.no_grad()
    def push(self, latents: Tensor) -> Tensor:
        """The frames of a chunk `[B, z_dim, T', H', W']`, clamped to [-1, 1]."""
        self.vae.check_latents(latents)
        made = [self._decoded(chunk) for chunk in self._ready(latents)]
        return joined(made) if made else no_frames(self.vae, latents)

    @torch.no_grad()
    def finish(self) -> list[Tensor]:
        """What was still waiting: one chunk of frames or none. The stream ends."""
        return [self._decoded(chunk) for chunk in self._rest()]

    def _decoded(self, chunk: Tensor) -> Tensor:
        if self.noise is not None:
            shard = self.state.shard
            noise = self.noise.frames(chunk) if shard is None else shard.own(self.noise.frames(shard.gather(chunk)))
            chunk = mixed(chunk, noise, self.vae.config.decode_noise_scale)
        video: Tensor = self._step(self.vae.denormalise(chunk))
        return video.clamp(-1, 1)


def stream(session: Any, chunks: Iterable[Tensor], **push: Any) -> Iterator[Any]:
    """All that a session makes of a stream, in the order of time; nothing for chunks that have to wait for others.

    push: given to `push` and `finish`, which a session that holds nothing back need not have
    """
    for chunk in chunks:
        made = session.push(chunk, **push)
        if (made[0] if isinstance(made, tuple) else made).shape[2]:
            yield made
    if hasattr(session, "finish"):
        yield from session.finish(**push)


def joined(chunks: Sequence[Tensor]) -> Tensor:
    """Chunks one after the other in time."""
    return chunks[0] if len(chunks) == 1 else torch.cat(list(chunks), dim=2)


def no_latents(vae: WanVAE, video: Tensor) -> Tensor:
    """Latents of no frame, for pictures of this size."""
    _, height, width = vae.config.stride
    return vae.quant_conv.weight.new_empty(len(video), vae.config.z_dim, 0, video.shape[3] // height, video.shape[4] // width)


def no_frames(vae: WanVAE, latents: Tensor) -> Tensor:
    """No frame, of the size that these latents have."""
    _, height, width = vae.config.stride
    return vae.last_layer.new_empty(len(latents), 3, 0, latents.shape[3] * height, latents.shape[4] * width)

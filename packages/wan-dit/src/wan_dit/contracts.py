"""What the parts of a pipeline are, structurally: no base class is needed to satisfy them.

Conventions: video `[B, 3, T, H, W]` in [-1, 1], T = 1 + k * temporal stride; latents `[B, C, T', H', W']`, normalised;
text context a list of `[L_i, D]` without pad rows. Sigma 1 is noise: x_sigma = (1 - sigma) * data + sigma * noise, and a
backbone predicts velocity = noise - data.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import torch
    from torch import Tensor


@dataclass(frozen=True)
class Conditioning:
    """What a task gives a backbone besides text.

    extra_latents: `[B, C, T', H', W']`, concatenated to the latents on the channel axis
    image_context: `[B, N, image_dim]`, tokens of an image encoder, read by `encode_context`
    vace: `[B, vace_in_dim, T', H', W']`, and the strength of its hints, one number or one a VACE block
    reference: `[B, C, H', W']`, latents of an image whose tokens stand in front (Fun control)
    camera: `[B, camera_dim, T', H, W]`, the camera path at the size of the pixels (Fun camera)
    """

    extra_latents: Tensor | None = None
    image_context: Tensor | None = None
    vace: Tensor | None = None
    vace_scale: float | tuple[float, ...] = 1.0
    reference: Tensor | None = None
    camera: Tensor | None = None


@dataclass(frozen=True)
class KeysValues:
    """What the cross-attention of one block reads.

    key, value: `[B, L, heads, head_dim]` of the text; image_key, image_value: of the image, None where there is none
    """

    key: Tensor
    value: Tensor
    image_key: Tensor | None = None
    image_value: Tensor | None = None


@dataclass(frozen=True)
class Context:
    """Projected text and images, as keys and values of every block: a value the caller holds and may drop.

    blocks: one a block of the trunk; vace_blocks: one a VACE block
    bias: added to the logits of attention to the text, `[B, 1, 1, L]`; None where it is zero
    """

    blocks: tuple[KeysValues, ...]
    bias: Tensor | None = None
    vace_blocks: tuple[KeysValues, ...] = ()


@dataclass(frozen=True)
class Schedule:
    """One entry per model evaluation.

    sigmas: float32 `[E + 1]`, descending to 0
    timesteps: `[E]`, 1000 * sigma, truncated to integers where the official solver truncates
    noise_scale: what the pipeline multiplies the first noise by; not 1 only where a model was trained to start from scaled noise
    """

    sigmas: Tensor
    timesteps: Tensor
    noise_scale: float = 1.0


class VAE(Protocol):
    """A video codec."""

    spec: Any

    def encode(self, video: Tensor) -> Tensor:
        """Video to normalised latents; ValueError where T or the size does not divide."""

    def decode(self, latents: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
        """Latents to video, clamped to [-1, 1]."""

    def encode_stream(self, chunks: Iterable[Tensor]) -> Iterator[Tensor]:
        """Chunks of frames (the first of 1, then multiples of the temporal stride) to chunks of latents."""

    def decode_stream(self, chunks: Iterable[Tensor]) -> Iterator[Tensor]:
        """Chunks of latents to chunks of frames."""


class TextEncoder(Protocol):
    """Prompts to context tokens."""

    spec: Any

    def encode(self, prompts: list[str]) -> list[Tensor]:
        """One `[L_i, D]` a prompt, the end token included, without pad rows."""


class Backbone(Protocol):
    """Predicts velocity."""

    spec: Any

    def encode_context(self, text: list[Tensor], conditioning: Conditioning | None = None) -> Context:
        """Project text (and image) tokens once for all steps."""

    def __call__(self, latents: Tensor, timestep: Tensor, context: Context, conditioning: Conditioning | None = None) -> Tensor:
        """Velocity `[B, C, T', H', W']`; timestep float32 in 0..1000, `[B]` or `[B, T']`."""


class Scheduler(Protocol):
    """A sampler without state: one object serves many requests, and a saved state resumes to the same bits.

    One that is made for certain settings says so in attributes `steps` and `shift`, which a run that gives none takes.
    """

    def schedule(self, steps: int, shift: float) -> Schedule:
        """The grid of a run; the pipeline owns `shift` and hands it over once."""

    def start(self, schedule: Schedule) -> dict[str, Any]:
        """A new state: a plain dict of tensors and numbers, `state["i"]` the index of the next evaluation."""

    def step(self, state: dict[str, Any], velocity: Tensor, sample: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """The sample after evaluation `state["i"]`, which it advances."""


class CacheRun(Protocol):
    """One request under a cache: a state for each of the two forwards of guidance, which starts anew with another expert."""

    def velocity(
        self,
        backbone: Backbone,
        latents: Tensor,
        timestep: Tensor,
        context: Context,
        negative_context: Context | None,
        scale: float,
        conditioning: Conditioning | None = None,
        *,
        step: int,
        expert: str | int = 0,
        guided: Callable[..., Tensor],
    ) -> Tensor:
        """What `guided(backbone, ..., conditioning)` computes, with less work, at evaluation `step` of the backbone `expert`."""

    def report(self) -> dict[str, Any]:
        """`evaluations`, how many of them were `skipped`, what that `skips`, and the two counts by branch in `branches`."""

    def state_dict(self) -> dict[str, Any]:
        """Tensors, numbers and names, from which a new run of the same cache goes on to the same bits."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a `state_dict`."""


class Cache(Protocol):
    """A policy that leaves out part of the work of some evaluations; without state, so that one object serves many requests.

    One that chooses among the forwards of guidance, and leaves each of them as it is, says so in an attribute `of_guidance`.
    """

    def start(self, timesteps: Tensor, boundary: float | None = None, group: Any = None) -> CacheRun:
        """A new request: timesteps `[E]`, where the second expert takes over, and the processes that have to decide alike."""

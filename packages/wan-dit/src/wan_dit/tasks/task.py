"""What a task is: it says what a backbone is given besides text. One pipeline runs them all."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, get_args

from torch import Tensor

from ..contracts import Conditioning
from ..plugins import VideoModelSpec
from ..sizes import Size

Compat = Literal["fixed", "official"]
COMPATS: tuple[str, ...] = get_args(Compat)
Scheme = Literal["text", "channels", "first_frame", "vace"]
TAKES = {  # scheme -> what a model of it takes, in words
    "text": "text alone",
    "channels": "an image (--image; in Python task=ImageToVideo(...)) or a video to continue (--video; task=Continuation(...))",
    "first_frame": "text, and an image or a video to continue",
    "vace": "text, images, videos with masks, and reference images",
}


@dataclass(frozen=True)
class Target:
    """What a task prepares for.

    backbone: its spec
    size: (width, height)
    compat: `"official"` repeats what the official code does where that is a defect, `"fixed"` does what was meant
    """

    model: VideoModelSpec
    backbone: Any
    size: Size
    frames: int
    compat: Compat = "fixed"

    @property
    def multiple(self) -> Size:
        """Pixels a token covers along (width, height)."""
        (_, high, wide), (_, q, r) = self.backbone.stride, self.backbone.patch
        return wide * r, high * q

    @property
    def scheme(self) -> Scheme:
        """How the backbone takes what is given besides text; ValueError where no task here makes it."""
        backbone = self.backbone
        extra = getattr(backbone, "in_channels", 0) - backbone.latent_channels
        if getattr(backbone, "vace", False):
            return "vace"
        if extra <= 0:
            return "first_frame" if self.model.task == "ti2v" else "text"
        if extra == backbone.stride[0] + backbone.latent_channels:
            return "channels"
        raise ValueError(
            f"backbone '{backbone.name}' takes {extra} channels besides the latents, which no task here makes: call it with a Conditioning"
        )


@dataclass(frozen=True)
class Prepared:
    """What a task made of its inputs.

    known: latents `[1, C, K, H', W']` of the first K latent frames, which stay as they are while the others are denoised
    front: latent frames in front of those of the video, which are dropped before it is decoded
    """

    conditioning: Conditioning | None = None
    known: Tensor | None = None
    front: int = 0


@dataclass(frozen=True)
class Encoders:
    """The parts that a task may use.

    video: `[3, T, H, W]` in [-1, 1] to latents `[1, C, T', H', W']`, float32
    images: pictures `[3, H, W]` in [-1, 1] of any sizes to tokens `[1, N, D]`
    """

    video: Callable[[Tensor], Tensor]
    images: Callable[[Sequence[Tensor]], Tensor]


class Task(Protocol):
    """A conditioning object: the inputs of one generation, and what they become for a certain backbone."""

    @property
    def name(self) -> str:
        """`t2v`, `i2v`, `flf2v`, `vace`, `continuation`, or another for a task of one's own."""

    def check(self, target: Target) -> None:
        """ValueError where the model cannot take the inputs, or FileNotFoundError where they are not there, before anything is loaded.

        target: with the frames that will be made, and the model's own size
        """

    def size(self, target: Target) -> Size | None:
        """The size that the inputs suggest, None for the model's own."""

    def frames(self, target: Target) -> int | None:
        """The number of frames that the inputs suggest, None for the model's own; asked before `check`."""

    def prepare(self, target: Target, encoders: Encoders) -> Prepared:
        """What the backbone is given; called once, before the first step."""

    def inputs(self) -> dict[str, Any]:
        """Files and pictures by name, for the record of the run; empty where the task is text alone."""

    def settings(self) -> dict[str, Any]:
        """Everything else that decides the result, as JSON."""


def refuse(target: Target, what: str) -> ValueError:
    """The error for inputs that the model does not take."""
    return ValueError(f"model '{target.model.name}' takes no {what}: it makes videos from {TAKES[target.scheme]} (see wan-dit models)")

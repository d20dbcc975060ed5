"""What one generation is asked for: settings with a model's defaults filled in, checked before anything is loaded."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

from .plugins import VideoModelSpec

# far above anything sensible: what is larger is a mistake, and overflows instead of running out of memory
LARGEST = {"steps": 10_000, "frames": 1_000_000, "size": 65_536, "seed": 2**63 - 1}


@dataclass(frozen=True)
class Request:
    """Valid settings of one generation; see `Pipeline.stream` for their meaning."""

    prompt: str
    negative_prompt: str
    steps: int
    shift: float
    guidance: float | tuple[float, float]
    seed: int
    frames: int
    size: tuple[int, int]

    @property
    def guided(self) -> bool:
        """Whether a step runs the backbone twice."""
        return any(scale != 1 for scale in self.scales)

    @property
    def scales(self) -> tuple[float, float]:
        """Guidance of the low-noise and of the high-noise expert; one model has the same twice."""
        return self.guidance if isinstance(self.guidance, tuple) else (self.guidance, self.guidance)

    @property
    def prompts(self) -> tuple[str, ...]:
        """The texts to encode: the prompt, and the negative prompt where guidance uses it."""
        return (self.prompt, self.negative_prompt) if self.guided else (self.prompt,)

    def latent_shape(self, backbone: Any, front: int = 0) -> tuple[int, int, int, int, int]:
        """`[1, C, front + T', H', W']` for a backbone's spec."""
        time, height, width = backbone.stride
        return 1, backbone.latent_channels, front + 1 + (self.frames - 1) // time, self.size[1] // height, self.size[0] // width


def make_request(
    model: VideoModelSpec,
    backbone: Any,
    text: Any,
    prompt: str,
    *,
    negative_prompt: str | None = None,
    steps: int | None = None,
    shift: float | None = None,
    guidance: float | Sequence[float] | None = None,
    seed: int = 0,
    frames: int | None = None,
    size: tuple[int, int] | None = None,
) -> Request:
    """Fill in the model's defaults and check; ValueError says what was given and the nearest valid value.

    model, backbone, text: specs
    """
    request = Request(
        prompt=prompt,
        negative_prompt=model.negative_prompt if negative_prompt is None else negative_prompt,
        steps=model.steps if steps is None else steps,
        shift=model.shift if shift is None else shift,
        guidance=_guidance(model.guidance if guidance is None else guidance, model),
        seed=seed,
        frames=model.frames if frames is None else frames,
        size=model.size if size is None else (size[0], size[1]),
    )
    if not prompt.strip():
        raise ValueError("the prompt is empty: say what the video shows, such as 'a red circle moves left'")
    for name, value in (("prompt", request.prompt), ("negative prompt", request.negative_prompt)):
        _check_words(name, value, text)
    _check_numbers(request)
    _check_shape(request, backbone)
    return request


def unknown_words(model: VideoModelSpec, prompt: str) -> str:
    """One line that names the words of `prompt` outside a model's vocabulary; empty where there are none.

    The vocabulary is `model.extra["words"]`, words by group; a model without it takes any.
    """
    groups: dict[str, tuple[str, ...]] = dict(model.extra.get("words", {}))
    known = {word for words in groups.values() for word in words}
    strange = [word for word in dict.fromkeys(re.findall(r"[^\W_]+(?:['’-][^\W_]+)*", prompt.lower())) if word not in known]
    if not groups or not strange:
        return ""
    shown = ", ".join(strange[:5]) + (", ..." if len(strange) > 5 else "")
    listed = "; ".join(f"{name} {', '.join(words)}" for name, words in groups.items() if name != "others")
    return f"model '{model.name}' does not know: {shown}. It knows {listed}"


def _guidance(scale: float | Sequence[float], model: VideoModelSpec) -> float | tuple[float, float]:
    """One number, or the pair of a model of two experts."""
    if not isinstance(scale, list | tuple):
        return cast("float", scale)
    if len(scale) != 2:
        raise ValueError(f"guidance is one number, or a pair (low, high) for two experts, got {list(scale)}")
    low, high = scale
    if not model.low_noise_backbone:
        raise ValueError(f"guidance {low:g},{high:g} is a pair for two experts, and model '{model.name}' is one backbone: give one number")
    return low, high


def _check_words(name: str, value: str, text: Any) -> None:
    # a word is at least one token, so more words than tokens cannot fit; fewer may still be truncated, with a warning, by the encoder.
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"the {name} is no text in UTF-8: {value[error.start]!a} at character {error.start + 1}") from error
    if (count := len(value.split())) > text.max_tokens:
        raise ValueError(f"the {name} has {count} words, text encoder '{text.name}' reads at most {text.max_tokens} tokens: shorten it")


def _check_numbers(request: Request) -> None:
    if not 1 <= request.steps <= LARGEST["steps"]:
        raise ValueError(f"steps must be at least 1 and at most {LARGEST['steps']}, got {request.steps}")
    if not (math.isfinite(request.shift) and request.shift > 0):
        raise ValueError(f"shift must be a positive number, got {request.shift}")
    if not all(math.isfinite(scale) and scale >= 0 for scale in request.scales):
        raise ValueError(f"guidance must be 0 or more (1 turns it off), got {request.guidance}")
    if not 0 <= request.seed <= LARGEST["seed"]:
        raise ValueError(f"seed must be between 0 and 2**63 - 1, got {request.seed}")


def _check_shape(request: Request, backbone: Any) -> None:
    time, height, width = (stride * patch for stride, patch in zip(backbone.stride, backbone.patch, strict=True))
    if request.frames < 1 or (request.frames - 1) % time:
        nearest = 1 + max(0, round((request.frames - 1) / time)) * time
        raise ValueError(
            f"frames must be 1 + a multiple of {time} for backbone '{backbone.name}', got {request.frames}; nearest: {nearest}"
        )
    wide, high = request.size
    if request.frames > LARGEST["frames"] or max(wide, high) > LARGEST["size"]:
        most = f"at most {LARGEST['frames']} frames of {LARGEST['size']} pixels a side"
        raise ValueError(f"{request.frames} frames of size {wide}x{high} are too many: {most}")
    if wide < 1 or high < 1 or wide % width or high % height:
        nearest_size = f"{max(1, round(wide / width)) * width}x{max(1, round(high / height)) * height}"
        need = f"a width in multiples of {width} and a height in multiples of {height}"
        raise ValueError(f"size {wide}x{high} does not divide: backbone '{backbone.name}' needs {need}; nearest: {nearest_size}")

"""What a latent file says about its film and its codec, as the string metadata of a safetensors file.

Keys: `format` ("wan-vae-latents/2"), `codec`, `weights` (sha256) and `weights_dtype` (the type they computed in; both empty
where the codec tells none), `backend` (the convolutions that computed it), `latent_space`, `normalised` ("true"), `fps`
("num/den"), `time_base` (seconds of a unit of the tensor `timestamps`), `frames`, `width`, `height` (of the film after the
crop, before padding), `pad_frames`, `pad_right`, `pad_bottom`, `crop` ("left,top,right,bottom", pixels), `gaps`
("start:frames:kind,...", see `Gap`), `rotation` (degrees that were applied to the stored pictures), `color_range`,
`bit_depth`, `pixel_aspect`, `primaries` and `transfer` (of the film).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import Self

from .damage import Gap
from .pixels import UNSPECIFIED

FORMAT = "wan-vae-latents/2"
FIRST_FORMAT = "wan-vae-latents/1"  # without checksums and the keys of NEWER; still read
NUMBERS = ("frames", "width", "height", "pad_frames", "pad_right", "pad_bottom", "rotation", "bit_depth", "primaries", "transfer")
TEXTS = ("codec", "weights", "weights_dtype", "backend", "latent_space", "color_range")
FRACTIONS = ("fps", "time_base", "pixel_aspect")
NEWER = {"backend": "", "bit_depth": "8", "primaries": "2", "transfer": "2", "pixel_aspect": "1/1", "crop": "0,0,0,0", "gaps": ""}
MOST = 2**31  # of any number: more is a lie
MOST_GAPS = 256


@dataclass(frozen=True)
class Padding:
    """What was added to a video so that it divides: repeats of the last frame, right column and bottom row."""

    frames: int = 0
    right: int = 0
    bottom: int = 0

    @classmethod
    def of(cls, frames: int, height: int, width: int, stride: tuple[int, int, int]) -> Self:
        """The padding that a video of this size needs: T to 1 + k * stride[0], sizes to multiples of stride[1:]."""
        return cls(-(frames - 1) % stride[0], -width % stride[2], -height % stride[1])


@dataclass(frozen=True)
class LatentInfo:
    """What a latent file says about its film and its codec; see the module docstring for the fields."""

    codec: str
    weights: str
    weights_dtype: str
    latent_space: str
    fps: Fraction
    frames: int
    width: int
    height: int
    padding: Padding
    rotation: int = 0
    color_range: str = "unspecified"
    backend: str = ""
    time_base: Fraction | None = None
    bit_depth: int = 8
    pixel_aspect: Fraction = Fraction(1)
    primaries: int = UNSPECIFIED
    transfer: int = UNSPECIFIED
    crop: tuple[int, int, int, int] = (0, 0, 0, 0)
    gaps: tuple[Gap, ...] = ()

    def to_metadata(self) -> dict[str, str]:
        """The string metadata of the file."""
        padding = {"pad_frames": self.padding.frames, "pad_right": self.padding.right, "pad_bottom": self.padding.bottom}
        numbers = {key: padding[key] if key in padding else getattr(self, key) for key in NUMBERS}
        fractions = {"fps": self.fps, "time_base": self.time_base or 1 / self.fps, "pixel_aspect": self.pixel_aspect}
        if len(self.gaps) > MOST_GAPS:
            raise ValueError(
                f"the film has {len(self.gaps)} gaps, a latent file records up to {MOST_GAPS}; --on-error stop ends at the first"
            )
        return {
            "format": FORMAT,
            "normalised": "true",
            **{key: getattr(self, key) for key in TEXTS},
            **{key: str(value) for key, value in numbers.items()},
            **{key: f"{value.numerator}/{value.denominator}" for key, value in fractions.items()},
            "crop": ",".join(map(str, self.crop)),
            "gaps": ",".join(f"{gap.start}:{gap.frames}:{gap.kind}" for gap in self.gaps),
        }

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, str]) -> Self:
        """Parse what `to_metadata` wrote; ValueError names what is missing or wrong."""
        form = metadata.get("format")
        if form not in (FORMAT, FIRST_FORMAT):
            raise ValueError(f"its format is {form!r}, expected '{FORMAT}'")
        if metadata.get("normalised") != "true":
            raise ValueError(f"its latents are not normalised (normalised is {metadata.get('normalised')!r})")
        if form == FIRST_FORMAT:
            metadata = {**NEWER, "time_base": "/".join(reversed(metadata.get("fps", "").split("/"))), **metadata}
        try:
            numbers = {key: _number(metadata, key) for key in NUMBERS}
            fractions = {key: _fraction(metadata, key) for key in FRACTIONS}
            texts = {key: metadata[key] for key in TEXTS}
            crop = tuple(_natural(part) for part in metadata["crop"].split(","))
            gaps = tuple(_gap(part) for part in metadata["gaps"].split(",") if part)
        except KeyError as error:
            raise ValueError(f"its metadata are incomplete or wrong: {error} is missing") from error
        except ValueError as error:
            raise ValueError(f"its metadata are incomplete or wrong: {error}") from error
        if min(numbers["frames"], numbers["width"], numbers["height"], numbers["bit_depth"]) < 1 or len(crop) != 4:
            raise ValueError(f"its metadata are out of range: {numbers}, crop {crop}")
        if any(gap.start + gap.frames > numbers["frames"] for gap in gaps if gap.kind == "filled"):
            raise ValueError(f"its metadata are out of range: gaps {metadata['gaps']} in {numbers['frames']} frames")
        padding = Padding(numbers.pop("pad_frames"), numbers.pop("pad_right"), numbers.pop("pad_bottom"))
        return cls(padding=padding, crop=crop, gaps=gaps, **numbers, **fractions, **texts)  # type: ignore[arg-type]


def _number(metadata: Mapping[str, str], key: str) -> int:
    try:
        return _natural(metadata[key])
    except ValueError as error:
        raise ValueError(f"{key} is {error}") from error


def _natural(text: str) -> int:
    if not re.fullmatch(r"\d{1,10}", text, re.ASCII) or int(text) > MOST:
        raise ValueError(f"'{text}', expected a whole number up to {MOST}")
    return int(text)


def _fraction(metadata: Mapping[str, str], key: str) -> Fraction:
    match = re.fullmatch(r"(\d{1,10})/(\d{1,10})", metadata[key], re.ASCII)
    if not match or int(match[1]) == 0 or int(match[2]) == 0:
        raise ValueError(f"{key} is '{metadata[key]}', expected a positive num/den")
    return Fraction(int(match[1]), int(match[2]))


def _gap(text: str) -> Gap:
    match = re.fullmatch(r"(\d{1,10}):(\d{1,10}):(filled|cut)", text, re.ASCII)
    if not match:
        raise ValueError(f"a gap is '{text}', expected start:frames:kind")
    return Gap(int(match[1]), int(match[2]), match[3])

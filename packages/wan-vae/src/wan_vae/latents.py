"""The latent file: one safetensors file that says what it holds, written and read chunk by chunk.

Layout: a tensor `latents` `[T', C, H', W']` (frame-major, so that a stream appends to the end; no batch axis) and string
metadata: `format` ("wan-vae-latents/1"), `codec`, `weights` (sha256) and `weights_dtype` (the type they computed in; both
empty where the codec tells none), `latent_space`, `normalised` ("true"), `fps` ("num/den"), `frames`, `width`, `height` (of
the film, before padding), `pad_frames`, `pad_right`, `pad_bottom`, `rotation` (degrees that were applied to the stored
pictures), `color_range` (of the film).
The header is written at a fixed size and filled in at the end, since the number of frames is known only then.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Self

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ._shared.files import replacing
from .video import PathLike

FORMAT = "wan-vae-latents/1"
DTYPES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
NUMBERS = ("frames", "width", "height", "pad_frames", "pad_right", "pad_bottom", "rotation")
DATA_START = 4096  # bytes: 8 of length and a JSON header filled up with spaces


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

    def to_metadata(self) -> dict[str, str]:
        """The string metadata of the file."""
        return {
            "format": FORMAT,
            "codec": self.codec,
            "weights": self.weights,
            "weights_dtype": self.weights_dtype,
            "latent_space": self.latent_space,
            "normalised": "true",
            "fps": f"{self.fps.numerator}/{self.fps.denominator}",
            "frames": str(self.frames),
            "width": str(self.width),
            "height": str(self.height),
            "pad_frames": str(self.padding.frames),
            "pad_right": str(self.padding.right),
            "pad_bottom": str(self.padding.bottom),
            "rotation": str(self.rotation),
            "color_range": self.color_range,
        }

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, str]) -> Self:
        """Parse what `to_metadata` wrote; ValueError names what is missing or wrong."""
        if metadata.get("format") != FORMAT:
            raise ValueError(f"its format is {metadata.get('format')!r}, expected '{FORMAT}'")
        if metadata.get("normalised") != "true":
            raise ValueError(f"its latents are not normalised (normalised is {metadata.get('normalised')!r})")
        try:
            numbers = {key: int(metadata[key]) for key in NUMBERS}
            fps = Fraction(metadata["fps"])
            names = {key: metadata[key] for key in ("codec", "weights", "weights_dtype", "latent_space", "color_range")}
        except (KeyError, ValueError, ZeroDivisionError) as error:
            raise ValueError(f"its metadata are incomplete or wrong: {error}") from error
        if fps <= 0 or min(numbers["frames"], numbers["width"], numbers["height"]) < 1 or min(numbers.values()) < 0:
            raise ValueError(f"its metadata are out of range: fps {fps}, {numbers}")
        padding = Padding(numbers.pop("pad_frames"), numbers.pop("pad_right"), numbers.pop("pad_bottom"))
        return cls(fps=fps, padding=padding, **numbers, **names)  # type: ignore[arg-type]


def write_latents(
    path: PathLike, chunks: Iterable[Tensor], info: Callable[[], LatentInfo], *, dtype: torch.dtype = torch.float32
) -> LatentInfo:
    """Write chunks `[1, C, n, H', W']` as they come; `info` is called after the last one and returned.

    The file appears under its name only when complete. Raises ValueError for another dtype than fp32, fp16 or bf16.
    """
    if dtype not in DTYPES:
        raise ValueError(f"a latent file holds float32, float16 or bfloat16, not {dtype}")
    frames, frame_shape = 0, None
    with replacing(path) as scratch, open(scratch, "wb") as file:
        file.write(bytes(DATA_START))
        for chunk in chunks:
            block = chunk[0].transpose(0, 1).to("cpu", dtype).contiguous()
            frames, frame_shape = frames + block.shape[0], tuple(block.shape[1:])
            file.write(block.view(torch.uint8).numpy().data)
        if frame_shape is None:
            raise ValueError(f"no latents to write to '{path}'")
        facts = info()
        file.seek(0)
        file.write(_header((frames, *frame_shape), dtype, facts))
    return facts


def _header(shape: tuple[int, ...], dtype: torch.dtype, info: LatentInfo) -> bytes:
    tensor = {"dtype": DTYPES[dtype], "shape": shape, "data_offsets": [0, math.prod(shape) * dtype.itemsize]}
    text = json.dumps({"__metadata__": info.to_metadata(), "latents": tensor}).encode()
    if len(text) > DATA_START - 8:
        raise ValueError(f"the codec's name or latent space is too long for a latent file ({len(text)} bytes of header)")
    return (DATA_START - 8).to_bytes(8, "little") + text.ljust(DATA_START - 8)


def is_latent_file(path: PathLike) -> bool:
    """Whether `path` is a safetensors file that says it is a latent file, of any version."""
    try:
        with safe_open(path, "pt") as file:
            return str((file.metadata() or {}).get("format", "")).startswith(FORMAT.partition("/")[0])
    except (SafetensorError, OSError):
        return False


@dataclass(frozen=True)
class LatentFile:
    """An opened latent file: `info`, `shape` `[T', C, H', W']`, `dtype` and `chunks()`."""

    path: Path
    info: LatentInfo
    shape: tuple[int, int, int, int]
    dtype: str

    @classmethod
    def open(cls, path: PathLike) -> Self:
        """Read the header. Raises FileNotFoundError, and ValueError where it is no valid latent file."""
        path = Path(path)
        if not path.exists():
            raise FileNotFoundError(f"no latent file at '{path}'")
        try:
            with safe_open(path, "pt") as file:
                if list(file.keys()) != ["latents"]:
                    raise ValueError("it does not hold exactly one tensor 'latents'")
                tensor = file.get_slice("latents")
                shape, dtype = tuple(tensor.get_shape()), tensor.get_dtype()
                info = LatentInfo.from_metadata(file.metadata() or {})
        except (SafetensorError, ValueError, OSError) as error:
            raise ValueError(f"'{path}' is not a latent file: {error}") from error
        if dtype not in DTYPES.values() or len(shape) != 4 or 0 in shape:
            raise ValueError(f"'{path}' is not a latent file: 'latents' is {dtype} {list(shape)}, expected a float [T', C, H', W']")
        return cls(path, info, shape, dtype)

    def chunks(self, size: int = 1) -> Iterator[Tensor]:
        """Latents `[1, C, n, H', W']`: first one frame, then `size` at a time."""
        start, stop = 0, 1
        while start < self.shape[0]:
            with safe_open(self.path, "pt") as file:  # opened anew, so that pages already read do not stay mapped
                block = file.get_slice("latents")[start:stop].clone()
            yield block.transpose(0, 1)[None]
            start, stop = stop, stop + size

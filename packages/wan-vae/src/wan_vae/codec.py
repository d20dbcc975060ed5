"""Film to latent file and back, at constant memory: frames are read, encoded and written a few at a time.

What does not divide is padded (the last frame, right column and bottom row repeated), recorded, and trimmed again.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ._shared.spec import UNKNOWN
from .latents import LatentFile, LatentInfo, Padding, write_latents
from .video import Frame, PathLike, VideoWriter, probe, read_frames, to_frames, to_tensor

Progress = Callable[[int, int | None], None]


class VideoCodec:
    """A VAE with files around it.

    vae: anything with `spec`, `encode`, `decode`, `encode_stream` and `decode_stream`, such as `wan_vae.load_vae()` gives
    name: what latent files record as their codec, a registered name where there is one; by default the spec's

    Example: `VideoCodec(load_vae("wan2.1")).encode_file("film.mp4", "film.safetensors")`
    """

    def __init__(self, vae: Any, *, name: str | None = None) -> None:
        self.vae, self.spec = vae, vae.spec
        self.name = name or self.spec.name

    def encode(self, video: Tensor) -> tuple[Tensor, Padding]:
        """A video `[B, 3, T, H, W]` in [-1, 1] of any length and size to latents and the padding it took."""
        if video.ndim != 5 or video.shape[1] != 3 or 0 in video.shape:
            raise ValueError(f"expected a video [B, 3, T, H, W], got {list(video.shape)}")
        frames, height, width = video.shape[2:]
        padding = Padding.of(frames, height, width, self.spec.stride)
        with torch.inference_mode():
            return self.vae.encode(_pad(self._place(video), padding)), padding

    def decode(self, latents: Tensor, padding: Padding | None = None) -> Tensor:
        """Latents `[B, C, T', H', W']` to a video in [-1, 1], less its padding."""
        if latents.ndim != 5 or latents.shape[1] != self.spec.latent_channels or 0 in latents.shape:
            raise ValueError(f"expected latents [B, {self.spec.latent_channels}, T', H', W'] of '{self.name}', got {list(latents.shape)}")
        with torch.inference_mode():
            video = self.vae.decode(self._place(latents))
        padding = padding or Padding()
        frames, height, width = video.shape[2:]
        return video[:, :, : frames - padding.frames, : height - padding.bottom, : width - padding.right]

    def encode_file(
        self,
        video_path: PathLike,
        latent_path: PathLike,
        *,
        chunk: int = 1,
        dtype: torch.dtype = torch.float32,
        limit: int | None = None,
        progress: Progress | None = None,
    ) -> LatentInfo:
        """Encode a film of any length and size to a latent file, which appears only when complete.

        chunk: latent frames computed at a time after the first
        dtype: of the latents in the file; the VAE computes in its own
        limit: encode only so many frames
        progress: called with frames done and the count that the film declares (None where it declares none)
        Raises FileNotFoundError, and ValueError where the film cannot be read or the output cannot be written.
        """
        source, count = probe(video_path), 0
        total = min(filter(None, (source.frames, limit)), default=None)
        padding = Padding.of(1, source.height, source.width, self.spec.stride)

        def pixels() -> Iterator[Tensor]:
            nonlocal count
            for group in _groups(read_frames(video_path, limit=limit), self.spec.stride[0] * _positive(chunk)):
                tail = Padding(-(count + len(group) - 1) % self.spec.stride[0], padding.right, padding.bottom)
                yield _pad(self._place(to_tensor(group)), tail)
                count += len(group)
                if progress:
                    progress(count, total)

        def info() -> LatentInfo:
            return LatentInfo(
                codec=self.name,
                weights=self._fingerprint(),
                weights_dtype=self._dtype(),
                latent_space=self.spec.latent_space,
                fps=source.fps,
                frames=count,
                width=source.width,
                height=source.height,
                padding=Padding.of(count, source.height, source.width, self.spec.stride),
                rotation=source.rotation,
                color_range=source.color_range,
            )

        with torch.inference_mode():
            return write_latents(latent_path, self.vae.encode_stream(pixels()), info, dtype=dtype)

    def decode_file(
        self,
        latent_path: PathLike,
        video_path: PathLike,
        *,
        chunk: int = 1,
        crf: int = 18,
        lossless: bool = False,
        progress: Progress | None = None,
    ) -> LatentInfo:
        """Decode a latent file to a film with the frame count, size and rate of the original; it appears only when complete.

        chunk: latent frames computed at a time after the first
        crf, lossless: see `VideoWriter`
        Raises FileNotFoundError, and ValueError where the latents are of another space than the VAE's, or of an unknown
        one and not from these weights; warns where only the weights differ. Weights can be told apart in one type only.
        """
        file = LatentFile.open(latent_path)
        self._check(file)
        info, count = file.info, 0
        output = VideoWriter(video_path, fps=info.fps, size=(info.width, info.height), crf=crf, lossless=lossless)
        with torch.inference_mode(), output as writer:
            placed = (self._place(latents) for latents in file.chunks(_positive(chunk)))
            for video in self.vae.decode_stream(placed):
                for frame in to_frames(video[:, :, : info.frames - count, : info.height, : info.width]):
                    writer.write(frame)
                count = writer.count
                if progress:
                    progress(count, info.frames)
            if count != info.frames:
                raise ValueError(f"'{self.name}' decoded {count} frames of '{latent_path}', which holds {info.frames}")
        return info

    def _check(self, file: LatentFile) -> None:
        info, spec = file.info, self.spec
        if info.latent_space != spec.latent_space:
            raise ValueError(
                f"'{file.path}' holds latents of the space '{info.latent_space}' (codec '{info.codec}'), "
                f"but '{self.name}' decodes '{spec.latent_space}'"
            )
        steps, channels, height, width = file.shape
        padded = (info.frames + info.padding.frames, info.height + info.padding.bottom, info.width + info.padding.right)
        expected = (1 + (steps - 1) * spec.stride[0], height * spec.stride[1], width * spec.stride[2])
        if channels != spec.latent_channels or padded != expected:
            raise ValueError(
                f"'{file.path}' contradicts itself: latents {list(file.shape)} of '{self.name}' decode to "
                f"{expected[0]} frames of {expected[2]}x{expected[1]}, its metadata say {padded[0]} of {padded[2]}x{padded[1]}"
            )
        own = self._fingerprint()
        comparable = info.weights and own and info.weights_dtype == self._dtype()
        if spec.latent_space == UNKNOWN and not (comparable and info.weights == own):
            raise ValueError(
                f"'{file.path}' holds latents of an unknown space, which only the VAE that made them decodes, and "
                f"'{self.name}' has other weights or another type (made in {info.weights_dtype or 'none'}, now {self._dtype() or 'none'})"
            )
        if comparable and info.weights != own:
            message = f"'{file.path}' was encoded with other weights ({info.weights[:12]}) than '{self.name}' has ({own[:12]})"
            warnings.warn(message, RuntimeWarning, stacklevel=3)

    def _fingerprint(self) -> str:
        return str(self.vae.fingerprint()) if hasattr(self.vae, "fingerprint") else ""

    def _dtype(self) -> str:
        parameter = self._parameter()
        return "" if parameter is None else str(parameter.dtype).removeprefix("torch.")

    def _parameter(self) -> Tensor | None:
        return next(iter(self.vae.parameters()), None) if hasattr(self.vae, "parameters") else None

    def _place(self, x: Tensor) -> Tensor:
        parameter = self._parameter()
        return x if parameter is None else x.to(parameter.device, parameter.dtype)


def _positive(chunk: int) -> int:
    if chunk < 1:
        raise ValueError(f"chunk must be at least 1 latent frame, got {chunk}")
    return chunk


def _pad(video: Tensor, padding: Padding) -> Tensor:
    return F.pad(video, (0, padding.right, 0, padding.bottom, 0, padding.frames), mode="replicate")


def _groups(frames: Iterable[Frame], size: int) -> Iterator[list[Frame]]:
    """One frame, then `size` at a time; the last group may be shorter."""
    frames = iter(frames)
    group = list(islice(frames, 1))
    while group:
        yield group
        group = list(islice(frames, size))

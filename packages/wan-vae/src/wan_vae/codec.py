"""Film to latent file and back, at constant memory: frames are read, encoded and written a few at a time.

What does not divide is padded (the last frame, right column and bottom row repeated), recorded, and trimmed again.
"""

from __future__ import annotations

import math
import warnings
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from fractions import Fraction
from itertools import islice
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from ._shared.spec import UNKNOWN
from .latents import LatentFile, LatentInfo, Padding, write_latents
from .sessions import stream
from .video import Crop, PathLike, Reader, open_writer, to_frames, to_tensor

T = TypeVar("T")
Progress = Callable[[int, int | None], None]
SLACK = 1e-3  # beyond [-1, 1] that rounding may leave


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
        """A video `[B, 3, T, H, W]` in [-1, 1] of any length and size to latents and the padding it took.

        Raises ValueError for another shape, integers, NaN, and values outside [-1, 1] by more than 0.001.
        """
        _check_video(video)
        frames, height, width = video.shape[2:]
        padding = Padding.of(frames, height, width, self.spec.stride)
        with torch.inference_mode():
            return self.vae.encode(_pad(self._place(video), padding)), padding

    def decode(self, latents: Tensor, padding: Padding | None = None) -> Tensor:
        """Latents `[B, C, T', H', W']` to a video in [-1, 1], less its padding. Raises ValueError for another shape, integers and NaN."""
        if latents.ndim != 5 or latents.shape[1] != self.spec.latent_channels or 0 in latents.shape:
            raise ValueError(f"expected latents [B, {self.spec.latent_channels}, T', H', W'] of '{self.name}', got {list(latents.shape)}")
        if not latents.is_floating_point() or not latents.isfinite().all():
            raise ValueError(
                f"expected finite floating-point latents, got {latents.dtype}" + " with NaN or infinity" * latents.is_floating_point()
            )
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
        logvar: bool = False,
        on_error: str = "error",
        fps: Fraction | None = None,
        crop: Crop | None = None,
        progress: Progress | None = None,
    ) -> LatentInfo:
        """Encode a film, a picture or a folder of pictures of any length and size to a latent file, which appears only when complete.

        chunk: latent frames computed at a time after the first
        dtype: of the latents in the file; the VAE computes in its own
        limit: encode only so many frames
        logvar: store the log-variance beside the latents
        on_error, fps, crop: see `Reader`; what was missing is recorded in the file
        progress: called with frames done and the count that the film declares (None where it declares none)
        Raises FileNotFoundError, and ValueError where the film cannot be read or the output cannot be written.
        """
        depth = 16 if Reader(video_path, fps=fps).info.depth > 8 else 8
        reader = Reader(video_path, limit=limit, depth=depth, on_error=on_error, fps=fps, crop=crop)  # type: ignore[arg-type]
        source, times = reader.info, array("q")
        chunks = self._chunks(reader, times, _positive(chunk), progress, min(filter(None, (source.frames, limit)), default=None))

        def timestamps() -> Sequence[int] | None:
            return None if _even(times, source.fps * source.time_base) else [time - times[0] for time in times]

        with torch.inference_mode():
            latents = self._with_logvar(chunks) if logvar else self.vae.encode_stream(chunks)
            return write_latents(latent_path, latents, lambda: self._info(reader, len(times)), dtype=dtype, timestamps=timestamps)

    def _chunks(self, reader: Reader, times: array[int], chunk: int, progress: Progress | None, total: int | None) -> Iterator[Tensor]:
        """The frames of a film as the VAE takes them, padded; `times` collects when each is shown."""
        time, _, _ = stride = self.spec.stride
        sides = Padding.of(1, reader.info.height, reader.info.width, stride)
        for group in groups(reader, time * chunk):
            tail = Padding(-(len(times) + len(group) - 1) % time, sides.right, sides.bottom)
            yield _pad(self._place(to_tensor(frame.pixels for frame in group)), tail)
            times.extend(frame.pts for frame in group)
            if progress:
                progress(len(times), total)

    def _info(self, reader: Reader, frames: int) -> LatentInfo:
        """What is recorded of a film that has been read."""
        source = reader.info
        return LatentInfo(
            codec=self.name,
            weights=self._fingerprint(),
            weights_dtype=self._dtype(),
            backend=str(getattr(self.vae, "backend", "")),
            latent_space=self.spec.latent_space,
            fps=source.fps,
            time_base=source.time_base,
            frames=frames,
            width=source.width,
            height=source.height,
            padding=Padding.of(frames, source.height, source.width, self.spec.stride),
            crop=reader.crop,
            gaps=tuple(reader.gaps),
            rotation=source.rotation,
            color_range=source.color_range,
            bit_depth=source.depth,
            pixel_aspect=source.pixel_aspect,
            primaries=source.primaries,
            transfer=source.transfer,
        )

    def decode_file(
        self,
        latent_path: PathLike,
        video_path: PathLike,
        *,
        chunk: int = 1,
        crf: int = 18,
        lossless: bool = False,
        bit_depth: int = 8,
        audio: PathLike | None = None,
        progress: Progress | None = None,
    ) -> LatentInfo:
        """Decode a latent file to a film with the frame count, size and timing of the original; it appears only when complete.

        video_path: a film, or for pictures a folder, a pattern such as `out/%05d.png` or, for one frame, a `.png`
        chunk: latent frames computed at a time after the first
        crf, lossless, bit_depth, audio: see `VideoWriter`
        Raises FileNotFoundError, and ValueError where the latents are damaged or of another space than the VAE's, or of an
        unknown one and not from these weights; warns where only the weights differ. Weights can be told apart in one type only.
        """
        file = LatentFile.open(latent_path)
        self._check(file)
        file.verify()
        info, times, count = file.info, file.timestamps(), 0
        film = {"crf": crf, "lossless": lossless, "audio": audio, "pixel_aspect": info.pixel_aspect}
        film |= {"fps": info.fps, "primaries": info.primaries, "transfer": info.transfer, "time_base": info.time_base if times else None}
        output = open_writer(video_path, size=(info.width, info.height), bit_depth=bit_depth, frames=info.frames, **film)
        with torch.inference_mode(), output as writer:
            placed = (self._place(latents) for latents in file.chunks(_positive(chunk)))
            for video in self.vae.decode_stream(placed):
                if not video.isfinite().all():
                    raise ValueError(f"'{self.name}' decodes '{latent_path}' to NaN from frame {count} on; use --dtype fp32")
                for frame in to_frames(video[:, :, : info.frames - count, : info.height, : info.width], writer.depth):
                    writer.write(frame, times[writer.count] if times else None)
                count = writer.count
                if progress:
                    progress(count, info.frames)
            if count != info.frames:
                raise ValueError(f"'{self.name}' decoded {count} frames of '{latent_path}', which holds {info.frames}")
        return info

    def _with_logvar(self, chunks: Iterator[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
        if not hasattr(self.vae, "encode_session"):
            raise ValueError(f"'{self.name}' gives no log-variance while it streams; encode without --logvar")
        return stream(self.vae.encode_session(), chunks, moments=True)

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
            made, now = info.weights_dtype or "none", self._dtype() or "none"
            hint = f"; load it in {made} (--dtype)" if made not in ("none", now) else ""
            raise ValueError(
                f"'{file.path}' holds latents of an unknown space, which only the VAE that made them decodes, and "
                f"'{self.name}' has other weights or another type (made in {made}, now {now}){hint}"
            )
        if comparable and info.weights != own:
            message = f"'{file.path}' was encoded with other weights ({info.weights[:12]}) than '{self.name}' has ({own[:12]})"
            warnings.warn(message, RuntimeWarning, stacklevel=3)

    def _fingerprint(self) -> str:
        return str(self.vae.fingerprint()) if hasattr(self.vae, "fingerprint") else ""

    def _dtype(self) -> str:
        """The type of the weights; all of them where the halves differ, as they do by default on a GPU."""
        parameters = self.vae.parameters() if hasattr(self.vae, "parameters") else ()
        return "+".join(sorted({str(parameter.dtype).removeprefix("torch.") for parameter in parameters}))

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


def groups(frames: Iterable[T], size: int) -> Iterator[list[T]]:
    """One frame, then `size` at a time; the last group may be shorter."""
    frames = iter(frames)
    group = list(islice(frames, 1))
    while group:
        yield group
        group = list(islice(frames, size))


def _even(times: Sequence[int], frames_per_unit: Fraction) -> bool:
    """Whether each frame stands where an even rate puts it, to less than one unit of its film's clock."""
    return all(abs((time - times[0]) * frames_per_unit - index) < frames_per_unit for index, time in enumerate(times))


def _check_video(video: Tensor) -> None:
    if video.ndim != 5 or video.shape[1] != 3 or 0 in video.shape:
        raise ValueError(f"expected a video [B, 3, T, H, W], got {list(video.shape)}")
    if not video.is_floating_point():
        raise ValueError(
            f"expected a floating-point video in [-1, 1], got {video.dtype}; wan_vae.video.to_tensor makes one of uint8 frames"
        )
    least, most = (float(value) for value in video.aminmax())
    if math.isnan(least) or math.isnan(most):
        raise ValueError("the video holds NaN, expected values in [-1, 1]")
    if least < -1 - SLACK or most > 1 + SLACK:
        raise ValueError(f"expected a video in [-1, 1], got values from {least:g} to {most:g}; scale 0..255 by x / 127.5 - 1")

"""A clip through a codec and back, measured as it streams: quality, artefacts, compression, speed and memory.

What is compared is the video as decoded, in [-1, 1], before it is rounded to 8 bits. Memory does not grow with length: a few
frames are in work at a time, and a few small pictures are kept to look at.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from .artefacts import ArtefactMeter
from .codec import VideoCodec, groups
from .latents import Padding
from .metrics import QualityMeter
from .peak_memory import PeakMemory
from .perceptual import FeatureMeter, LPIPSMeter, Network
from .thumbnails import Samples
from .video import Frame, PathLike, read_frames, to_tensor

SOURCE_BITS = 24  # of an 8-bit RGB pixel


@dataclass(frozen=True)
class Settings:
    """How clips are measured.

    frames: only the first so many
    size: height and width that pictures are scaled and cropped to, around the centre
    max_size: scale pictures down so that the longer side has at most so many pixels
    latent_dtype: the type that latents pass through between encoder and decoder, as in a latent file
    tile: height and width of the codec's tiles, to look for seams at their borders
    lpips, fvd: networks of `wan_vae.perceptual.load_network`
    """

    frames: int | None = None
    size: tuple[int, int] | None = None
    max_size: int | None = None
    latent_dtype: torch.dtype = torch.float32
    tile: tuple[int, int] | None = None
    lpips: Network | None = None
    fvd: Network | None = None


@dataclass(frozen=True)
class Measured:
    """A clip and a codec: `values` by the keys of `wan_vae.measures.MEASURES`, None where not computed; pictures; FVD's features."""

    clip: str
    codec: str
    values: dict[str, Any]
    samples: Samples
    features: tuple[list[Tensor], list[Tensor]] = field(default=([], []))


def evaluate(
    codec: VideoCodec, clip: PathLike, settings: Settings | None = None, *, progress: Callable[[int], None] | None = None
) -> Measured:
    """Encode and decode `clip`, one latent frame at a time, and measure what comes back.

    progress: called with the number of frames that are done
    Raises like `read_frames`; ValueError where the codec gives other frames than it took, or values that are not numbers.
    """
    settings = settings or Settings()
    run = _Run(codec, clip, settings)
    quality, artefacts = QualityMeter(), ArtefactMeter(group=codec.spec.stride[0], tile=settings.tile)
    lpips = LPIPSMeter(settings.lpips) if settings.lpips else None
    features = (FeatureMeter(settings.fvd), FeatureMeter(settings.fvd)) if settings.fvd else ()
    samples = Samples()
    for original, decoded in run.pairs():
        if not bool(decoded.isfinite().all()):
            after = f"after frame {quality.frames} of '{clip}'"
            raise ValueError(f"'{codec.name}' decoded values that are not finite {after}; try --dtype fp32")
        quality.add(original, decoded)
        artefacts.add(original, decoded)
        samples.add(original, decoded)
        if lpips:
            lpips.add(original, decoded)
        for meter, video in zip(features, (original, decoded), strict=False):
            meter.add(video)
        if progress:
            progress(quality.frames)
    values = {
        "frames": quality.frames,
        "width": run.width,
        "height": run.height,
        **run.compression(quality.frames),
        **quality.result(),
        **artefacts.result(),
        "lpips": lpips.result() if lpips else None,
        **run.speed(quality.frames),
    }
    return Measured(str(clip), codec.name, values, samples, (features[0].features, features[1].features) if features else ([], []))


class _Run:
    """One pass: `pairs()` gives original and decoded frames; the other methods say what it took, afterwards."""

    def __init__(self, codec: VideoCodec, clip: PathLike, settings: Settings) -> None:
        self.codec, self.clip, self.settings = codec, clip, settings
        self.parameter = next(iter(codec.vae.parameters()), None) if hasattr(codec.vae, "parameters") else None
        self.device = torch.device("cpu") if self.parameter is None else self.parameter.device
        self.width = self.height = self.latent_values = self.padded_frames = 0
        self.clocks = {stage: _Clock(self.device) for stage in ("read", "encode", "decode")}
        self.memory = PeakMemory(self.device)

    @torch.inference_mode()
    def pairs(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Pieces `[1, 3, n, H, W]` of the clip and of what the codec made of them."""
        waiting: deque[Tensor] = deque()
        pixels = self.clocks["read"].time(self._pixels(waiting))
        latents = self.clocks["encode"].time(self.codec.vae.encode_stream(pixels))
        decoded = self.clocks["decode"].time(self.codec.vae.decode_stream(self._stored(latents)))
        surplus = 0
        for video in self.memory.watch(decoded):
            video = video[..., : self.height, : self.width]
            while waiting and video.shape[2]:
                original = waiting.popleft()
                count = min(original.shape[2], video.shape[2])
                if count < original.shape[2]:
                    waiting.appendleft(original[:, :, count:])
                piece, video = video[:, :, :count], video[:, :, count:]
                original = original[:, :, :count].to(piece.device)
                if original.shape != piece.shape:
                    raise ValueError(f"'{self.codec.name}' decoded {list(piece.shape)} of {list(original.shape)} from '{self.clip}'")
                yield original, piece.float()
            surplus += video.shape[2]
        missing = sum(original.shape[2] for original in waiting)
        if missing or surplus != self.padded_frames:
            wrong = f"{missing} too few" if missing else f"{surplus - self.padded_frames} too many"
            raise ValueError(f"'{self.codec.name}' decoded {wrong} frames of '{self.clip}'")

    def compression(self, frames: int) -> dict[str, float]:
        """Pixel values over latent values, padding included in the latents; and bits of 8-bit RGB over bits of latents as stored."""
        pixels = frames * self.height * self.width
        bits = self.latent_values * self.settings.latent_dtype.itemsize * 8
        return {"compression_values": 3 * pixels / self.latent_values, "compression_bits": SOURCE_BITS * pixels / bits}

    def speed(self, frames: int) -> dict[str, float | int | None]:
        """Frames a second of encoder and decoder, each less what it waited for, and the peak of memory."""
        read, encode, decode = (self.clocks[stage].seconds for stage in ("read", "encode", "decode"))
        return {
            "encode_fps": frames / max(encode - read, 1e-9),
            "decode_fps": frames / max(decode - encode, 1e-9),
            "peak_memory": self.memory.peak,
        }

    def _pixels(self, waiting: deque[Tensor]) -> Iterator[Tensor]:
        """The clip, one frame and then a temporal stride at a time, padded and placed; `waiting` keeps it as it was."""
        stride = self.codec.spec.stride
        frames = (fit(frame, self.settings.size, self.settings.max_size) for frame in read_frames(self.clip, limit=self.settings.frames))
        for index, group in enumerate(groups(frames, stride[0])):
            video = to_tensor(group)
            self.height, self.width = video.shape[-2:]
            borders = Padding.of(1, self.height, self.width, stride)
            self.padded_frames = -len(group) % stride[0] if index else 0  # of the last group alone
            waiting.append(video)
            yield self._place(F.pad(video, (0, borders.right, 0, borders.bottom, 0, self.padded_frames), mode="replicate"))

    def _stored(self, latents: Iterable[Tensor]) -> Iterator[Tensor]:
        for chunk in latents:
            self.latent_values += chunk.numel()
            yield self._place(chunk.to(self.settings.latent_dtype))

    def _place(self, x: Tensor) -> Tensor:
        return x if self.parameter is None else x.to(self.parameter.device, self.parameter.dtype)


class _Clock:
    """Seconds that an iterator takes to give its items, the work of the device included."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.seconds = device, 0.0

    def time(self, items: Iterable[Tensor]) -> Iterator[Tensor]:
        items = iter(items)
        while True:
            start = self._now()
            item = next(items, None)
            self.seconds += self._now() - start
            if item is None:
                return
            yield item

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()


def fit(frame: Frame, size: tuple[int, int] | None, max_size: int | None) -> Frame:
    """A frame scaled (bicubic, antialiased) to cover `size` (height, width) and cropped to it around the centre, or scaled down
    to at most `max_size` pixels on its longer side; the same one where neither is given or it fits."""
    height, width = frame.shape[:2]
    if size:
        scale = max(size[0] / height, size[1] / width)
        frame = _scale(frame, max(size[0], round(height * scale)), max(size[1], round(width * scale)))
        top, left = (frame.shape[0] - size[0]) // 2, (frame.shape[1] - size[1]) // 2
        return frame[top : top + size[0], left : left + size[1]]
    if max_size and max(height, width) > max_size:
        scale = max_size / max(height, width)
        return _scale(frame, max(1, round(height * scale)), max(1, round(width * scale)))
    return frame


def _scale(frame: Frame, height: int, width: int) -> Frame:
    if frame.shape[:2] == (height, width):
        return frame
    pixels = torch.from_numpy(np.ascontiguousarray(frame)).permute(2, 0, 1)[None]
    scaled = F.interpolate(pixels, (height, width), mode="bicubic", antialias=True)
    return np.ascontiguousarray(scaled[0].permute(1, 2, 0).numpy())

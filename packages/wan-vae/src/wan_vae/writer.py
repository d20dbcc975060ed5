"""Writes films with PyAV: frames at their own times, 8 or 10 bits, with sound copied from another film if asked."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import av
import numpy as np
from av.video.reformatter import ColorRange, Colorspace, VideoReformatter

from ._shared.files import replacing
from .audio import AudioTrack
from .pixels import BT709, FORMATS, UNSPECIFIED, Depth, Frame, PathLike

FINEST = 1_000_000_000  # ticks a second: the finest time base that containers hold


class VideoWriter:
    """Writes frames to a video file that appears under its name only when complete.

    H.264: `yuv420p` for even sizes, `yuv444p` (unsubsampled) for odd ones, which 4:2:0 cannot hold; limited range, and
    tagged BT.709 but for what `primaries` and `transfer` say. The container follows the suffix of `path` (.mp4, .mkv, .mov, ...).

    fps: frames per second, by which frames without a time of their own follow each other
    crf: x264's quality, 0 (best) to 51
    lossless: store 8-bit RGB as it is
    bit_depth: 8, for uint8 frames, or 10, for uint16 ones
    time_base: seconds of one unit of the `pts` given to `write`; 1/fps where not given
    audio: a film whose sound is copied, up to the last frame's end
    pixel_aspect: width over height of a pixel

    Example: `with VideoWriter("out.mp4", fps=24, size=(640, 360)) as writer: writer.write(frame)`
    """

    def __init__(
        self,
        path: PathLike,
        *,
        fps: Fraction | int,
        size: tuple[int, int],
        crf: int = 18,
        lossless: bool = False,
        bit_depth: int = 8,
        time_base: Fraction | None = None,
        audio: PathLike | None = None,
        pixel_aspect: Fraction = Fraction(1),
        primaries: int = UNSPECIFIED,
        transfer: int = UNSPECIFIED,
    ) -> None:
        if fps <= 0 or min(size) <= 0 or (time_base is not None and time_base <= 0):
            raise ValueError(f"fps, time base and size must be positive, got {fps}, {time_base} and {size[0]}x{size[1]}")
        if bit_depth not in (8, 10) or (lossless and bit_depth != 8):
            raise ValueError(f"a film is written with 8 or 10 bits, lossless with 8, got {bit_depth}" + " and lossless" * lossless)
        self.path, self.size, self.count = path, size, 0
        self.depth: Depth = 8 if bit_depth == 8 else 16
        self._fps = Fraction(fps).limit_denominator(1_000_000)
        self._time_base = 1 / self._fps if time_base is None else max(time_base, Fraction(1, FINEST))
        self._given_base, self._last = time_base or self._time_base, -1
        self._audio_source = audio
        self._audio: AudioTrack | None = None
        subsampled = size[0] % 2 == 0 and size[1] % 2 == 0
        planes = ("yuv420p" if subsampled else "yuv444p") + ("10le" if bit_depth == 10 else "")
        self._format = "rgb24" if lossless else planes
        self._reformatter = VideoReformatter()
        self._codec, self._options = ("libx264rgb", {"crf": "0"}) if lossless else ("libx264", {"crf": str(crf)})
        self._tags = [BT709 if code == UNSPECIFIED else code for code in (primaries, transfer)]
        self._aspect = pixel_aspect

    def __enter__(self) -> Self:
        self._writing = self._write_to_scratch()
        self._writing.__enter__()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._writing.__exit__(kind, error, trace)

    @contextmanager
    def _write_to_scratch(self) -> Iterator[None]:
        with replacing(self.path) as scratch:
            self._audio = AudioTrack(self._audio_source) if self._audio_source is not None else None
            try:
                self._container, self._stream = self._open(scratch)
            except BaseException:
                if self._audio is not None:
                    self._audio.close()
                raise
            try:
                yield
                if not self.count:
                    raise ValueError(f"no frame was written to '{self.path}'")
                self._mux(None)
                self._mux_audio(self._last * self._time_base + 1 / self._fps)
            except BaseException:
                self._close(quietly=True)
                raise
            self._close()

    def _open(self, scratch: Path) -> tuple[Any, Any]:
        try:
            container = av.open(f"file:{os.fspath(scratch)}", "w")
            stream: Any = container.add_stream(self._codec, rate=self._fps, options=self._options)
        except ValueError as error:
            raise ValueError(f"cannot write a video to '{self.path}' ({error}); use a suffix such as .mp4, .mkv or .mov") from error
        stream.width, stream.height = self.size
        stream.pix_fmt = self._format
        context = stream.codec_context
        context.time_base = self._time_base
        if self._aspect != 1:
            context.sample_aspect_ratio = self._aspect
        if self._format != "rgb24":
            context.colorspace = BT709
            context.color_primaries, context.color_trc = self._tags
            context.color_range = ColorRange.MPEG
        if self._audio is not None:
            try:
                self._audio_stream = container.add_stream_from_template(self._audio.stream)
                container.start_encoding()
            except (av.FFmpegError, ValueError) as error:
                container.close()
                sound = self._audio.stream.codec_context.name
                raise ValueError(f"'{self.path}' cannot hold the sound of '{self._audio_source}' ({sound}); .mkv holds any") from error
        return container, stream

    def write(self, frame: Frame, pts: int | None = None) -> None:
        """Append one frame `[H, W, 3]` RGB, uint8 (uint16 for 10 bits), shown at `pts` units of the time base; times must increase."""
        width, height = self.size
        if frame.shape != (height, width, 3) or frame.dtype != (np.uint8 if self.depth == 8 else np.uint16):
            raise ValueError(f"expected a uint{self.depth} frame [{height}, {width}, 3], got {frame.dtype} {list(frame.shape)}")
        pixels: Any = np.ascontiguousarray(frame)
        picture: Any = av.VideoFrame.from_ndarray(pixels, format=FORMATS[self.depth])
        if self._format != "rgb24":
            picture = self._reformatter.reformat(
                picture, format=self._format, dst_colorspace=Colorspace.ITU709, dst_color_range=ColorRange.MPEG
            )
        time = self._time(pts)
        if time <= self._last:
            raise ValueError(f"frame {self.count} of '{self.path}' is at {time}, not after the frame before it at {self._last}")
        picture.pts, picture.time_base, self._last = time, self._time_base, time
        self._mux(picture)
        self.count += 1

    def _time(self, pts: int | None) -> int:
        seconds = self.count / self._fps if pts is None else pts * self._given_base
        return round(seconds / self._time_base)

    def _mux(self, picture: Any) -> None:
        try:
            for packet in self._stream.encode(picture):
                if packet.dts is not None:
                    self._mux_audio(packet.dts * packet.time_base)
                self._container.mux(packet)
        except av.FFmpegError as error:
            raise self._failure(error) from error

    def _mux_audio(self, seconds: Fraction) -> None:
        if self._audio is None:
            return
        try:
            for packet in self._audio.until(seconds):
                packet.stream = self._audio_stream
                self._container.mux(packet)
        except av.FFmpegError as error:
            raise self._failure(error) from error

    def _close(self, *, quietly: bool = False) -> None:
        if self._audio is not None:
            self._audio.close()
        try:
            self._container.close()
        except av.FFmpegError as error:
            if not quietly:
                raise self._failure(error) from error

    def _failure(self, error: av.FFmpegError) -> OSError:
        return OSError(f"cannot write '{self.path}': {error.strerror}")

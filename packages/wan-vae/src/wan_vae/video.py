"""Read and write video files with PyAV: frames one by one, upright, at constant memory."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import av
import numpy as np
from av.video.reformatter import ColorRange, Colorspace, VideoReformatter
from numpy.typing import NDArray

from ._shared.files import replacing

if TYPE_CHECKING:
    from torch import Tensor

Frame = NDArray[np.uint8]
PathLike = str | os.PathLike[str]
HD_LINES = 720  # files that do not say are BT.601 below this height and BT.709 from it on
UNSPECIFIED = 2  # AVCOL_SPC_UNSPECIFIED
BT709 = 1  # the code of BT.709 as matrix, primaries and transfer function
RANGES: dict[int, str] = {ColorRange.MPEG: "limited", ColorRange.JPEG: "full"}


@dataclass(frozen=True)
class VideoInfo:
    """Facts of a video file.

    width, height: pixels of the upright picture, after rotation
    fps: average frames per second
    frames: the count that the file declares, None where it declares none; the frames read are what counts
    duration: seconds, None where unknown
    color_range: "limited", "full" or "unspecified"
    rotation: degrees counter-clockwise that turn the stored picture upright; already applied to frames read
    """

    width: int
    height: int
    fps: Fraction
    frames: int | None
    duration: float | None
    pix_fmt: str
    color_range: str
    rotation: int


def probe(path: PathLike) -> VideoInfo:
    """Facts of the first video stream of `path`. Raises like `read_frames`."""
    with _open(path) as (container, stream):
        frame = _first_frame(container, stream, path)
        rotation = _rotation(frame)
        width, height = (frame.height, frame.width) if rotation % 180 else (frame.width, frame.height)
        length = stream.duration * stream.time_base if stream.duration else None
        if length is None and container.duration:
            length = Fraction(container.duration, av.time_base)
        return VideoInfo(
            width=width,
            height=height,
            fps=Fraction(stream.average_rate or stream.guessed_rate or 25),
            frames=stream.frames or None,
            duration=float(length) if length else None,
            pix_fmt=frame.format.name,
            color_range=RANGES.get(int(frame.color_range), "unspecified"),
            rotation=rotation,
        )


def read_frames(path: PathLike, *, limit: int | None = None) -> Iterator[Frame]:
    """The frames of `path` in presentation order, upright, as uint8 `[H, W, 3]` RGB, at most `limit` of them.

    Warns where the file ends before the frame count it declares.
    Raises FileNotFoundError, and ValueError where the file is no video or its data are damaged.
    """
    with _open(path) as (container, stream):
        stream.thread_type = "AUTO"
        count, size = 0, None
        reformatter = VideoReformatter()  # one for the film: a frame's own would start its threads anew, at many times the cost
        try:
            for frame in container.decode(stream):
                picture = _to_rgb(frame, reformatter)
                if size and picture.shape != size:
                    raise ValueError(f"'{path}' changes from {size[1]}x{size[0]} to {picture.shape[1]}x{picture.shape[0]} at frame {count}")
                size = picture.shape
                if count == limit:
                    return
                yield picture
                count += 1
        except av.FFmpegError as error:
            raise ValueError(f"'{path}' is damaged after {count} frames: {error.strerror}") from error
        if not count:
            raise ValueError(f"'{path}' has a video stream without a single readable frame")
        if count < (stream.frames or 0) and limit is None:
            warnings.warn(f"'{path}' declares {stream.frames} frames and holds {count}", RuntimeWarning, stacklevel=2)


@contextmanager
def _open(path: PathLike) -> Iterator[tuple[Any, Any]]:
    if not Path(path).exists():
        raise FileNotFoundError(f"no video file at '{path}'")
    if not Path(path).is_file():
        raise ValueError(f"'{path}' is not a file")
    try:
        container = av.open(os.fspath(path))
    except av.FFmpegError as error:
        raise ValueError(f"'{path}' is not a readable video: {error.strerror}") from error
    with container:
        if not container.streams.video:
            raise ValueError(f"'{path}' has no video stream")
        yield container, container.streams.video[0]


def _first_frame(container: Any, stream: Any, path: PathLike) -> Any:
    try:
        return next(container.decode(stream))
    except (StopIteration, av.FFmpegError) as error:
        raise ValueError(f"'{path}' has a video stream without a single readable frame") from error


def _rotation(frame: Any) -> int:
    return round(frame.rotation / 90) % 4 * 90


def _to_rgb(frame: Any, reformatter: VideoReformatter) -> Frame:
    matrix = None
    if frame.colorspace == UNSPECIFIED:
        matrix = Colorspace.ITU709 if frame.height >= HD_LINES else Colorspace.ITU601
    picture = reformatter.reformat(frame, format="rgb24", src_colorspace=matrix, dst_color_range=ColorRange.JPEG).to_ndarray()
    return np.ascontiguousarray(np.rot90(picture, _rotation(frame) // 90))


class VideoWriter:
    """Writes frames to a video file that appears under its name only when complete.

    H.264: `yuv420p` for even sizes, `yuv444p` (unsubsampled) for odd ones, which 4:2:0 cannot hold; tagged BT.709,
    limited range. `lossless=True` stores RGB as it is. `crf` is x264's quality, 0 (best) to 51.
    The container follows the suffix of `path` (.mp4, .mkv, .mov, ...).

    Example: `with VideoWriter("out.mp4", fps=24, size=(640, 360)) as writer: writer.write(frame)`
    """

    def __init__(self, path: PathLike, *, fps: Fraction | int, size: tuple[int, int], crf: int = 18, lossless: bool = False) -> None:
        if fps <= 0 or min(size) <= 0:
            raise ValueError(f"fps and size must be positive, got {fps} and {size[0]}x{size[1]}")
        self.path, self.size, self.count = path, size, 0
        self._fps = Fraction(fps).limit_denominator(1_000_000)
        subsampled = size[0] % 2 == 0 and size[1] % 2 == 0
        self._format = "rgb24" if lossless else "yuv420p" if subsampled else "yuv444p"
        self._reformatter = VideoReformatter()
        self._codec, self._options = ("libx264rgb", {"crf": "0"}) if lossless else ("libx264", {"crf": str(crf)})

    def __enter__(self) -> Self:
        self._writing = self._write_to_scratch()
        self._writing.__enter__()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._writing.__exit__(kind, error, trace)

    @contextmanager
    def _write_to_scratch(self) -> Iterator[None]:
        with replacing(self.path) as scratch:
            self._container, self._stream = self._open(scratch)
            try:
                yield
                if not self.count:
                    raise ValueError(f"no frame was written to '{self.path}'")
                self._mux(None)
            finally:
                self._container.close()

    def _open(self, scratch: Path) -> tuple[Any, Any]:
        try:
            container = av.open(os.fspath(scratch), "w")
            stream: Any = container.add_stream(self._codec, rate=self._fps, options=self._options)
        except ValueError as error:
            raise ValueError(f"cannot write a video to '{self.path}' ({error}); use a suffix such as .mp4, .mkv or .mov") from error
        stream.width, stream.height = self.size
        stream.pix_fmt = self._format
        stream.codec_context.time_base = 1 / self._fps
        if self._format != "rgb24":
            context = stream.codec_context
            context.colorspace = context.color_primaries = context.color_trc = BT709
            context.color_range = ColorRange.MPEG
        return container, stream

    def write(self, frame: Frame) -> None:
        """Append one frame, uint8 `[H, W, 3]` RGB."""
        width, height = self.size
        if frame.shape != (height, width, 3) or frame.dtype != np.uint8:
            raise ValueError(f"expected a uint8 frame [{height}, {width}, 3], got {frame.dtype} {list(frame.shape)}")
        picture: Any = av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")
        if self._format != "rgb24":
            picture = self._reformatter.reformat(
                picture, format=self._format, dst_colorspace=Colorspace.ITU709, dst_color_range=ColorRange.MPEG
            )
        picture.pts, picture.time_base = self.count, 1 / self._fps
        self._mux(picture)
        self.count += 1

    def _mux(self, picture: Any) -> None:
        try:
            for packet in self._stream.encode(picture):
                self._container.mux(packet)
        except av.FFmpegError as error:
            raise OSError(f"cannot write '{self.path}': {error.strerror}") from error


def to_tensor(frames: Iterable[Frame]) -> Tensor:
    """uint8 frames `[H, W, 3]` (or one array `[T, H, W, 3]`) to a float32 video `[1, 3, T, H, W]` in [-1, 1]."""
    import torch

    pixels = torch.from_numpy(np.stack(list(frames)))
    return pixels.permute(3, 0, 1, 2)[None].float().div_(127.5).sub_(1.0)


def to_frames(video: Tensor) -> Frame:
    """A video `[1, 3, T, H, W]` in [-1, 1] to uint8 frames `[T, H, W, 3]`, rounded to the nearest level."""
    import torch

    if video.ndim != 5 or video.shape[:2] != (1, 3):
        raise ValueError(f"expected one video [1, 3, T, H, W], got {list(video.shape)}")
    pixels = video[0].float().add(1.0).mul_(127.5).round_().clamp_(0, 255).to(torch.uint8)
    frames: Frame = pixels.permute(1, 2, 3, 0).contiguous().cpu().numpy()
    return frames

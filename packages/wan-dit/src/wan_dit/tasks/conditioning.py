"""How known frames become what a backbone reads: extra channels (I2V, FLF2V, Fun), or the context of VACE.

Official Wan2.1 `image2video.py`, `first_last_frame2video.py` and `vace.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from ..contracts import Conditioning
from .task import Encoders, Prepared, Target


def condition(frames: Tensor, known: Tensor, pictures: Sequence[Tensor], target: Target, encoders: Encoders) -> Prepared:
    """Known frames of a video for a backbone that takes them as channels or as a VACE context.

    frames: `[3, T, H, W]`, 0 where a frame is not known; known: bool `[T]`
    pictures: `[3, H, W]` of any sizes, what an image encoder sees where the backbone reads its tokens
    """
    stride = target.backbone.stride
    if target.scheme == "vace":
        mask = (~known).float()[None, :, None, None].expand(1, *frames.shape[1:])
        return Prepared(Conditioning(vace=vace_context(frames, mask, (), stride, encoders.video)))
    tokens = encoders.images(pictures) if target.backbone.image_dim is not None else None
    return Prepared(Conditioning(extra_latents=known_channels(frames, known, stride, encoders.video), image_context=tokens))


def known_channels(frames: Tensor, known: Tensor, stride: tuple[int, int, int], encode: Callable[[Tensor], Tensor]) -> Tensor:
    """`[1, time stride + C, T', H', W']`: a mask of the known pixel frames, then the latents of the frames.

    frames: `[3, T, H, W]`, 0 where a frame is not known; known: bool `[T]`
    The first pixel frame makes a latent frame by itself: its mask is repeated to fill the channels.
    """
    time = stride[0]
    latents = encode(frames)
    mask = torch.cat([known[:1].expand(time - 1), known]).to(latents)
    mask = rearrange(mask, "(t c) -> 1 c t 1 1", c=time)
    return torch.cat([mask.expand(-1, -1, -1, *latents.shape[3:]), latents], dim=1)


def vace_context(
    frames: Tensor, mask: Tensor, references: Sequence[Tensor], stride: tuple[int, int, int], encode: Callable[[Tensor], Tensor]
) -> Tensor:
    """`[1, 2 C + 64, R + T', H', W']`: latents of what stays, latents of what is made anew, and the mask, R references in front.

    frames: `[3, T, H, W]`; mask: `[1, T, H, W]` in 0..1, where 1 is made anew; references: `[3, H, W]` each
    Frames are split at a mask of 0.5, while the mask itself is kept as it is; a reference has no part that is made anew.
    """
    reactive = (mask > 0.5).to(frames)
    latents = torch.cat([encode(frames * (1 - reactive)), encode(frames * reactive)], dim=1)
    context = torch.cat([latents, mask_channels(mask, stride, latents.shape[2]).to(latents)], dim=1)
    fronts = [encode(reference[:, None]) for reference in references]
    padded = [F.pad(front, (0, 0, 0, 0, 0, 0, 0, context.shape[1] - front.shape[1])) for front in fronts]
    return torch.cat([*padded, context], dim=2)


def mask_channels(mask: Tensor, stride: tuple[int, int, int], frames: int) -> Tensor:
    """A mask `[1, T, H, W]` as `[1, 64, T', H', W']`: the pixels of a latent by (row, column), the nearest of the frames of time."""
    _, high, wide = stride
    channels = rearrange(mask, "1 t (h p) (w q) -> 1 (p q) t h w", p=high, q=wide)
    return F.interpolate(channels, size=(frames, *channels.shape[3:]), mode="nearest-exact")

"""The parts of the transformer that read what a task gives besides text: images, control, camera paths.

Official `MLPProj` (Wan2.1), VACE's blocks (Wan2.1 `vace_model.py`), and Fun control's `ref_conv` and `SimpleAdapter` (VideoX-Fun).

Shape suffixes: B batch, L tokens, M image tokens, D width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from .config import DiTConfig

CAMERA_DOWNSCALE = 8  # pixels a side that the camera adapter folds into channels


class ImageEmbedder(nn.Module):
    """Tokens of CLIP `[B, M, image_dim]` to `[B, M, D]`; FLF2V adds a learned position to those of its two images.

    Its norms have torch's eps of 1e-5, as the official ones.
    """

    def __init__(self, image_dim: int, dim: int, positions: int | None) -> None:
        super().__init__()
        self.pos_embed = nn.Parameter(torch.zeros(1, positions, image_dim)) if positions else None
        self.norm1 = nn.LayerNorm(image_dim)
        self.linear1 = nn.Linear(image_dim, image_dim)
        self.linear2 = nn.Linear(image_dim, dim)
        self.norm2 = nn.LayerNorm(dim)

    def forward(self, image_BMC: Tensor) -> Tensor:
        if self.pos_embed is not None:
            image_BMC = image_BMC + self.pos_embed
        return self.norm2(self.linear2(F.gelu(self.linear1(self.norm1(image_BMC)))))


class CameraAdapter(nn.Module):
    """A camera path `[B, C, T', H, W]` of pixel size to `[B, L, D]`, which is added to the tokens."""

    def __init__(self, camera_dim: int, dim: int, patch: tuple[int, int, int]) -> None:
        super().__init__()
        self.conv = nn.Conv2d(camera_dim * CAMERA_DOWNSCALE**2, dim, kernel_size=patch[1:], stride=patch[1:])
        self.conv1 = nn.Conv2d(dim, dim, 3, padding=1)
        self.conv2 = nn.Conv2d(dim, dim, 3, padding=1)

    def forward(self, camera: Tensor) -> Tensor:
        frames = F.pixel_unshuffle(rearrange(camera.to(self.conv.weight.dtype), "b c t h w -> (b t) c h w"), CAMERA_DOWNSCALE)
        x = self.conv(frames)
        x = x + self.conv2(F.relu(self.conv1(x)))
        return rearrange(x, "(b t) d h w -> b (t h w) d", b=len(camera))


def reference_embedding(config: DiTConfig) -> nn.Conv2d:
    """Latents of a reference image `[B, C, H', W']` to one frame of tokens in front of the video's."""
    return nn.Conv2d(config.ref_dim, config.dim, kernel_size=config.patch_size[1:], stride=config.patch_size[1:])

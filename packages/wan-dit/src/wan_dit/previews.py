"""Pictures of latents without a decoder: linear maps from latent channels to RGB, fitted to the VAE that is in use.

They are found by encoding a chart, whose pixels are known. It has plain rectangles of many sizes and colours, since a small
VAE knows no noise, and stands still for two latent frames: a first one, which is encoded by itself, has a map of its own.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .media import contact_sheet, write_gif
from .outputs import check_preview

if TYPE_CHECKING:
    import numpy as np

PANELS = (4, 8)  # of the chart, down and across
SIDE = 8  # latents, of a panel
RECTANGLES = 4  # of a panel
GREY = 0.5  # how many of the colours are grey; the others are those of the corners of a smaller RGB cube
VIVID = 0.9
RIDGE = 0.03  # of the mean square of a latent: a chart shows less than a film, so the maps are kept small
SMALLEST = 160  # pixels: a preview is enlarged to at least this width


@dataclass(frozen=True)
class LatentMap:
    """RGB in [-1, 1] = latent @ weight + bias, for the first latent frame and for the rest.

    weight: `[2, C, 3]`; bias: `[2, 3]`; float32 on the CPU
    """

    weight: Tensor
    bias: Tensor


@torch.no_grad()
def fit_preview(vae: Any) -> LatentMap:
    """The maps of a VAE, by ridge regression of the mean pixels of each latent of the chart; the same for the same weights.

    vae: `encode(video) -> latents` and a `spec` with `stride`; it is run once, on 1 + time stride frames of 64 x 32 latents
    """
    time, height, width = vae.spec.stride
    picture = _chart(height, width)
    latents = vae.encode(picture[None, :, None].expand(-1, -1, 1 + time, -1, -1).to(_device(vae)))[0].double().cpu()
    colours = F.avg_pool2d(picture, (height, width)).flatten(1).T.double()
    weights, biases = zip(*(_ridge(latents[:, i].flatten(1).T, colours) for i in range(2)), strict=True)
    return LatentMap(torch.stack(weights).float(), torch.stack(biases).float())


def latent_preview(latents: Tensor, latent_map: LatentMap) -> np.ndarray[Any, Any]:
    """`[1, C, T', H', W']` to uint8 frames `[T', H', W', 3]`, a pixel a latent. ValueError where the channels are not the map's."""
    channels = latent_map.weight.shape[1]
    if latents.ndim != 5 or latents.shape[:2] != (1, channels):
        raise ValueError(f"expected latents [1, {channels}, T', H', W'] of the VAE of the map, got {list(latents.shape)}")
    tokens = latents[0].detach().float().cpu().movedim(0, -1)
    pixels = torch.cat([part @ latent_map.weight[i] + latent_map.bias[i] for i, part in enumerate((tokens[:1], tokens[1:]))])
    levels: np.ndarray[Any, Any] = pixels.nan_to_num().clamp(-1, 1).add(1).mul(127.5).round().byte().numpy()
    return levels


def save_preview(frames: np.ndarray[Any, Any], path: str | os.PathLike[str], fps: float = 4) -> Path:
    """Write the frames of `latent_preview` as a `.gif`, or as one `.png` with all of them, large enough to see."""
    check_preview(path)
    video = torch.from_numpy(frames).permute(3, 0, 1, 2).float().div(127.5).sub(1)
    if Path(path).suffix.lower() == ".png":
        return contact_sheet(video, path)
    scale = max(1, -(-SMALLEST // frames.shape[2]))
    return write_gif(F.interpolate(video, scale_factor=scale, mode="nearest"), path, fps)


def _chart(height: int, width: int) -> Tensor:
    """`[3, H, W]` in [-1, 1]: panels of a plain colour with rectangles on it, of which a latent covers `height` x `width` pixels."""
    generator = torch.Generator().manual_seed(0)

    def colour() -> Tensor:
        grey, *rgb = torch.rand(4, generator=generator)
        vivid = torch.where(torch.stack(rgb) > 0.5, VIVID, -VIVID)
        level = torch.rand(1, generator=generator) * 2 - 1
        return (level.expand(3) if grey < GREY else vivid)[:, None, None]

    rows, columns = PANELS
    chart = torch.empty(3, rows * SIDE * height, columns * SIDE * width)
    for panel in (panel for row in chart.chunk(rows, 1) for panel in row.chunk(columns, 2)):
        panel[:] = colour()
        for _ in range(RECTANGLES):
            tall, wide, y, x = torch.rand(4, generator=generator).tolist()
            h, w = int(height * (SIDE / 2) ** tall), int(width * (SIDE / 2) ** wide)
            top, left = int((panel.shape[1] + h) * y) - h, int((panel.shape[2] + w) * x) - w
            panel[:, max(0, top) : max(0, top + h), max(0, left) : max(0, left + w)] = colour()
    return chart


def _ridge(latents: Tensor, colours: Tensor) -> tuple[Tensor, Tensor]:
    """Weight `[C, 3]` and bias `[3]` that take latents `[N, C]` to colours `[N, 3]`."""
    centre, mean = latents.mean(0), colours.mean(0)
    x = latents - centre
    gram = x.T @ x
    weight = torch.linalg.solve(
        gram + RIDGE * latents.square().mean() * len(x) * torch.eye(len(gram), dtype=gram.dtype), x.T @ (colours - mean)
    )
    return weight, mean - centre @ weight


def _device(vae: Any) -> torch.device:
    parameters = vae.parameters() if isinstance(vae, torch.nn.Module) else ()
    return next((value.device for value in parameters), torch.device("cpu"))

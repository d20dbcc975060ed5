"""The perceptual term of a VAE's loss, by a network of the user's (LPIPS; report, section 4.1.2): this package has none."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from wan_vae.perceptual import load_network


class Perceptual:
    """The distance that the network of a file gives for two batches of pictures `[N, 3, H, W]` in [-1, 1]: `[N]`, or `[N, 1, 1, 1]`.

    path: saved by `torch.jit.save` or `torch.export.save` (.pt2); sizes: of the squares that it has to take
    Raises FileNotFoundError, and ValueError where the file holds no network, or one that gives no such distances or no gradients.
    """

    def __init__(self, path: Path, device: str, sizes: Iterable[int]) -> None:
        self.path = path
        self.network = cast(Any, load_network(path, device))
        for param in self.network.parameters():
            param.requires_grad_(False)
        for size in sizes:
            self._try(torch.linspace(-1, 1, 6 * size**2, device=device).view(2, 3, size, size))

    def __call__(self, output: Tensor, video: Tensor) -> Tensor:
        """The mean over the frames of each clip, `[B]`, of two batches `[B, 3, T, H, W]`, with gradients; computed in fp32."""
        with torch.autocast(output.device.type, enabled=False):
            distances: Tensor = self.network(*(clips.float().transpose(1, 2).flatten(0, 1) for clips in (output, video)))
        return distances.view(len(output), -1).mean(1)

    def _try(self, pictures: Tensor) -> None:
        given, name = list(pictures.shape), f"perceptual_weights: the network of '{self.path}'"
        shown = (0.5 * pictures).requires_grad_()
        try:
            found = self.network(shown, pictures)
        except (RuntimeError, AssertionError) as error:
            raise ValueError(f"{name} does not take two batches {given}: {str(error).strip().splitlines()[-1]}") from error
        if not isinstance(found, Tensor) or found.numel() != len(pictures):
            shape = list(found.shape) if isinstance(found, Tensor) else type(found).__name__
            raise ValueError(f"{name} gave {shape} for two batches {given}, expected a distance for each of {len(pictures)} pairs")
        if not found.requires_grad:
            raise ValueError(f"{name} has no gradients, and training needs them: save it without torch.no_grad")

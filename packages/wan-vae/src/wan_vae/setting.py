"""What memory is planned for: a VAE's configuration, a half of it, the pictures, and what they are computed in and on."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import nn

from ._shared.memory import free_memory
from .config import PRESETS, VAEConfig
from .convolution import resolve_backend
from .footprint import meta_model
from .model import WanVAE
from .plugins import VAESpec
from .tiles import Half
from .traced import KINDS
from .traced import PRESETS as OTHERS
from .winograd import Winograd

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Setting:
    """What a plan is made for.

    config: a `VAEConfig`, or that of another codec, of `traced.KINDS`
    size: height and width in pixels
    frames: 1 is a picture; memory: None is what is free
    """

    config: Any
    half: Half
    size: tuple[int, int]
    dtype: torch.dtype = torch.float32
    device: torch.device = CPU
    chunk: int = 1
    frames: int | None = None
    backend: str = "auto"
    memory: int | None = None

    @property
    def is_wan(self) -> bool:
        """Whether it is a Wan VAE, which can be split into exact tiles."""
        return isinstance(self.config, VAEConfig)

    @property
    def cells(self) -> tuple[int, int]:
        """Rows and columns of the latents; what does not divide is padded."""
        return -(-self.size[0] // self.config.stride[1]), -(-self.size[1] // self.config.stride[2])

    @property
    def costs(self) -> dict[str, Any]:
        """What decides the memory of a chunk, apart from its size."""
        backend = "direct"
        if self.is_wan:
            backend = resolve_backend(self.backend, self.device, self.dtype, _suited(self.config, self.dtype))
        return {"dtype": self.dtype, "backend": backend, "cpu": self.device.type != "cuda"}

    @property
    def chunks(self) -> tuple[int, ...]:
        """Latent frames of the first chunks; after three nothing changes any more. A VAE that takes chunks whole says how many."""
        chunk = getattr(self.config, "chunk", 0) or self.chunk
        return (1,) if self.frames == 1 else (1, chunk, chunk)


def setting_of(vae: Any, half: Half, size: tuple[int, int], chunk: int = 1) -> Setting | None:
    """For a loaded VAE, with the device, type and backend that it has; None for one whose memory cannot be predicted."""
    if isinstance(vae, WanVAE):
        weight = (vae.quant_conv if half == "encoder" else vae.post_quant_conv).weight
        backend = "direct" if vae.backend == "winograd" and weight.dtype != torch.float32 else vae.backend
        return Setting(vae.config, half, size, weight.dtype, weight.device, chunk, backend=backend)
    if (kind := KINDS.get(type(getattr(vae, "config", None)))) and isinstance(vae, kind):
        weight = next(vae.parameters())
        return Setting(vae.config, half, size, weight.dtype, weight.device, chunk)
    return None


def free_budget(device: torch.device) -> int:
    """Bytes free on a device; without a bound where the system does not tell."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return free_memory() or 1 << 62


def config_of(spec: VAESpec) -> Any:
    """The configuration of a VAE; of a preset without its weights. ValueError for one of another kind."""
    presets = {**PRESETS, **OTHERS}
    if spec.name in presets and spec.target.startswith("wan_vae."):
        return presets[spec.name]
    target = spec.resolve()
    ours = not isinstance(target, type) or target.__module__.startswith("wan_vae.")  # told before weights are fetched
    config = getattr(spec.load(), "config", None) if ours else None
    if not isinstance(config, (VAEConfig, *KINDS)):
        known = f"{', '.join(presets)} and their like"
        raise ValueError(f"the memory of '{spec.name}' cannot be predicted: it is none of the VAEs of wan-vae ({known})")
    return config


@lru_cache(maxsize=8)
def _suited(config: VAEConfig, dtype: torch.dtype) -> int:
    """Bytes of the weights that Winograd's algorithm would transform."""
    layers = [layer for layer in meta_model(config, dtype).modules() if isinstance(layer, nn.Conv2d | nn.Conv3d)]
    return sum(layer.weight.nbytes for layer in layers if Winograd().takes(layer))

"""A small codec that is none of the house's: of any stride, with a posterior or without, with batch norms and an unsaved buffer."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Self

import torch
from einops import rearrange
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from wan_train.plugins import PluginManager, hookimpl, plugin_manager
from wan_vae.plugins import VAESpec

MEAN = 0.25  # of the pixels, which the codec takes off


@dataclass(frozen=True)
class PlainConfig:
    """stride: pixels per latent in (time, height, width); posterior: whether a log-variance is encoded; std: of all latents."""

    stride: tuple[int, int, int] = (1, 8, 8)
    posterior: bool = False
    dim: int = 12
    z_dim: int = 4
    std: float = 0.0


class PlainCodec(nn.Module):
    """Patches of video through convolutions of single frames, a batch norm in each half; the first frame has a latent of its own."""

    def __init__(self, config: PlainConfig | None = None) -> None:
        super().__init__()
        self.config = config = config or PlainConfig()
        patch, dim, out = 3 * config.stride[0] * config.stride[1] * config.stride[2], config.dim, config.z_dim * (1 + config.posterior)
        self.compress = nn.Sequential(nn.Conv3d(patch, dim, 1), nn.BatchNorm3d(dim), nn.SiLU(), self._wide(dim, dim))
        self.to_latents = nn.Conv3d(dim, out, 1)
        self.from_latents = nn.Conv3d(config.z_dim, dim, 1)
        self.expand = nn.Sequential(nn.BatchNorm3d(dim), nn.SiLU(), self._wide(dim, dim), nn.Conv3d(dim, dim, 1, groups=dim))
        self.to_pixels = nn.Conv3d(dim, patch, 1)
        self.register_buffer("mean", torch.tensor(MEAN), persistent=False)

    @staticmethod
    def _wide(dim: int, out: int) -> nn.Conv3d:
        return nn.Conv3d(dim, out, (1, 3, 3), padding=(0, 1, 1))

    @property
    def spec(self) -> VAESpec:
        config = self.config
        return VAESpec("plain", "plain_codec:PlainCodec", latent_space="plain", latent_channels=config.z_dim, stride=config.stride)

    @property
    def last_layer(self) -> Tensor:
        return self.to_pixels.weight

    def moments(self, video: Tensor) -> tuple[Tensor, Tensor | None]:
        s, p, q = self.config.stride
        whole = torch.cat([*(s - 1) * [video[:, :, :1]], video - self.mean], dim=2)
        made = self.to_latents(self.compress(rearrange(whole, "b c (t s) (h p) (w q) -> b (c s p q) t h w", s=s, p=p, q=q)))
        return tuple(made.chunk(2, dim=1)) if self.config.posterior else (made, None)

    def reconstruct(self, video: Tensor, generator: Any = None) -> tuple[Tensor, Tensor, Tensor | None]:
        mean, logvar = self.moments(video)
        latents = mean
        if logvar is not None and generator is not None:
            noise = [torch.randn(one.shape, generator=each) for one, each in zip(mean, generator, strict=True)]
            latents = mean + torch.stack(noise) * (0.5 * logvar).exp()
        return self._pixels(latents), mean, logvar

    def encode(self, video: Tensor) -> Tensor:
        return self.moments(video)[0] / (self.config.std or 1)

    def decode(self, latents: Tensor, *, generator: Any = None) -> Tensor:
        return self._pixels(latents * (self.config.std or 1)).clamp(-1, 1)

    def _pixels(self, latents: Tensor) -> Tensor:
        s, p, q = self.config.stride
        patches = self.to_pixels(self.expand(self.from_latents(latents)))
        return rearrange(patches, "b (c s p q) t h w -> b c (t s) (h p) (w q)", s=s, p=p, q=q)[:, :, s - 1 :] + self.mean

    def parameter_groups(self) -> dict[str, list[nn.Parameter]]:
        parts = {
            "encoder": self.compress, "encoder_head": self.to_latents, "decoder_input": self.from_latents, "decoder": self.expand,
            "decoder_head": self.to_pixels,
        }  # fmt: skip
        return {name: list(part.parameters()) for name, part in parts.items()}

    def reinitialised(self, **architecture: Any) -> PlainCodec:
        return PlainCodec(replace(self.config, std=0.0, **architecture))

    @torch.no_grad()
    def fit_normaliser(self, batches: Iterable[Tensor]) -> None:
        std = torch.cat([self.moments(video)[0].flatten() for video in batches]).std()
        self.config = replace(self.config, std=float(std))

    def save_pretrained(self, folder: Path) -> None:
        folder.mkdir(parents=True)
        (folder / "config.json").write_text(json.dumps(asdict(self.config)))
        save_file(self.state_dict(), folder / "model.safetensors")

    @classmethod
    def from_folder(cls, folder: Path) -> Self:
        values = json.loads((folder / "config.json").read_text())
        codec = cls(PlainConfig(**{**values, "stride": tuple(values["stride"])}))
        codec.load_state_dict(load_file(folder / "model.safetensors"))
        return codec.eval()


class Plugin:
    """The package that the codec would come in."""

    @hookimpl
    def wan_vaes(self) -> list[VAESpec]:
        return [PlainCodec().spec]


def with_plain_codec() -> PluginManager:
    """The installed plugins and this one."""
    pm = plugin_manager()
    pm.register(Plugin(), name="third-party")
    return pm

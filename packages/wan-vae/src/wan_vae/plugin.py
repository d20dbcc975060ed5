"""The VAEs of this package."""

from __future__ import annotations

from functools import partial

from .plugins import VAESpec, hookimpl

_Spec = partial(VAESpec, target="wan_vae.model:WanVAE", format="wan-vae/1", describe="wan_vae.checkpoint:describe")


@hookimpl
def wan_vaes() -> list[VAESpec]:
    return [
        _Spec(
            name="wan2.1",
            latent_space="wan2.1",
            latent_channels=16,
            stride=(4, 8, 8),
            weights="hub:Wan-AI/Wan2.1-T2V-1.3B/Wan2.1_VAE.pth",
            summary="Wan2.1 and the Wan2.2 A14B models, 127 M parameters",
        ),
        _Spec(
            name="wan2.2",
            latent_space="wan2.2",
            latent_channels=48,
            stride=(4, 16, 16),
            weights="hub:Wan-AI/Wan2.2-TI2V-5B/Wan2.2_VAE.pth",
            summary="Wan2.2 TI2V-5B, 705 M parameters",
        ),
        _Spec(
            name="tiny",
            latent_space="tiny-1",
            latent_channels=16,
            stride=(4, 8, 8),
            weights="pkg:wan_vae/weights/tiny",
            summary="built in, trained on rendered moving shapes only",
        ),
    ]

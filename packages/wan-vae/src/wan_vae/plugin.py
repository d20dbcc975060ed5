"""The VAEs of this package."""

from __future__ import annotations

from functools import partial

from .plugins import VAESpec, hookimpl

_Spec = partial(
    VAESpec, target="wan_vae.model:WanVAE", format="wan-vae/1", describe="wan_vae.checkpoint:describe", footprint="wan_vae.plan:decoding"
)


_Tiny = partial(VAESpec, target="wan_vae.codecs.taehv:TAEHV", format="wan-taehv/1", describe="wan_vae.codecs.taehv:describe")


@hookimpl
def wan_vaes() -> list[VAESpec]:
    return [
        _Spec(
            name="wan2.1",
            latent_space="wan2.1",
            latent_channels=16,
            stride=(4, 8, 8),
            weights="hub:Wan-AI/Wan2.1-T2V-1.3B/Wan2.1_VAE.pth",
            parameters=126_892_531,
            summary="Wan2.1 and the Wan2.2 A14B models",
        ),
        _Spec(
            name="wan2.2",
            latent_space="wan2.2",
            latent_channels=48,
            stride=(4, 16, 16),
            weights="hub:Wan-AI/Wan2.2-TI2V-5B/Wan2.2_VAE.pth",
            parameters=704_688_668,
            summary="Wan2.2 TI2V-5B",
        ),
        _Spec(
            name="tiny",
            latent_space="tiny-2",
            latent_channels=16,
            stride=(4, 8, 8),
            weights="pkg:wan_vae/weights/tiny",
            parameters=698_252,
            summary="built in, trained on rendered moving shapes only",
        ),
        _Tiny(
            name="taew2_1",
            latent_space="wan2.1",
            latent_channels=16,
            stride=(4, 8, 8),
            weights="hub:Kijai/WanVideo_comfy/taew2_1.safetensors",
            parameters=11_315_539,
            summary="previews of Wan2.1's latents (TAEHV)",
        ),
        _Tiny(
            name="taew2_2",
            latent_space="wan2.2",
            latent_channels=48,
            stride=(4, 16, 16),
            weights="hub:Kijai/WanVideo_comfy/taew2_2.safetensors",
            parameters=11_418_108,
            summary="previews of Wan2.2's latents (TAEHV)",
        ),
    ]

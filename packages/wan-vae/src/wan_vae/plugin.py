"""The VAEs of this package."""

from __future__ import annotations

from functools import partial

from .plugins import VAESpec, hookimpl

PLAN = "wan_vae.plan:decoding"
_Spec = partial(VAESpec, target="wan_vae.model:WanVAE", format="wan-vae/1", describe="wan_vae.checkpoint:describe", footprint=PLAN)
_Untrained = partial(_Spec, target="wan_vae.model:untrained")
_Tiny = partial(
    VAESpec, target="wan_vae.codecs.taehv:TAEHV", format="wan-taehv/1", describe="wan_vae.codecs.taehv:describe", footprint=PLAN
)
_LTX = partial(
    VAESpec,
    target="wan_vae.codecs.ltx:LTXVAE",
    latent_channels=128,
    stride=(8, 32, 32),
    format="wan-ltx/1",
    describe="wan_vae.codecs.ltx:describe",
    footprint=PLAN,
)
_Deep = partial(VAESpec, target="wan_vae.codecs.dcae:DCAE", format="wan-dcae/1", describe="wan_vae.codecs.dcae:describe", footprint=PLAN)

VAES = [
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
        summary="built in: rendered shapes at 35.2 dB, real film at 23.2 to 26.2 dB",
    ),
    _Untrained(
        name="residual-f16t4",
        latent_space="residual-f16t4",
        latent_channels=64,
        stride=(4, 16, 16),
        parameters=409_324_684,
        summary="residual levels as in DC-AE, to be trained: an architecture without weights",
    ),
    _Untrained(
        name="residual-f32t8",
        latent_space="residual-f32t8",
        latent_channels=128,
        stride=(8, 32, 32),
        parameters=716_039_052,
        summary="residual levels as in DC-AE, to be trained: an architecture without weights",
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
    _LTX(
        name="ltx-video-0.9",
        latent_space="ltx-0.9",
        weights="hub:Lightricks/LTX-Video/vae",
        parameters=419_193_649,
        summary="LTX-Video 0.9, plain decoder",
    ),
    _LTX(
        name="ltx-video-0.9.1",
        latent_space="ltx-0.9.1",
        weights="hub:Lightricks/LTX-Video/ltx-video-2b-v0.9.1.safetensors",
        parameters=934_976_434,
        summary="LTX-Video 0.9.1, within the whole model; its decoder denoises",
    ),
    _LTX(
        name="ltx-video-0.9.5",
        latent_space="ltx-0.9.5",
        weights="hub:Lightricks/LTX-Video-0.9.5/vae",
        parameters=1_246_913_522,
        summary="LTX-Video 0.9.5; its decoder denoises",
    ),
    _LTX(
        name="ltx-video-0.9.7",
        latent_space="ltx-0.9.5",
        weights="hub:Lightricks/LTX-Video-0.9.7-dev/vae",
        parameters=1_246_913_522,
        summary="LTX-Video 0.9.6 and later; its decoder denoises",
    ),
    _Deep(
        name="dc-ae-f32c32-in-1.0",
        latent_space="dc-ae-f32c32-in",
        latent_channels=32,
        stride=(1, 32, 32),
        weights="hub:mit-han-lab/dc-ae-f32c32-in-1.0-diffusers",
        parameters=323_356_460,
        summary="pictures, every frame by itself (DC-AE on ImageNet)",
    ),
    _Deep(
        name="dc-ae-f64c128-in-1.0",
        latent_space="dc-ae-f64c128-in",
        latent_channels=128,
        stride=(1, 64, 64),
        weights="hub:mit-han-lab/dc-ae-f64c128-in-1.0-diffusers",
        parameters=676_896_140,
        summary="pictures, every frame by itself (DC-AE on ImageNet)",
    ),
    _Deep(
        name="dc-ae-f128c512-in-1.0",
        latent_space="dc-ae-f128c512-in",
        latent_channels=512,
        stride=(1, 128, 128),
        weights="hub:mit-han-lab/dc-ae-f128c512-in-1.0-diffusers",
        parameters=1_120_682_252,
        summary="pictures, every frame by itself (DC-AE on ImageNet)",
    ),
    _Deep(
        name="dc-ae-f32c32-sana-1.0",
        latent_space="dc-ae-f32c32-sana",
        latent_channels=32,
        stride=(1, 32, 32),
        weights="hub:mit-han-lab/dc-ae-f32c32-sana-1.0-diffusers",
        parameters=312_250_275,
        summary="pictures, every frame by itself (DC-AE of Sana)",
    ),
    _Deep(
        name="dc-ae-f32c32-sana-1.1",
        latent_space="dc-ae-f32c32-sana",
        latent_channels=32,
        stride=(1, 32, 32),
        weights="hub:mit-han-lab/dc-ae-f32c32-sana-1.1-diffusers",
        parameters=312_250_275,
        summary="the same latents, a better decoder (DC-AE of Sana)",
    ),
]


@hookimpl
def wan_vaes() -> list[VAESpec]:
    return VAES

"""What this distribution offers. Imports no torch: the class is named, and imported only when it is used."""

from __future__ import annotations

from wan_vae.plugins import VAESpec, hookimpl

SPEC = VAESpec(
    "dct",
    "wan_vae_dct.codec:DCT",
    latent_space="dct-1",
    latent_channels=48,
    stride=(4, 8, 8),
    parameters=0,
    summary="the lowest frequencies of 8x8 blocks and 4 frames; nothing is learnt",
)


@hookimpl
def wan_vaes() -> list[VAESpec]:
    return [SPEC]

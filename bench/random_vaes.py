"""Published VAEs at full size with random weights: `random_vaes:wan2_1` is a `--codec`. They take the time and memory of the real ones."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from wan_vae.codecs.dcae import DCAE
from wan_vae.codecs.dcae_config import PRESETS as DEEP
from wan_vae.codecs.ltx import LTXVAE
from wan_vae.codecs.ltx_config import PRESETS as LTX
from wan_vae.codecs.taehv import TAEHV
from wan_vae.codecs.taehv_config import TAEW21, TAEW22
from wan_vae.config import PRESETS as WAN
from wan_vae.model import WanVAE

SAME = {"tiny", "ltx-video-0.9.7", "dc-ae-f32c32-sana-1.1"}  # has its weights here, or is the network of another


def makers() -> dict[str, Callable[[], Any]]:
    """By name of the VAE: a function that makes it."""
    kinds: list[tuple[Any, dict[str, Any]]] = [(WanVAE, WAN), (TAEHV, {"taew2_1": TAEW21, "taew2_2": TAEW22}), (LTXVAE, LTX), (DCAE, DEEP)]
    return {
        name: lambda kind=kind, config=config: kind(config)
        for kind, presets in kinds
        for name, config in presets.items()
        if name not in SAME and "mix" not in name
    }


MADE = makers()


def attribute(name: str) -> str:
    return re.sub(r"\W", "_", name)


def __getattr__(name: str) -> Callable[[], Any]:
    for known, maker in MADE.items():
        if attribute(known) == name:
            return maker
    raise AttributeError(name)

"""The configurations of the published backbones and VAEs: known without their weights, which are many gigabytes. Imports no torch."""

from __future__ import annotations

from typing import Any

from wan_dit.config import TINY, DiTConfig
from wan_dit.plugin import wan_backbones, wan_models
from wan_dit.recognition import ARCHITECTURES
from wan_vae.plugin import wan_vaes


def backbones() -> dict[str, DiTConfig]:
    """The configurations of this house's backbones, by name: those of the models that they are part of."""
    known = {"tiny": TINY, **ARCHITECTURES}
    parts = [(part, known[model.name]) for model in wan_models() for part in (model.backbone, model.low_noise_backbone) if part]
    return {part.partition(":")[2]: config for part, config in parts}


def vaes() -> dict[str, Any]:
    """The configurations of this house's VAEs, by name; only here are their modules, and torch, imported."""
    from wan_vae.codecs import dcae_config, ltx_config
    from wan_vae.config import PRESETS

    return {**PRESETS, **dcae_config.PRESETS, **ltx_config.PRESETS}


def published(spec: Any) -> Any:
    """The configuration of a spec's part; None where only its weights tell it, as of a checkpoint on disk or another package's part."""
    for specs, configs in ((wan_backbones, backbones), (wan_vaes, vaes)):
        if spec in specs() and not (spec.weights or "").startswith("pkg:"):
            return configs().get(spec.name)
    return None

"""Which installed model a backbone on disk belongs to, and so its task and default settings: by shapes, then by names.

Shapes leave open whether Wan2.1 I2V is the model of 480p or 720p, and whether a 14 B backbone is of Wan2.1 or an expert of Wan2.2.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .config import FLF2V_14B, I2V_14B, I2V_A14B, T2V_1_3B, T2V_14B, TI2V_5B, VACE_1_3B, VACE_14B, DiTConfig
from .plugins import VideoModelSpec, discover, find

if TYPE_CHECKING:
    import pluggy

ARCHITECTURES = {
    "wan2.1-t2v-1.3b": T2V_1_3B,
    "wan2.1-t2v-14b": T2V_14B,
    "wan2.1-t2i-14b": T2V_14B,
    "wan2.1-i2v-14b-480p": I2V_14B,
    "wan2.1-i2v-14b-720p": I2V_14B,
    "wan2.1-flf2v-14b": FLF2V_14B,
    "wan2.1-vace-1.3b": VACE_1_3B,
    "wan2.1-vace-14b": VACE_14B,
    "wan2.2-t2v-a14b": T2V_14B,
    "wan2.2-i2v-a14b": I2V_A14B,
    "wan2.2-ti2v-5b": TI2V_5B,
}
SIZES = ("in_dim", "out_dim", "dim", "num_layers", "text_dim", "image_dim", "pos_embed_seq_len", "vace_layers", "ref_dim", "camera_dim")


def choose(
    backbone: Path, config: DiTConfig, *, paired: bool, names: Iterable[str], preset: str | None, pm: pluggy.PluginManager
) -> VideoModelSpec:
    """The installed model of a backbone's shapes, by the names of its folder and file where several have them.

    paired: whether there are two experts
    preset: the model's name, which is taken where the number of experts is right
    ValueError that lists the models where none or several fit.
    """
    if preset is not None:
        chosen: VideoModelSpec = find("wan_models", preset, pm)
        if (chosen.low_noise_backbone is not None) != paired:
            needs = "two experts" if chosen.low_noise_backbone else "one backbone"
            raise ValueError(f"model '{preset}' has {needs}, '{backbone}' is {'two experts' if paired else 'one backbone'}")
        return chosen
    offers = [offer.spec for offer in discover("wan_models", pm) if offer.spec]
    fitting = [model for model in offers if fits(model, config, pm)]
    named = _named(fitting, set[str]().union(*map(_words, names)))
    if (
        not paired
        and (experts := [model for model in named or fitting if model.low_noise_backbone])
        and len(experts) == len(named or fitting)
    ):
        raise ValueError(
            f"'{backbone}' is one expert of {experts[0].name}: give the folder that holds both, or another model's "
            "settings with preset= (--preset NAME)"
        )
    fitting = [model for model in named or fitting if (model.low_noise_backbone is not None) == paired]
    if len(fitting) == 1:
        return fitting[0]
    what = "several models have the shapes of" if fitting else "no installed model has the shapes of"
    names = ", ".join(model.name for model in fitting or offers if (model.low_noise_backbone is not None) == paired)
    raise ValueError(f"{what} '{backbone}': say whose task and settings to use with preset= (--preset NAME): {names}")


def fits(model: VideoModelSpec, config: DiTConfig, pm: pluggy.PluginManager) -> bool:
    """Whether a backbone is of this model: by its sizes for ours, by what a pipeline checks for those of other packages."""
    if (known := ARCHITECTURES.get(model.name)) is not None:
        return all(getattr(config, name) == getattr(known, name) for name in SIZES)
    own, spec = installed("wan_backbones", model.backbone, pm), config.spec()
    facts = ("target", "latent_space", "embedding_space", "text_dim", "in_channels", "image_dim", "image_tokens", "vace")
    return own is not None and all(getattr(own, name, None) == getattr(spec, name) for name in facts)


def _named(models: list[VideoModelSpec], words: set[str]) -> list[VideoModelSpec]:
    """Those whose name, but for what all names share, is among the words."""
    split = [_words(model.name) for model in models]
    shared = set.intersection(*split) if split else set()
    return [model for model, own in zip(models, split, strict=True) if own - shared <= words] if len(models) > 1 else models


def _words(name: str) -> set[str]:
    """`Wan2_1-T2V-1_3B` is {wan2.1, t2v, 1.3b}."""
    text = re.sub(r"(wan)[_-]?(\d)[._-](\d)", r"\1\2.\3", name.lower())
    text = re.sub(r"(?<![\d.])1_3b", "1.3b", text)
    return {word for word in re.split(r"[^a-z0-9.]+", text) if word}


def installed(kind: str, ref: str, pm: pluggy.PluginManager) -> Any:
    """The spec of a name, None where nothing offers it."""
    try:
        return find(kind, ref, pm)
    except LookupError:
        return None

"""Do parts fit together? Answered from specs alone, before any weight is read.

Tags come first: equal channels are not equal latents, and equal width is not equal embedding space.
"""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any

from ._shared.spec import UNKNOWN
from .plugins import discover, plugin_manager

if TYPE_CHECKING:
    import pluggy

# kind -> (field of the part, field of the backbone), in the order in which they are compared
_FIELDS = {
    "wan_vaes": (("latent_space", "latent_space"), ("latent_channels", "latent_channels"), ("stride", "stride")),
    "wan_text_encoders": (("embedding_space", "embedding_space"), ("embed_dim", "text_dim"), ("max_tokens", "text_len")),
    "wan_image_encoders": (("image_dim", "image_dim"),),
}


def check(backbone: Any, vae: Any, text: Any, image: Any = None, *, pm: pluggy.PluginManager | None = None) -> None:
    """Raise ValueError where the VAE, the text encoder or the image encoder does not fit the backbone.

    backbone, vae, text, image: specs, or anything with the same fields; image None is none
    The message says which field differs and which installed parts would fit.
    """
    parts = [("wan_vaes", vae), ("wan_text_encoders", text)]
    if image is not None and getattr(backbone, "image_dim", None) is not None:
        parts.append(("wan_image_encoders", image))
    for kind, part in parts:
        if problem := mismatch(kind, part, backbone):
            raise ValueError(
                f"{label(kind)} '{part.name}' does not fit backbone '{backbone.name}': {problem}; {_advice(kind, backbone, pm)}"
            )


def mismatch(kind: str, part: Any, backbone: Any) -> str:
    """The first field of `part` that does not fit, in words; empty where all do. A shorter text encoder fits."""
    for own, other in _FIELDS[kind]:
        if not hasattr(part, own):
            return f"it does not state its {own} (give it a spec)"
        got, expected = getattr(part, own), getattr(backbone, other)
        if own.endswith("_space") and UNKNOWN in (got, expected):
            return (
                f"its {own} is {got}, the backbone's is {expected}, and an unknown space equals none "
                f"(where they do belong together, write one name as '{own}' into the config.json that save_pretrained makes of each)"
            )
        if own == "max_tokens" and got > expected:
            return f"it makes up to {got} tokens, the backbone takes {expected}"
        if own != "max_tokens" and _plain(got) != _plain(expected):
            return f"its {own} is {got}, the backbone needs {expected}"
    return ""


def fitting(kind: str, backbone: Any, pm: pluggy.PluginManager | None = None) -> list[str]:
    """Names of the installed parts of `kind` that fit `backbone`, with their distribution where a name is offered twice."""
    offers = [offer for offer in discover(kind, pm or plugin_manager()) if offer.spec]
    count = Counter(offer.name for offer in offers)
    return [
        offer.name if count[offer.name] == 1 else f"{offer.dist}:{offer.name}"
        for offer in offers
        if not mismatch(kind, offer.spec, backbone)
    ]


def label(kind: str) -> str:
    """`wan_text_encoders` as people say it: `text encoder`."""
    return kind.removeprefix("wan_").removesuffix("s").replace("_", " ")


def _advice(kind: str, backbone: Any, pm: pluggy.PluginManager | None) -> str:
    names = fitting(kind, backbone, pm)
    return f"installed and fitting: {', '.join(names)}" if names else f"no installed {label(kind)} fits"


def _plain(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value

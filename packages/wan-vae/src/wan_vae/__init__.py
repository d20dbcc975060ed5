"""The Wan video VAE as a standalone codec: pixels to latents and back, and video files. Importing it imports no torch."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from .codec import VideoCodec as VideoCodec
    from .config import VAEConfig as VAEConfig
    from .model import WanVAE as WanVAE
    from .plugins import VAESpec as VAESpec
    from .plugins import hookimpl as hookimpl
    from .plugins import load_vae as load_vae

_EXPORTS = {
    "VAESpec": "wan_vae.plugins",
    "hookimpl": "wan_vae.plugins",
    "load_vae": "wan_vae.plugins",
    "WanVAE": "wan_vae.model",
    "VAEConfig": "wan_vae.config",
    "VideoCodec": "wan_vae.codec",
}
__all__ = list(_EXPORTS)


def __getattr__(name: str) -> Any:
    if name in _EXPORTS:
        return getattr(import_module(_EXPORTS[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*__all__, "__version__"]

"""The Wan video VAE as a standalone codec: pixels to latents and back, and video files. Importing it imports no torch."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ._shared.exports import exported

__version__ = "0.1.0"

if TYPE_CHECKING:
    from .codec import VideoCodec as VideoCodec
    from .config import VAEConfig as VAEConfig
    from .model import WanVAE as WanVAE
    from .plugins import VAESpec as VAESpec
    from .plugins import hookimpl as hookimpl
    from .plugins import load_vae as load_vae

_EXPORTS = {
    "VAESpec": "plugins",
    "hookimpl": "plugins",
    "load_vae": "plugins",
    "WanVAE": "model",
    "VAEConfig": "config",
    "VideoCodec": "codec",
}
__all__ = list(_EXPORTS)
__getattr__, __dir__ = exported(__name__, _EXPORTS, "__version__")

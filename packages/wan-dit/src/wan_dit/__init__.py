"""The Wan diffusion transformer, its schedulers and one video pipeline. Importing it imports no torch."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ._shared.exports import exported

__version__ = "0.1.0"

if TYPE_CHECKING:
    from .config import DiTConfig as DiTConfig
    from .model import WanDiT as WanDiT
    from .pipeline import Pipeline as Pipeline
    from .plugins import BackboneSpec as BackboneSpec
    from .plugins import SchedulerSpec as SchedulerSpec
    from .plugins import VideoModelSpec as VideoModelSpec
    from .plugins import hookimpl as hookimpl
    from .plugins import load_backbone as load_backbone

_EXPORTS = {
    "BackboneSpec": "plugins",
    "SchedulerSpec": "plugins",
    "VideoModelSpec": "plugins",
    "hookimpl": "plugins",
    "load_backbone": "plugins",
    "WanDiT": "model",
    "DiTConfig": "config",
    "Pipeline": "pipeline",
}
__all__ = list(_EXPORTS)
__getattr__, __dir__ = exported(__name__, _EXPORTS, "__version__")

"""The Wan diffusion transformer, its schedulers and one video pipeline. Importing it imports no torch."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

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
    "BackboneSpec": "wan_dit.plugins",
    "SchedulerSpec": "wan_dit.plugins",
    "VideoModelSpec": "wan_dit.plugins",
    "hookimpl": "wan_dit.plugins",
    "load_backbone": "wan_dit.plugins",
    "WanDiT": "wan_dit.model",
    "DiTConfig": "wan_dit.config",
    "Pipeline": "wan_dit.pipeline",
}
__all__ = list(_EXPORTS)


def __getattr__(name: str) -> Any:
    if name in _EXPORTS:
        return getattr(import_module(_EXPORTS[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*__all__, "__version__"]

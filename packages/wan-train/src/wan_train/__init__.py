"""Train, tune and evaluate Wan video models. Importing it imports no torch."""

from __future__ import annotations

from typing import TYPE_CHECKING

from wan_dit._shared.exports import exported

__version__ = "0.1.0"

if TYPE_CHECKING:
    from .config import TrainConfig as TrainConfig
    from .plugins import DatasetSpec as DatasetSpec
    from .plugins import ObjectiveSpec as ObjectiveSpec
    from .plugins import hookimpl as hookimpl
    from .trainer import Trainer as Trainer

_EXPORTS = {
    "ObjectiveSpec": "plugins",
    "DatasetSpec": "plugins",
    "hookimpl": "plugins",
    "Trainer": "trainer",
    "TrainConfig": "config",
}
__all__ = list(_EXPORTS)
__getattr__, __dir__ = exported(__name__, _EXPORTS, "__version__")

"""Train, tune and evaluate Wan video models. Importing it imports no torch."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from .config import TrainConfig as TrainConfig
    from .plugins import DatasetSpec as DatasetSpec
    from .plugins import ObjectiveSpec as ObjectiveSpec
    from .plugins import hookimpl as hookimpl
    from .trainer import Trainer as Trainer

_EXPORTS = {
    "ObjectiveSpec": "wan_train.plugins",
    "DatasetSpec": "wan_train.plugins",
    "hookimpl": "wan_train.plugins",
    "Trainer": "wan_train.trainer",
    "TrainConfig": "wan_train.config",
}
__all__ = list(_EXPORTS)


def __getattr__(name: str) -> Any:
    if name in _EXPORTS:
        return getattr(import_module(_EXPORTS[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*__all__, "__version__"]

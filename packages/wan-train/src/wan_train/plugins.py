"""The kinds `wan_objectives` and `wan_datasets`: hooks, spec records and lookups. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from wan_dit._shared.discover import PluginManager as PluginManager
from wan_dit._shared.discover import discover as discover
from wan_dit._shared.discover import hookimpl as hookimpl
from wan_dit._shared.discover import hookspec, resolve
from wan_dit._shared.discover import plugin_manager as _plugin_manager
from wan_dit._shared.spec import Spec

if TYPE_CHECKING:
    import pluggy


@dataclass(frozen=True)
class ObjectiveSpec(Spec):
    """A training objective: `target(settings, dataset, folder, device, pm)` returns a wan_train.contracts.Objective."""


@dataclass(frozen=True)
class DatasetSpec(Spec):
    """A captioned video data set: `target(**settings)` returns an object that satisfies wan_train.contracts.Dataset."""


class Hooks:
    """What a plugin of these kinds implements."""

    @hookspec
    def wan_objectives(self) -> Iterable[ObjectiveSpec]:  # type: ignore[empty-body]
        """Training objectives, as specs."""

    @hookspec
    def wan_datasets(self) -> Iterable[DatasetSpec]:  # type: ignore[empty-body]
        """Data sets, as specs."""


def plugin_manager() -> PluginManager:
    """A fresh manager with every installed plugin, those of the sibling packages included."""
    return _plugin_manager(Hooks)


def find(kind: str, ref: str, pm: pluggy.PluginManager | None = None) -> Any:
    """The spec of `kind` that a path, name, Hub id or import string names; LookupError says what is installed."""
    return resolve(kind, ref, pm or plugin_manager())

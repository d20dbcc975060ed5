"""The kind `wan_text_encoders`: its hook, its spec record and the lookup. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ._shared.discover import PluginManager as PluginManager
from ._shared.discover import discover as discover
from ._shared.discover import hookimpl as hookimpl
from ._shared.discover import hookspec, resolve
from ._shared.discover import plugin_manager as _plugin_manager
from ._shared.spec import ModelSpec

if TYPE_CHECKING:
    import pluggy


@dataclass(frozen=True)
class TextEncoderSpec(ModelSpec):
    """A text encoder.

    embedding_space: tag of the space; equal width is not equal space (`"umt5-xxl"`, `"tiny-1"`)
    embed_dim: width of a context token
    max_tokens: longest context, the end token included
    """

    embedding_space: str
    embed_dim: int
    max_tokens: int


class Hooks:
    """What a plugin of this kind implements."""

    @hookspec
    def wan_text_encoders(self) -> Iterable[TextEncoderSpec]:  # type: ignore[empty-body]
        """Text encoders, as specs."""


def plugin_manager() -> PluginManager:
    """A fresh manager with every installed plugin."""
    return _plugin_manager(Hooks)


def find_text_encoder(ref: str, pm: pluggy.PluginManager | None = None) -> TextEncoderSpec:
    """The spec that a path, name, Hub id or import string names; LookupError says what is installed."""
    spec: TextEncoderSpec = resolve("wan_text_encoders", ref, pm or plugin_manager(), install="wan-text")
    return spec


def load_text_encoder(ref: str = "wan-text:tiny", *, dtype: Any = None, device: Any = None, pm: pluggy.PluginManager | None = None) -> Any:
    """Load a text encoder with its tokenizer by path, name, Hub id or import string, in eval mode.

    Example: `load_text_encoder("tiny").encode(["a red circle"])` is a list with one tensor `[L, D]`.
    """
    return find_text_encoder(ref, pm).load(dtype=dtype, device=device)

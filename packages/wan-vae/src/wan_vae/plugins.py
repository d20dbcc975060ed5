"""The kind `wan_vaes`: its hook, its spec record and the lookup. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
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
class VAESpec(ModelSpec):
    """A video VAE.

    latent_space: tag of the space; parts with one tag are interchangeable (`"wan2.1"`, `"wan2.2"`, `"tiny-2"`)
    latent_channels: channels of a latent
    stride: pixels per latent in (time, height, width); T frames become 1 + (T - 1) / stride[0] latent frames
    parameters: how many it has, None where that is not known; no part of what it is
    """

    latent_space: str
    latent_channels: int
    stride: tuple[int, int, int]
    parameters: int | None = field(default=None, kw_only=True, compare=False)


class Hooks:
    """What a plugin of this kind implements."""

    @hookspec
    def wan_vaes(self) -> Iterable[VAESpec]:  # type: ignore[empty-body]
        """Video VAEs, as specs."""


def plugin_manager() -> PluginManager:
    """A fresh manager with every installed plugin."""
    return _plugin_manager(Hooks)


def find_vae(ref: str, pm: pluggy.PluginManager | None = None) -> VAESpec:
    """The spec that a path, name, Hub id or import string names; LookupError says what is installed."""
    spec: VAESpec = resolve("wan_vaes", ref, pm or plugin_manager(), install="wan-vae")
    return spec


def load_vae(ref: str = "wan-vae:tiny", *, dtype: Any = None, device: Any = None, pm: pluggy.PluginManager | None = None) -> Any:
    """Load a VAE by path, name, Hub id or import string, in eval mode.

    Example: `load_vae("wan2.1", device="cuda").encode(video)` with video `[B, 3, T, H, W]` in [-1, 1].
    """
    return find_vae(ref, pm).load(dtype=dtype, device=device)

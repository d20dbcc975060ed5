"""The model that a pipeline is asked for: an installed one by name, or one on disk or on the Hub."""

from __future__ import annotations

import os
import re
from collections.abc import Collection
from pathlib import Path

from ._shared.weights import locate
from .plugins import PluginManager, VideoModelSpec, discover, find
from .sources import FoundModel, open_model

HUB_ID = re.compile(r"(hub:)?[\w.-]+/[\w.-]+(@[\w.-]+)?(/[\w./-]+)?")


def find_model(
    model: str | os.PathLike[str] | VideoModelSpec, preset: str | None, pm: PluginManager, *, given: Collection[str] = ()
) -> FoundModel:
    """A model with the parts that were found for it; an installed name comes first, then a path, then a repository on the Hub.

    given: parts that are not looked for, since the caller has others
    Raises LookupError, FileNotFoundError or ValueError that says what there is.
    """
    if isinstance(model, VideoModelSpec) or not isinstance(model, str | os.PathLike):
        return FoundModel(model, {}, [])
    ref = os.fspath(model)
    named = is_installed(ref, pm)
    if not named and Path(ref).exists():
        return open_model(Path(ref), preset, pm, given=given)
    if not named and HUB_ID.fullmatch(ref) and ref[0] != ".":
        return open_model(locate(f"hub:{ref.removeprefix('hub:')}"), preset, pm, given=given)
    if preset is not None:
        raise ValueError(f"preset is for a model on disk, and '{ref}' is an installed model with settings of its own")
    return FoundModel(find("wan_models", ref, pm), {}, [])


def is_installed(model: str, pm: PluginManager) -> bool:
    """Whether a package offers a model of this name."""
    return any(offer.spec and model in (offer.name, f"{offer.dist}:{offer.name}") for offer in discover("wan_models", pm))

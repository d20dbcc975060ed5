"""Where the weights of a spec are now, told from paths alone: nothing is imported, read or fetched."""

from __future__ import annotations

import os
from importlib.util import find_spec
from pathlib import Path

BUILT_IN, CACHED, TO_BE_FETCHED, ON_DISK, NONE, MISSING = (
    "built in", "in the Hub cache", "to be fetched", "on disk", "none", "missing",
)  # fmt: skip
WEIGHTS = (".safetensors", ".pth", ".pt", ".bin", ".ckpt")


def weights_state(weights: str | None) -> str:
    """`BUILT_IN`, `CACHED`, `TO_BE_FETCHED`, `ON_DISK`, `NONE`, or `MISSING` for a path that is not there."""
    if weights is None:
        return NONE
    if weights.startswith("pkg:"):
        package, _, inner = weights.removeprefix("pkg:").partition("/")
        found = find_spec(package)
        roots = (found.submodule_search_locations or []) if found else []
        return BUILT_IN if any((Path(root) / inner).exists() for root in roots) else MISSING
    if weights.startswith("hub:"):
        return CACHED if _cached(weights.removeprefix("hub:")) else TO_BE_FETCHED
    return ON_DISK if Path(weights).exists() else MISSING


def _cached(text: str) -> bool:
    """Whether the Hub cache has `org/repo[@revision][/path]`: that file, or any weights of that repository."""
    org, _, rest = text.partition("/")
    repo, _, inner = rest.partition("/")
    repo, _, revision = repo.partition("@")
    folder = _cache() / f"models--{org}--{repo}"
    named = folder / "refs" / (revision or "main")
    snapshot = folder / "snapshots" / (named.read_text().strip() if named.is_file() else revision or "main")
    if inner:
        return (snapshot / inner).exists()
    return snapshot.is_dir() and any(file.suffix in WEIGHTS for file in snapshot.rglob("*"))


def _cache() -> Path:
    """The folder that huggingface_hub keeps its cache in."""
    home = os.environ.get("HF_HOME") or os.path.join(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "huggingface")
    found = os.environ.get("HF_HUB_CACHE") or os.environ.get("HUGGINGFACE_HUB_CACHE") or os.path.join(home, "hub")
    return Path(os.path.expandvars(found)).expanduser()

"""Take a part by its spec and make it trainable: as it is, or with fresh weights and a changed architecture."""

from __future__ import annotations

from typing import Any


def fresh(spec: Any, init: str, architecture: dict[str, Any], device: str) -> Any:
    """The part of `spec` in training mode.

    init: `pretrained` keeps its weights, `random` draws new ones (and lets `architecture` change fields of its config)
    Raises ValueError for another `init`, or an architecture for pretrained weights.
    """
    if init not in ("random", "pretrained") or (init == "pretrained" and architecture):
        raise ValueError(f"init = '{init}' with architecture {architecture}: use 'random' (any architecture) or 'pretrained' (its own)")
    part = spec.load(device=device)
    if init == "random":
        part = part.reinitialised(**architecture)
    return part.to(device).train().requires_grad_(True)

"""LoRA and its relatives, from every format that they are published in: read, applied with a ledger, taken off, written.

Importing it imports no torch.

Example:
    >>> from wan_dit.lora import LoraSpec, apply
    >>> applied = apply(backbone, [LoraSpec("style.safetensors", strength=0.8)], mode="live")
    >>> print(applied.ledger.summary())
    style.safetensors: 480 of 480 keys applied
    >>> applied.set_strength(0.5)
    >>> applied.remove()
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .apply import AppliedLoras as AppliedLoras
    from .apply import apply as apply
    from .export import export as export
    from .ledger import Ledger as Ledger
    from .match import match as match
    from .read import Lora as Lora
    from .read import load_lora as load_lora
    from .reference import LoraSpec as LoraSpec
    from .reference import parse_lora as parse_lora

_EXPORTS = {
    "AppliedLoras": "wan_dit.lora.apply",
    "Ledger": "wan_dit.lora.ledger",
    "Lora": "wan_dit.lora.read",
    "LoraSpec": "wan_dit.lora.reference",
    "apply": "wan_dit.lora.apply",
    "export": "wan_dit.lora.export",
    "load_lora": "wan_dit.lora.read",
    "match": "wan_dit.lora.match",
    "parse_lora": "wan_dit.lora.reference",
}
__all__ = list(_EXPORTS)


def __getattr__(name: str) -> Any:
    if name in _EXPORTS:
        return getattr(import_module(_EXPORTS[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__

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
    from .applied import AppliedLoras as AppliedLoras
    from .applied import apply as apply
    from .ledger import Ledger as Ledger
    from .matching import match as match
    from .read import Lora as Lora
    from .read import load_lora as load_lora
    from .reference import LoraSpec as LoraSpec
    from .reference import parse_lora as parse_lora
    from .write import export as export

_EXPORTS = {
    "AppliedLoras": "wan_dit.lora.applied",
    "Ledger": "wan_dit.lora.ledger",
    "Lora": "wan_dit.lora.read",
    "LoraSpec": "wan_dit.lora.reference",
    "apply": "wan_dit.lora.applied",
    "export": "wan_dit.lora.write",
    "load_lora": "wan_dit.lora.read",
    "match": "wan_dit.lora.matching",
    "parse_lora": "wan_dit.lora.reference",
}
__all__ = list(_EXPORTS)


def __getattr__(name: str) -> Any:
    if name in _EXPORTS:
        return getattr(import_module(_EXPORTS[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__

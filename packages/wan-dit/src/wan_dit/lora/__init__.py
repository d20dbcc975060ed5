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

from typing import TYPE_CHECKING

from .._shared.exports import exported

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
    "AppliedLoras": "applied",
    "Ledger": "ledger",
    "Lora": "read",
    "LoraSpec": "reference",
    "apply": "applied",
    "export": "write",
    "load_lora": "read",
    "match": "matching",
    "parse_lora": "reference",
}
__all__ = list(_EXPORTS)
__getattr__, __dir__ = exported(__name__, _EXPORTS)

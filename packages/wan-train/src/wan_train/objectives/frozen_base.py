"""A backbone that stays as it is while adapters or its context embedder are trained, in a type of its own, in part on the host."""

from __future__ import annotations

from typing import Any, Literal

import torch
from wan_dit._shared.quantised import TYPES
from wan_dit.plugins import load_spec

from ..frozen import freeze_linears
from .trained import check_wan

Base = Literal["fp32", "bf16", "fp8", "int8"]


def load_base(spec: Any, base: Base, swap: int, device: str, train: str) -> Any:
    """The backbone of `spec`, without gradients, in training mode.

    base: type of its weights; in 8 bits those of the blocks' linear layers, and the rest as a generation has it: bf16 on a GPU, fp32
    on a CPU
    swap: blocks whose weights wait in the host's memory and are brought to the device for a forward and for a backward; the device
    never holds the whole
    train: what is trained, for messages
    ValueError where that is asked of a backbone that is no Wan's, and for more blocks than there are.
    """
    wide = torch.float32 if base == "fp32" or (base in TYPES and torch.device(device).type == "cpu") else torch.bfloat16
    packed = base if base in TYPES else None
    backbone = load_spec(spec, dtype=wide, device="cpu" if swap else device, quantise=packed)
    if swap or packed:
        check_wan(backbone, train)
        freeze_linears(backbone, device, swap)
    return backbone.train().requires_grad_(False)

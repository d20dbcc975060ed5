"""The states of the global random generators of one process, as plain values.

What a run draws is keyed by seed, step and sample (wan_train.randomness) and needs none of them; these are for code that draws
from the global generators, such as dropout.
"""

from __future__ import annotations

import base64
import random
from typing import Any

import numpy as np
import torch


def rng_states() -> dict[str, Any]:
    """Of torch on the CPU and on this process's accelerator, of `random` and of numpy."""
    kind, keys, *rest = np.random.get_state(legacy=True)
    return {
        "torch": _text(torch.get_rng_state()),
        "accelerator": _text(torch.get_device_module().get_rng_state()) if torch.accelerator.is_available() else None,
        "random": [list(part) if isinstance(part, tuple) else part for part in random.getstate()],
        "numpy": [kind, np.asarray(keys).tolist(), *rest],
    }


def restore_rng(states: dict[str, Any]) -> None:
    """Go on drawing where `rng_states` was taken."""
    torch.set_rng_state(_tensor(states["torch"]))
    if states["accelerator"] is not None and torch.accelerator.is_available():
        torch.get_device_module().set_rng_state(_tensor(states["accelerator"]))
    version, inner, gauss = states["random"]
    random.setstate((version, tuple(inner), gauss))
    kind, keys, *rest = states["numpy"]
    np.random.set_state((kind, np.array(keys, dtype=np.uint32), *rest))


def _text(state: torch.Tensor) -> str:
    return base64.b64encode(state.cpu().numpy().tobytes()).decode()


def _tensor(text: str) -> torch.Tensor:
    return torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.uint8)

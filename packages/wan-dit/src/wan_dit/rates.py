"""How fast this device multiplies matrices and attends, measured in about a second."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

from .attention import sdpa
from .run_plan import Rates

ENOUGH = 0.15  # seconds of one measurement
LARGEST = 8192  # rows of a matrix, tokens


def measure(device: torch.device, dtype: torch.dtype, head_dim: int = 128) -> Rates:
    """The best of growing sizes, until one takes long enough to be timed."""

    def products(n: int) -> Callable[[], object]:
        a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
        return lambda: a @ b

    def attention(n: int) -> Callable[[], object]:
        q, k, v = (torch.randn(1, n, 8, head_dim, device=device, dtype=dtype) for _ in range(3))
        return lambda: sdpa(q, k, v)

    return Rates(_best(products, lambda n: 2 * n**3, device), _best(attention, lambda n: 4 * 8 * head_dim * n**2, device))


@torch.no_grad()
def _best(make: Callable[[int], Callable[[], object]], operations: Callable[[int], int], device: torch.device) -> float:
    best, size, seconds = 0.0, 512, 0.0
    while size <= LARGEST and seconds < ENOUGH:
        run = make(size)
        run()
        _wait(device)
        for _ in range(3):
            began = time.perf_counter()
            run()
            _wait(device)
            seconds = time.perf_counter() - began
            best = max(best, operations(size) / seconds)
        size *= 2
    return best


def _wait(device: torch.device) -> None:
    if device.type in ("cuda", "mps"):
        getattr(torch, device.type).synchronize()

"""What autograd really keeps of a block, found by hooks on saved tensors; no numbers are computed, so any size is quick."""

from __future__ import annotations

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from wan_dit.config import DiTConfig
from wan_dit.contracts import KeysValues
from wan_dit.model import Block

from .job import Precision

TOKENS = 8192  # enough that rows of weights do not count


class Saved:
    """Bytes of the tensors that autograd keeps inside it, views once, `known` ones not."""

    def __init__(self, known: list[Tensor]) -> None:
        self._known = {tensor.untyped_storage()._cdata for tensor in known}
        self._kept: dict[int, Tensor] = {}  # alive, so that no other storage gets its place
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, lambda tensor: tensor)

    def __enter__(self) -> Saved:
        self._hooks.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self._hooks.__exit__(*error)

    @property
    def size(self) -> int:
        return sum(tensor.untyped_storage().nbytes() for tensor in self._kept.values())

    def _pack(self, tensor: Tensor) -> Tensor:
        key = tensor.untyped_storage()._cdata
        if key not in self._known:
            self._kept.setdefault(key, tensor)
        return tensor


def block_bytes_per_token(config: DiTConfig, precision: Precision, *, per_sample: bool = False) -> float:
    """Of a block of `wan_dit.model`, weights and what the prompt gives apart; what grows with the tokens alone."""
    small, large = (_kept(config, precision, count, per_sample) for count in (TOKENS, 2 * TOKENS))
    return (large - small) / TOKENS


def gamma(config: DiTConfig, precision: Precision) -> float:
    """Bytes a token and channel: 73 for the 14B model in bf16."""
    return block_bytes_per_token(config, precision) / config.dim


def _kept(config: DiTConfig, precision: Precision, count: int, per_sample: bool) -> int:
    weights = torch.bfloat16 if precision == "bf16" else torch.float32
    numbers = torch.float32 if precision == "fp32" else torch.bfloat16
    samples, default = 1 + per_sample, torch.get_default_dtype()
    with FakeTensorMode(allow_non_fake_inputs=True):
        torch.set_default_dtype(weights)
        try:
            block = Block(config)
        finally:
            torch.set_default_dtype(default)
        x_BLD = torch.randn(samples, count // samples, config.dim, requires_grad=True)
        rope_LP = torch.randn(count // samples, config.head_dim // 2, dtype=torch.complex64)
        modulation_R6D = torch.randn(samples, 6, config.dim, requires_grad=True)
        rows_BL = torch.arange(samples)[:, None]
        shape = samples, config.text_len, config.num_heads, config.head_dim
        key, value = (torch.randn(shape, dtype=numbers, requires_grad=True) for _ in range(2))
        known = [*block.parameters(), rope_LP, modulation_R6D, rows_BL, key, value]
        with Saved(known) as saved, torch.autocast("cpu", torch.bfloat16, enabled=precision == "autocast"):
            out = block(x_BLD, rope_LP, modulation_R6D, rows_BL, KeysValues(key, value), None)
        del out
        return saved.size

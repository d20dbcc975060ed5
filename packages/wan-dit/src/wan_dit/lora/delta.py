"""What a file adds to one tensor, and how it is computed: LoRA, LoHa, LoKr (LyCORIS, arXiv 2309.14859) and plain differences.

Strengths multiply it from outside; `alpha / rank` is within. The matrix is always computed in float32.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from .formats import Place
from .reference import Expert

Kind = Literal["lora", "loha", "lokr", "diff"]
Parts = Mapping[str, Tensor]


@dataclass(frozen=True)
class Delta:
    """A change of one tensor of one layer.

    module: the layer's name in the file, without prefix; flat: its dots are underscores
    place: which of the layer's tensors
    parts: tensors by what they are, as in the file; keys: their names there, and that of alpha
    scale: alpha / rank, or what the format says instead
    expert: the expert it is of, None where the file does not tell
    """

    module: str
    place: Place
    kind: Kind
    parts: Parts
    keys: tuple[str, ...]
    scale: float = 1.0
    alpha: float | None = None
    flat: bool = False
    expert: Expert | None = None

    @property
    def rank(self) -> int | None:
        return rank(self.kind, self.parts)

    def matrix(self, device: torch.device | str | None = None) -> Tensor:
        """The change in float32, `[O, I]` with the axes of a kernel folded into I, or as a difference stands in the file."""
        return _matrix(self.kind, {name: part.to(device or part.device, torch.float32) for name, part in self.parts.items()})

    def misfit(self, shape: tuple[int, ...]) -> str | None:
        """Why it cannot be added to a tensor of this shape; None where it can. Computes nothing."""
        own = ", ".join(f"{name} {list(part.shape)}" for name, part in self.parts.items())
        try:
            found = tuple(self.matrix("meta").shape)
        except (RuntimeError, IndexError):
            return f"its parts do not go together: {own}"
        if self.kind == "diff":
            fits = [n for n in found if n > 1] == [n for n in shape if n > 1]
        else:
            fits = found == (shape[0], math.prod(shape[1:]))
        return None if fits else f"it changes {list(found)}, the tensor is {list(shape)} ({own})"


def rank(kind: Kind, parts: Parts) -> int | None:
    """The inner width of the factors; None of a difference and of LoKr with two whole factors, which alpha does not scale."""
    name = {"lora": "down", "loha": "hada_w1_b", "lokr": "lokr_w2_b" if "lokr_w2_b" in parts else "lokr_w1_b", "diff": ""}[kind]
    return parts[name].shape[0] if name in parts else None


def product(kind: Kind, parts: Parts, x: Tensor) -> Tensor:
    """`[..., I]` times the transposed matrix of a linear layer, through the factors where that is less work."""
    if kind == "lora":
        return F.linear(F.linear(x, parts["down"].flatten(1)), parts["up"].flatten(1))
    if kind == "lokr":
        first, second = _kronecker_factors(parts)
        columns = F.linear(x.unflatten(-1, (first.shape[1], -1)), second)
        return F.linear(columns.transpose(-1, -2), first).transpose(-1, -2).flatten(-2)
    return F.linear(x, _matrix(kind, parts))


def _matrix(kind: Kind, parts: Parts) -> Tensor:
    if kind == "lora":
        return parts["up"].flatten(1) @ parts["down"].flatten(1)
    if kind == "loha":
        return _factor(parts, "hada_w1_a", "hada_w1_b", "hada_t1") * _factor(parts, "hada_w2_a", "hada_w2_b", "hada_t2")
    if kind == "lokr":
        return torch.kron(*_kronecker_factors(parts))
    return parts["diff"]


def _kronecker_factors(parts: Parts) -> tuple[Tensor, Tensor]:
    first = parts["lokr_w1"] if "lokr_w1" in parts else parts["lokr_w1_a"] @ parts["lokr_w1_b"]
    second = parts["lokr_w2"] if "lokr_w2" in parts else _factor(parts, "lokr_w2_a", "lokr_w2_b", "lokr_t2")
    return first, second.flatten(1).contiguous()  # torch.kron takes no other


def _factor(parts: Parts, a: str, b: str, core: str) -> Tensor:
    """`a @ b`, or with the core of a Tucker decomposition `[R, R, kernel...]` between `a` `[R, O]` and `b` `[R, I]`."""
    if core in parts:
        return torch.einsum("ij...,jr,ip->pr...", parts[core], parts[b], parts[a]).flatten(1)
    return parts[a] @ parts[b].flatten(1)

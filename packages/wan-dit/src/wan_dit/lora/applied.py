"""LoRAs on a model: merged into its weights, or live beside them; strengths can change, and they can be taken off again.

Live, the weight of a linear layer is never read or written: a forward hook adds the low-rank product, so that quantised layers
work too. What is no such weight (norms, biases, modulation, patch embedding) is small, and is merged in either mode.

Keys and values of a prompt are computed by `encode_context`: encode again after a change. What `torch.compile` made is compiled
again when live LoRAs come or go, and once when a strength first changes.
"""

from __future__ import annotations

import sys
import warnings
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from ..layers import autocast_off
from .delta import Delta, product
from .ledger import STATUSES, UNMATCHED, Ledger
from .matching import Match, check_some, match, merged_ledger
from .read import Lora, load_lora
from .reference import EXPERTS, Expert, LoraSpec, parse_lora

Mode = Literal["merge", "live"]
OnUnmatched = Literal["strict", "warn"]
WRITABLE = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


class _Term:
    """A delta, with the strength of its file."""

    def __init__(self, delta: Delta, strengths: list[float], i: int) -> None:
        self.delta, self._strengths, self._i = delta, strengths, i
        self._cast: dict[tuple[torch.device, torch.dtype], dict[str, Tensor]] = {}

    @property
    def weight(self) -> float:
        return self._strengths[self._i] * self.delta.scale

    def product(self, x: Tensor) -> Tensor:
        """`x` times the change of a linear layer, in the type of `x`."""
        place = x.device, x.dtype
        if place not in self._cast:
            self._cast = {place: {name: part.to(*place) for name, part in self.delta.parts.items()}}
        return product(self.delta.kind, self._cast[place], x)


class _LiveLinear:
    """The forward hook of a linear layer: adds what its LoRAs make of the input, in the type of the output."""

    def __init__(self, terms: Sequence[_Term]) -> None:
        self.terms = terms

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        with autocast_off(output.device):
            x = args[0].to(output.dtype)
            for term in self.terms:
                if term.weight:
                    output = torch.add(output, term.product(x), alpha=term.weight)
        return output


class AppliedLoras:
    """The LoRAs that one call of `apply` put on a model.

    ledger: the account of every key of every file
    strengths: one a LoRA, in the order given
    """

    def __init__(self, model: nn.Module, ledger: Ledger, strengths: list[float], mode: Mode, removable: bool) -> None:
        self.ledger, self._strengths, self._mode = ledger, strengths, mode
        self._model, self._removable = model, removable
        self._hooks: list[Any] = []
        self._merged: dict[str, list[_Term]] = {}
        self._originals: dict[str, Tensor] = {}
        self._written: dict[str, int] = {}

    @property
    def strengths(self) -> tuple[float, ...]:
        return tuple(self._strengths)

    def set_strength(self, strength: float, lora: int = 0) -> None:
        """Change the strength of a LoRA, by its place in the list that was applied; at once, to what it would have been."""
        self._check_removable("change the strength of")
        self._strengths[lora] = LoraSpec("", strength).strength
        self._write()

    def remove(self) -> None:
        """Take the LoRAs off: every weight is again what it was, bit for bit."""
        self._check_removable("remove")
        for hook in self._hooks:
            hook.remove()
        _compile_again(self._hooks)
        with torch.no_grad():
            for name, original in self._originals.items():
                self._model.get_parameter(name).copy_(original)
        self._hooks, self._merged, self._originals, self._written = [], {}, {}, {}

    def _check_removable(self, action: str) -> None:
        if not self._removable:
            raise ValueError(f"cannot {action} merged LoRAs: the weights were not kept; apply them with removable=True or mode='live'")
        for name, checksum in self._written.items():
            if _checksum(self._model.get_parameter(name)) != checksum:
                raise ValueError(f"cannot {action} these LoRAs: '{name}' was changed since; take off what was applied later first")

    def _put(self, terms: dict[str, list[_Term]]) -> None:
        for name, found in terms.items():
            if self._mode == "live" and (layer := _linear(self._model, name)):
                self._hooks.append(layer.register_forward_hook(_LiveLinear(found)))
            else:
                self._merged[name] = found
        _compile_again(self._hooks)
        if self._removable:
            self._originals = {name: self._model.get_parameter(name).detach().clone() for name in self._merged}
        self._write()

    @torch.no_grad()
    def _write(self) -> None:
        for name, terms in self._merged.items():
            weight = self._model.get_parameter(name)
            changed = self._originals.get(name, weight).to(torch.promote_types(weight.dtype, torch.float32), copy=True)
            for term in terms:
                if term.weight:
                    changed.add_(term.delta.matrix(weight.device).reshape(weight.shape), alpha=term.weight)
            weight.copy_(changed)
            if self._removable:
                self._written[name] = _checksum(weight)


def apply(
    model: nn.Module,
    loras: Sequence[LoraSpec | Lora | str | Path],
    *,
    mode: Mode = "merge",
    on_unmatched: OnUnmatched = "strict",
    expert: Expert | None = None,
    removable: bool = False,
) -> AppliedLoras:
    """Put LoRAs on a model: W + sum of strength * alpha / rank * B @ A, in float32, rounded once to the type of the weight.

    loras: specs, loaded LoRAs, paths, or references as on the command line (`style.safetensors:0.8:high`)
    mode: `"merge"` writes the weights: no cost afterwards; `"live"` leaves them and adds the product in every forward
    on_unmatched: `"strict"` raises ValueError where a key finds no place, before anything is changed; `"warn"` warns once;
    a LoRA of which nothing fits is an error in both
    expert: which model of Wan2.2 A14B this is, `"high"` or `"low"`; LoRAs of the other one are left out
    removable: keep the weights that merging changes, in memory, so that strengths can change and `remove` restores them;
    always so in live mode, where they are few
    """
    for given, known in ((mode, get_args(Mode)), (on_unmatched, get_args(OnUnmatched)), (expert, (*EXPERTS, None))):
        if given not in known:
            raise ValueError(f"'{given}' is not one of {', '.join(map(str, known))}")
    specs = [_spec(lora) for lora in loras]
    if expert is None and any(spec.expert for spec in specs):
        raise ValueError("a LoRA is for one expert of Wan2.2 A14B, and this model is not said to be any: give expert='high' or 'low'")
    specs = [spec for spec in specs if spec.expert in (None, expert)]
    strengths = [spec.strength for spec in specs]
    terms: dict[str, list[_Term]] = defaultdict(list)
    matches = []
    for i, spec in enumerate(specs):
        lora = spec.lora if isinstance(spec.lora, Lora) else load_lora(spec.lora)
        matches.append(match(model, lora, expert))
        check_some(model, lora, matches[-1], expert)
        for name, delta in matches[-1].pairs:
            terms[name].append(_Term(delta, strengths, i))
    ledger = _checked(matches, on_unmatched)
    applied = AppliedLoras(model, ledger, strengths, mode, removable or mode == "live")
    _check_writable(model, terms, mode)
    applied._put(terms)
    return applied


def _spec(lora: LoraSpec | Lora | str | Path) -> LoraSpec:
    if isinstance(lora, str):
        return parse_lora(lora)
    return lora if isinstance(lora, LoraSpec) else LoraSpec(lora)


def _checked(matches: Sequence[Match], on_unmatched: OnUnmatched) -> Ledger:
    ledger = merged_ledger(matches)
    if ledger.unmatched and on_unmatched == "strict":
        lines = "; ".join(ledger.lines(*UNMATCHED))
        raise ValueError(f"not every key fits the model, nothing was changed: {lines}; on_unmatched='warn' takes the rest")
    if len(ledger.of("applied")) < len(ledger.entries) and on_unmatched == "warn":
        warnings.warn("; ".join(ledger.lines(*STATUSES[1:])), stacklevel=3)
    return ledger


def _check_writable(model: nn.Module, terms: dict[str, list[_Term]], mode: Mode) -> None:
    for name in terms:
        if mode == "live" and _linear(model, name):
            continue
        owner, _, leaf = name.rpartition(".")
        weight = getattr(model.get_submodule(owner), leaf, None)
        if not isinstance(weight, nn.Parameter) or weight.dtype not in WRITABLE:
            kind = str(weight.dtype) if isinstance(weight, nn.Parameter) else "packed"
            raise ValueError(f"'{name}' is {kind}: a LoRA cannot be merged into it without loss, apply it with mode='live'")
        if weight.is_meta:
            raise ValueError(f"'{name}' is on the meta device and has no numbers: load it first, or use mode='live' where it is offloaded")


def _linear(model: nn.Module, name: str) -> nn.Module | None:
    """The linear layer, packed or not, whose weight has this name; None where it is another tensor."""
    owner, _, leaf = name.rpartition(".")
    layer = model.get_submodule(owner)
    return layer if leaf == "weight" and hasattr(layer, "in_features") else None


def _compile_again(hooks: Sequence[Any]) -> None:
    """Drop compiled code, where there is any: torch takes no notice of hooks that come or go afterwards."""
    if hooks and "torch._dynamo" in sys.modules:
        torch.compiler.reset()


def _checksum(weight: Tensor) -> int:
    """Tells whether a tensor was written since; not whether someone meant to deceive."""
    flat = weight.detach().contiguous().view(-1)
    return int(flat.view(torch.int16 if flat.element_size() == 2 else torch.int32).sum(dtype=torch.int64))

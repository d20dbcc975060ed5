"""What a resume needs, as a state of the store: keyed by the names of parameters, so that any layout of processes reads it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from ..copies import named
from .exportable import describe

Views = Iterable[tuple[Tensor, Tensor]]


def training_state(
    modules: Mapping[str, nn.Module],
    optimisers: Sequence[Optimizer] = (),
    *,
    ema: Mapping[str, Mapping[str, Tensor]] | None = None,
    values: Mapping[str, Any] | None = None,
    views: Views = (),
) -> dict[str, Any]:
    """Weights, state of the optimisers, averaged weights, what the modules are, and `values`: step, sampler position, schedule.

    It is both what is saved and what is loaded into: it holds the tensors themselves, so `Store.load` fills modules, optimisers
    and averages in place, and `restore` does the rest. Parameters that an optimiser has not stepped yet get their state here, all zero.
    ema: module -> averaged tensors by name; views: of a parameter, the tensor that an optimiser holds in its place
    Raises ValueError where an optimiser holds a tensor that is of none of the modules.
    """
    state: dict[str, Any] = {"modules": {name: named(module) for name, module in modules.items()}, "parts": describe(modules)}
    names = {id(value): f"{name}.{key}" for name, inner in state["modules"].items() for key, value in inner.items()}
    names |= {id(view): names[id(parameter)] for parameter, view in views if id(parameter) in names}
    state["optimisers"] = [_optimiser_state(optimiser, names) for optimiser in optimisers]
    state["ema"] = {name: dict(averaged) for name, averaged in (ema or {}).items()}
    return {**state, "values": dict(values or {})}


def restore(state: Mapping[str, Any], optimisers: Sequence[Optimizer] = ()) -> dict[str, Any]:
    """After `Store.load`: give the optimisers their plain values, such as rates; returns the `values` of the state."""
    for optimiser, loaded in zip(optimisers, state["optimisers"], strict=True):
        for group, facts in zip(optimiser.param_groups, loaded["groups"], strict=True):
            group |= facts
        for own, facts in zip(_states(optimiser), loaded["state"].values(), strict=True):
            own |= {key: fact for key, fact in facts.items() if not isinstance(fact, dict)}
    values: dict[str, Any] = state["values"]
    return values


def _optimiser_state(optimiser: Optimizer, names: Mapping[int, str]) -> dict[str, Any]:
    """By names and not, as torch does it, by numbers; one flat optimiser over several modules is as good as one of each."""
    parameters = [parameter for group in optimiser.param_groups for parameter in group["params"]]
    if fresh := [parameter for parameter in parameters if parameter not in optimiser.state]:
        _initialise(optimiser, fresh)
    if unknown := [list(value.shape) for value in parameters if id(value) not in names]:
        raise ValueError(f"an optimiser holds a tensor {unknown[0]} that is of none of the modules: its state would have no name")
    held = [parameter for parameter in parameters if parameter in optimiser.state]
    groups = [{key: value for key, value in group.items() if key != "params"} for group in optimiser.param_groups]
    states = {names[id(value)]: {key: _parts(part) or part for key, part in optimiser.state[value].items()} for value in held}
    return {"state": states, "groups": groups}


def _parts(value: Any) -> dict[str, Tensor]:
    """The tensors that a packed one is made of, such as a moment in 8 bits; none of others."""
    if not hasattr(value, "__tensor_flatten__") or isinstance(value, DTensor):
        return {}
    return {name: getattr(value, name) for name in value.__tensor_flatten__()[0]}


def _states(optimiser: Optimizer) -> list[dict[str, Any]]:
    held = [value for group in optimiser.param_groups for value in group["params"] if value in optimiser.state]
    return [optimiser.state[value] for value in held]


def _initialise(optimiser: Optimizer, fresh: Sequence[Tensor]) -> None:
    """Let an optimiser make the state of `fresh`, by a step of rate 0 with gradients of 0, and set it to what it is before any step."""
    parameters = [value for group in optimiser.param_groups for value in group["params"]]
    gradients, rates = [value.grad for value in parameters], [group["lr"] for group in optimiser.param_groups]
    for value in parameters:
        value.grad = None
    for value in fresh:
        value.grad = torch.zeros_like(value)
    for group in optimiser.param_groups:
        group["lr"] = torch.zeros_like(group["lr"]) if isinstance(group["lr"], Tensor) else 0.0
    optimiser.step()
    for group, rate in zip(optimiser.param_groups, rates, strict=True):
        group["lr"] = rate
    for value, gradient in zip(parameters, gradients, strict=True):
        value.grad = gradient
    for made in fresh:
        state = optimiser.state[made]
        for key, value in state.items():
            if _parts(value):
                value.copy_(torch.zeros(value.shape, device=value.device))
            else:
                state[key] = value.zero_() if isinstance(value, Tensor) else type(value)()

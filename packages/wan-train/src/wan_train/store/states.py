"""What a resume needs, as a state of the store: keyed by the names of parameters, so that any layout of processes reads it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
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
    and averages in place, and `restore` does the rest. An optimiser that has made no step gets its state here, all zero.
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
            own |= facts
    values: dict[str, Any] = state["values"]
    return values


def _optimiser_state(optimiser: Optimizer, names: Mapping[int, str]) -> dict[str, Any]:
    """By names and not, as torch does it, by numbers; one flat optimiser over several modules is as good as one of each."""
    if not optimiser.state:
        _initialise(optimiser)
    parameters = [parameter for group in optimiser.param_groups for parameter in group["params"]]
    if unknown := [list(value.shape) for value in parameters if id(value) not in names]:
        raise ValueError(f"an optimiser holds a tensor {unknown[0]} that is of none of the modules: its state would have no name")
    held = [parameter for parameter in parameters if parameter in optimiser.state]
    groups = [{key: value for key, value in group.items() if key != "params"} for group in optimiser.param_groups]
    return {"state": {names[id(value)]: dict(optimiser.state[value]) for value in held}, "groups": groups}


def _states(optimiser: Optimizer) -> list[dict[str, Any]]:
    held = [value for group in optimiser.param_groups for value in group["params"] if value in optimiser.state]
    return [optimiser.state[value] for value in held]


def _initialise(optimiser: Optimizer) -> None:
    """Let an optimiser make its state, by a step of rate 0 with gradients of 0, and set it to what it is before any step."""
    parameters = [value for group in optimiser.param_groups for value in group["params"]]
    gradients, rates = [value.grad for value in parameters], [group["lr"] for group in optimiser.param_groups]
    for value in parameters:
        value.grad = torch.zeros_like(value)
    for group in optimiser.param_groups:
        group["lr"] = torch.zeros_like(group["lr"]) if isinstance(group["lr"], Tensor) else 0.0
    optimiser.step()
    for group, rate in zip(optimiser.param_groups, rates, strict=True):
        group["lr"] = rate
    for value, gradient in zip(parameters, gradients, strict=True):
        value.grad = gradient
    for state in _states(optimiser):
        for key, value in state.items():
            state[key] = value.zero_() if isinstance(value, Tensor) else type(value)()

"""Whole copies of modules that may be sharded or wrapped: for previews and exports, with averaged weights or live ones."""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import _CHECKPOINT_PREFIX
from torch.distributed.tensor import DTensor

State = dict[str, Tensor]


class Template:
    """A module without its numbers, taken before anything is wrapped around its parts."""

    def __init__(self, module: nn.Module) -> None:
        memo: dict[int, Any] = {id(value): _empty(value) for value in named(module).values()}  # not what its class makes and never saves
        self.module = deepcopy(module, memo).requires_grad_(False).eval()

    def filled(self, state: Mapping[str, Tensor]) -> Any:
        """A module in eval mode that takes these tensors, from `whole` or `on_host`, for its own."""
        module = deepcopy(self.module)
        module.load_state_dict(dict(state), strict=True, assign=True)
        return module.requires_grad_(False).eval()


def named(module: nn.Module) -> State:
    """Parameters and buffers that are saved, by the names they have without wrappers; the tensors themselves."""
    found = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    own = {name.replace(_CHECKPOINT_PREFIX, ""): value for name, value in found.items()}
    return {name: own[name] for name in module.state_dict()}


def whole(state: Mapping[str, Tensor]) -> State:
    """Copies of the tensors, sharded ones gathered; all processes have to call it."""
    return {name: value.full_tensor().detach() if isinstance(value, DTensor) else value.detach().clone() for name, value in state.items()}


def on_host(state: Mapping[str, Tensor], kept: bool) -> State:
    """As `whole`, in the host's memory, one tensor after another, where it is `kept`; nothing elsewhere. All processes have to call it."""
    found = {}
    for name, value in state.items():
        sharded = isinstance(value, DTensor)
        gathered = value.full_tensor() if isinstance(value, DTensor) else value
        if kept:
            found[name] = gathered.detach().to("cpu", copy=not sharded)
    return found


def local(tensor: Tensor) -> Tensor:
    """What a process holds of a tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _empty(value: Tensor) -> Tensor:
    empty = torch.empty_like(value, device="meta")
    return nn.Parameter(empty, requires_grad=False) if isinstance(value, nn.Parameter) else empty

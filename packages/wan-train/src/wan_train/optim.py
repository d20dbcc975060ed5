"""The optimiser of a run, its learning rate and the averaged weights."""

from __future__ import annotations

import math
from copy import deepcopy
from typing import Any

import torch
from torch import nn

from .config import OptimiserConfig


class Optimiser:
    """AdamW, or Muon beside it on the weights of groups marked `muon`, as one: same schedule, one state.

    Muon takes matrices; a convolution's weight is one of `[out, in * kernel]`.
    """

    def __init__(self, config: OptimiserConfig, groups: list[dict[str, Any]], steps: int) -> None:
        self.config, self.steps = config, steps
        self.params = [param for group in groups for param in group["params"]]
        chosen = [param for group in groups if group.get("muon") and config.name == "muon" for param in group["params"]]
        ids = {id(param) for param in chosen}
        self.matrices = [(param, param.detach().view(len(param), -1)) for param in chosen]  # each shares its memory with the parameter
        self.parts: list[tuple[torch.optim.Optimizer, float]] = []
        if rest := [param for param in self.params if id(param) not in ids]:
            self.parts.append((torch.optim.AdamW(rest, config.lr, config.betas, weight_decay=config.weight_decay), config.lr))
        if self.matrices:
            matrices = [matrix for _, matrix in self.matrices]
            self.parts.append((torch.optim.Muon(matrices, config.muon_lr, weight_decay=config.weight_decay), config.muon_lr))

    def rate(self, step: int) -> float:
        """The learning rate at `step` as a share of its peak."""
        config, progress = self.config, step / self.steps
        share = min(1.0, (step + 1) / config.warmup) if config.warmup else 1.0
        if config.schedule == "cosine" and progress > config.hold:
            bend = (progress - config.hold) / (1 - config.hold)
            share *= config.final + (1 - config.final) * 0.5 * (1 + math.cos(math.pi * bend))
        return share

    def step(self, step: int) -> float:
        """Clip, update and clear the gradients; returns the norm of the gradient before clipping.

        Raises ValueError where the norm is not finite, and leaves the weights as they are.
        """
        norm = torch.nn.utils.clip_grad_norm_(self.params, self.config.clip or math.inf)
        require_finite("norm of the gradient", norm, step)
        for param, matrix in self.matrices:
            matrix.grad = param.grad.flatten(1) if param.grad is not None else None
        for optimiser, peak in self.parts:
            for group in optimiser.param_groups:
                group["lr"] = peak * self.rate(step)
            optimiser.step()
        for param in self.params:
            param.grad = None
        return float(norm)

    def state_dict(self) -> list[dict[str, Any]]:
        return [optimiser.state_dict() for optimiser, _ in self.parts]

    def load_state_dict(self, states: list[dict[str, Any]]) -> None:
        for (optimiser, _), state in zip(self.parts, states, strict=True):
            optimiser.load_state_dict(state)


class EMA:
    """Exponential moving average of the weights, with the usual warm-up (1 + n) / (10 + n) of its decay."""

    def __init__(self, modules: dict[str, nn.Module], decay: float) -> None:
        self.decay, self.live = decay, modules
        self.modules = {name: deepcopy(module).requires_grad_(False).eval() for name, module in modules.items()} if decay else modules

    @torch.no_grad()
    def update(self, step: int) -> None:
        if not self.decay:
            return
        keep = min(self.decay, (1 + step) / (10 + step))
        for name, module in self.modules.items():
            averaged: list[torch.Tensor] = list(module.parameters())
            live: list[torch.Tensor] = list(self.live[name].parameters())
            torch._foreach_lerp_(averaged, live, 1 - keep)
            for own, other in zip(module.buffers(), self.live[name].buffers(), strict=True):
                own.copy_(other)


def require_finite(name: str, value: torch.Tensor, step: int) -> None:
    """Raise ValueError where a figure is not finite; called before the weights of `step` (counted from 0) are changed."""
    if not torch.isfinite(value):
        raise ValueError(
            f"the {name} is {value.item()} at step {step + 1}: lower optimiser.lr or optimiser.clip, "
            "and take up the last checkpoint with --resume"
        )

"""The optimiser of a run, its learning rate and the averaged weights."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from .config import OptimiserConfig
from .copies import local, named
from .plateau import Plateau


class Optimiser:
    """AdamW, with moments in fp32 or in 8 bits, or Muon beside it on the weights of groups marked `muon`, as one: same schedule, one state.

    Muon takes matrices; a convolution's weight is one of `[out, in * kernel]`. A group with a
    `scale` is AdamW's, at that share of its rate.
    """

    def __init__(self, config: OptimiserConfig, groups: list[dict[str, Any]], steps: int) -> None:
        self.config, self.steps = config, steps
        self.plateau = Plateau(config.plateau) if config.plateau else None
        self.params = [param for group in groups for param in group["params"]]
        muon = [group for group in groups if group.get("muon") and "scale" not in group and config.name == "muon"]
        chosen = [param for group in muon for param in group["params"]]
        if any(isinstance(param, DTensor) for param in chosen):
            raise ValueError("optimiser muon takes whole matrices, and parallel.fsdp splits them: use adamw, or fsdp 1")
        if config.name == "adamw8bit" and any(isinstance(param, DTensor) for param in self.params):
            raise ValueError("optimiser adamw8bit packs the moments of whole weights, and parallel.fsdp splits them: use adamw, or fsdp 1")
        ids = {id(param) for param in chosen}
        for param in chosen:  # a VAE on a GPU has its filters channels last, which has no view as a matrix
            param.data = param.data.contiguous()
        self.matrices = [(param, param.detach().view(len(param), -1)) for param in chosen]  # each shares its memory with the parameter
        self.parts: list[tuple[torch.optim.Optimizer, float]] = []
        if rest := _adamw_groups(groups, ids):
            self.parts.append((_adamw(config)(rest, config.lr, config.betas, weight_decay=config.weight_decay), config.lr))
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
        return share * (self.plateau.share if self.plateau else 1.0)

    def renew(self) -> None:
        """Watch for a plateau anew: in a stage that has figures of its own."""
        if self.config.plateau is not None:
            self.plateau = Plateau(self.config.plateau)

    def step(self, step: int, norm: float, share: float = 1.0) -> None:
        """Clip gradients of this norm, update the weights at a share of the rate, and clear the gradients."""
        if self.config.clip and norm > self.config.clip:
            torch._foreach_mul_([local(param.grad) for param in self.params if param.grad is not None], self.config.clip / norm)
        for param, matrix in self.matrices:
            matrix.grad = param.grad.flatten(1) if param.grad is not None else None
        for optimiser, peak in self.parts:
            for group in optimiser.param_groups:
                rate = peak * self.rate(step) * share * group.get("scale", 1.0)
                group["lr"] = group["lr"].fill_(rate) if isinstance(group["lr"], torch.Tensor) else rate
                if isinstance(optimiser, torch.optim.AdamW):
                    group |= _kernel(group["params"])  # a checkpoint brings that of the layout it was saved in
            optimiser.step()
        self.clear()

    def clear(self) -> None:
        """Drop the gradients."""
        for param in self.params:
            param.grad = None


def _adamw(config: OptimiserConfig) -> Any:
    """The class; ValueError where it is of a package that is not there."""
    if config.name != "adamw8bit":
        return torch.optim.AdamW
    try:
        from torchao.optim import AdamW8bit
    except ModuleNotFoundError as error:
        raise ValueError("optimiser adamw8bit is torchao's, which is not installed: pip install wan-train[torchao]") from error
    return AdamW8bit


def _adamw_groups(groups: list[dict[str, Any]], taken: set[int]) -> list[dict[str, Any]]:
    """What Muon has not taken: all in one, but for groups with a rate of their own."""
    plain = [param for group in groups if "scale" not in group for param in group["params"] if id(param) not in taken]
    scaled = [{"params": group["params"], "scale": group["scale"]} for group in groups if "scale" in group]
    return [{**group, **_kernel(group["params"])} for group in ({"params": plain}, *scaled) if group["params"]]


def _kernel(params: list[nn.Parameter]) -> dict[str, bool]:
    """AdamW in one pass over the weights, without temporaries; torch has none for a group of which FSDP splits a part."""
    return {"fused": len({isinstance(param, DTensor) for param in params}) == 1, "foreach": False}


class EMA:
    """Exponential moving average of the weights, with the usual warm-up (1 + n) / (10 + n) of its decay.

    state: module -> averaged tensors by name, sharded as the live ones; without a decay the live ones themselves
    """

    def __init__(self, modules: dict[str, nn.Module], decay: float) -> None:
        self.decay = decay
        self.live = {name: named(module) for name, module in modules.items()}
        self.state = {
            name: {key: value.detach().clone() for key, value in live.items()} if decay else live for name, live in self.live.items()
        }

    @torch.no_grad()
    def update(self, step: int) -> None:
        if not self.decay:
            return
        keep = min(self.decay, (1 + step) / (10 + step))
        for name, state in self.state.items():
            pairs = [(local(own), live, local(live)) for own, live in zip(state.values(), self.live[name].values(), strict=True)]
            weights = [(own, live) for own, given, live in pairs if isinstance(given, nn.Parameter)]
            torch._foreach_lerp_([own for own, _ in weights], [live for _, live in weights], 1 - keep)
            for own, given, live in pairs:
                if not isinstance(given, nn.Parameter):  # a buffer
                    own.copy_(live)


def gradient_norm(parameters: Iterable[nn.Parameter]) -> torch.Tensor:
    """The norm of all gradients, on every process; those that are sharded are summed over their processes."""
    grads = [parameter.grad for parameter in parameters if parameter.grad is not None]
    norms = [torch.linalg.vector_norm(grad) for grad in grads]
    gathered = [norm.full_tensor() if isinstance(norm, DTensor) else norm for norm in norms]
    return torch.linalg.vector_norm(torch.stack(gathered)) if gathered else torch.zeros(())

"""What tests of a frozen backbone do with it: train what is beside it, look what has changed, and run it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from wan_train.objectives.flow import RectifiedFlow
from wan_train.randomness import generator

LATENTS, TIMESTEP = torch.randn(2, 4, 2, 4, 4, generator=torch.Generator().manual_seed(3)), torch.tensor([400.0, 900.0])


def trained(objective: RectifiedFlow, steps: int = 3) -> list[float]:
    optimiser = torch.optim.AdamW([param for group in objective.parameter_groups() for param in group["params"]], lr=1e-2)
    found = []
    for _ in range(steps):
        loss = objective.losses(objective.batch([0, 1], lambda sample, stream: generator(0, 0, sample, stream), 0.0))[0].mean()
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()
        found.append(loss.item())
    return found


def frozen_state(objective: RectifiedFlow) -> dict[str, Tensor]:
    held = {id(value) for module in objective.modules.values() for value in module.parameters()}
    return {name: value.clone() for name, value in objective.backbone.named_parameters() if id(value) not in held}


def velocity(backbone: Any, tokens: list[Tensor]) -> Tensor:
    with torch.no_grad():
        found: Tensor = backbone(LATENTS, TIMESTEP, backbone.encode_context(tokens))
    return found


def tokens(width: int = 96) -> list[Tensor]:
    return list(torch.randn(2, 5, width, generator=torch.Generator().manual_seed(5)))

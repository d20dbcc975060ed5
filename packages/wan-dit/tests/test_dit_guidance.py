"""Classifier-free guidance."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor
from wan_dit.contracts import Conditioning, Context, KeysValues
from wan_dit.guidance import guided_velocity


@dataclass
class Linear:
    """velocity = latents * timestep / 1000 + mean of the context's keys; records its calls."""

    spec: Any = None
    calls: list[tuple[Context, Conditioning | None]] = field(default_factory=list)

    def encode_context(self, text: list[Tensor], conditioning: Conditioning | None = None) -> Context:
        return Context((KeysValues(means := torch.stack([tokens.mean() for tokens in text]), means),))

    def __call__(self, latents: Tensor, timestep: Tensor, context: Context, conditioning: Conditioning | None = None) -> Tensor:
        self.calls.append((context, conditioning))
        return latents * timestep.view(-1, 1, 1, 1, 1) / 1000 + context.blocks[0].key.view(-1, 1, 1, 1, 1)


LATENTS, TIMESTEP = torch.randn(2, 4, 2, 3, 4, generator=torch.Generator().manual_seed(0)), torch.tensor([900.0, 300.0])


def contexts(backbone: Linear) -> tuple[Context, Context]:
    return backbone.encode_context([torch.ones(3, 2), torch.full((5, 2), 2.0)]), backbone.encode_context([torch.zeros(1, 2)] * 2)


def test_scale_one_runs_the_model_once() -> None:
    backbone = Linear()
    positive, negative = contexts(backbone)
    for other in (negative, None):
        backbone.calls.clear()
        velocity = guided_velocity(backbone, LATENTS, TIMESTEP, positive, other, 1.0)
        assert [context for context, _ in backbone.calls] == [positive]
        assert torch.equal(velocity, Linear()(LATENTS, TIMESTEP, positive))


@pytest.mark.parametrize("scale", [0.0, 0.5, 3.0, 7.5])
def test_velocity_is_moved_away_from_the_negative_prompt(scale: float) -> None:
    backbone, conditioning = Linear(), Conditioning(extra_latents=LATENTS)
    positive, negative = contexts(backbone)
    velocity = guided_velocity(backbone, LATENTS, TIMESTEP, positive, negative, scale, conditioning)
    assert len(backbone.calls) == 2
    assert all(given is conditioning for _, given in backbone.calls)
    with_prompt, without = Linear()(LATENTS, TIMESTEP, positive), Linear()(LATENTS, TIMESTEP, negative)
    assert torch.equal(velocity, without + scale * (with_prompt - without))
    assert torch.allclose((velocity - without).mean(dim=(1, 2, 3, 4)), scale * torch.tensor([1.0, 2.0]), atol=1e-5)


def test_a_missing_negative_prompt_is_named() -> None:
    backbone = Linear()
    with pytest.raises(ValueError, match=r"guidance scale 4\.5 needs the context of a negative prompt"):
        guided_velocity(backbone, LATENTS, TIMESTEP, contexts(backbone)[0], None, 4.5)
    assert not backbone.calls, "refused before any forward"

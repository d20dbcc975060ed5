"""The optimiser of a run: its schedule, who trains what, clipping, and the averaged weights."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from wan_train.config import OptimiserConfig, PlateauConfig
from wan_train.optim import EMA, Optimiser, gradient_norm
from wan_train.plateau import Plateau


def weight(*shape: int, seed: int = 0) -> nn.Parameter:
    return nn.Parameter(torch.randn(shape, generator=torch.Generator().manual_seed(seed)))


def gradient(param: nn.Parameter, seed: int) -> Tensor:
    return torch.randn(param.shape, generator=torch.Generator().manual_seed(100 + seed))


def config(**fields: Any) -> OptimiserConfig:
    return OptimiserConfig(**{"name": "muon", "clip": 0.0, **fields})


def rates(steps: int = 100, **fields: Any) -> list[float]:
    optimiser = Optimiser(config(**fields), [{"params": [weight(2, 2)]}], steps)
    return [optimiser.rate(step) for step in range(steps + 1)]


def take(optimiser: Optimiser, step: int) -> float:
    """A step with the gradients that are there; returns their norm."""
    norm = float(gradient_norm(optimiser.params))
    optimiser.step(step, norm)
    return norm


def test_a_constant_rate_is_constant() -> None:
    assert set(rates()) == {1.0}


def test_warm_up_is_linear_and_never_zero() -> None:
    assert rates(warmup=4)[:6] == pytest.approx([0.25, 0.5, 0.75, 1.0, 1.0, 1.0])


def test_cosine_holds_then_bends_to_its_final_share() -> None:
    values = rates(schedule="cosine", hold=0.4, final=0.05, warmup=10)
    assert values[9:41] == [1.0] * 32
    assert values[4] == pytest.approx(0.5)
    assert values[70] == pytest.approx(0.05 + 0.95 / 2)  # half-way through the bend
    assert values[55] == pytest.approx(0.05 + 0.95 * (1 + math.cos(math.pi / 4)) / 2)
    assert values[100] == pytest.approx(0.05)
    assert all(a > b for a, b in pairwise(values[41:]))


def test_rates_reach_both_optimisers() -> None:
    matrix, vector = weight(3, 3), weight(3)
    optimiser = Optimiser(config(lr=0.1, muon_lr=0.5, warmup=4), [{"params": [matrix], "muon": True}, {"params": [vector]}], 100)
    matrix.grad, vector.grad = gradient(matrix, 0), gradient(vector, 0)
    take(optimiser, 1)
    assert [part.param_groups[0]["lr"] for part, _ in optimiser.parts] == pytest.approx([0.05, 0.25])


def muon_and_reference(name: str, *shape: int) -> tuple[Tensor, Tensor]:
    """A weight after three steps of ours, and torch's Muon on the matrix it is reshaped to."""
    ours, matrix = weight(*shape), nn.Parameter(weight(*shape).detach().flatten(1).clone())
    optimiser = Optimiser(config(name=name, muon_lr=0.03, lr=0.03, weight_decay=0.2), [{"params": [ours], "muon": True}], 10)
    reference = torch.optim.Muon([matrix], lr=0.03, weight_decay=0.2)
    for step in range(3):
        ours.grad, matrix.grad = gradient(ours, step), gradient(ours, step).flatten(1)
        take(optimiser, step)
        reference.step()
    return ours.detach(), matrix.detach().view_as(ours)


@pytest.mark.parametrize("shape", [(6, 4), (4, 3, 3, 3, 3), (8, 2, 1, 1)])
def test_muon_trains_a_convolution_as_the_matrix_it_is(shape: tuple[int, ...]) -> None:
    ours, reference = muon_and_reference("muon", *shape)
    assert torch.equal(ours, reference)
    assert not torch.allclose(ours, weight(*shape))
    other, reference = muon_and_reference("adamw", *shape)
    assert not torch.allclose(other, reference, atol=1e-3)  # the comparison tells the two apart


def trained_by(name: str) -> dict[str, set[int]]:
    params = {"muon": [weight(4, 4), weight(4, 2, 3, 3, 3)], "rest": [weight(4, 4), weight(4)]}
    groups = [{"params": params["muon"], "muon": True}, {"params": params["rest"]}]
    optimiser = Optimiser(config(name=name), groups, 10)
    for param in optimiser.params:
        param.grad = gradient(param, 0)
    take(optimiser, 0)
    assert len(optimiser.params) == 4
    names = {"AdamW": set(), "Muon": set()}
    sizes = {id(param): i for i, param in enumerate(optimiser.params)}
    of_matrix = {id(matrix): id(param) for param, matrix in optimiser.matrices}
    for part, _ in optimiser.parts:
        for param in part.param_groups[0]["params"]:
            names[type(part).__name__].add(sizes[of_matrix.get(id(param), id(param))])
    return names


def test_unmarked_groups_go_to_adamw_and_marked_ones_to_muon_where_it_is_asked_for() -> None:
    assert trained_by("muon") == {"Muon": {0, 1}, "AdamW": {2, 3}}
    assert trained_by("adamw") == {"Muon": set(), "AdamW": {0, 1, 2, 3}}


@pytest.mark.parametrize(("clip", "share"), [(0.0, 1.0), (0.5, 0.5 / 5), (50.0, 1.0)])
def test_the_gradient_is_clipped_by_its_norm_over_all_weights(clip: float, share: float) -> None:
    first, second = weight(2), weight(2)
    optimiser = Optimiser(config(name="adamw", clip=clip, betas=(0.9, 0.99)), [{"params": [first]}, {"params": [second]}], 10)
    first.grad, second.grad = torch.tensor([3.0, 0.0]), torch.tensor([0.0, 4.0])
    assert take(optimiser, 0) == pytest.approx(5)
    ((adamw, _),) = optimiser.parts
    moments = [adamw.state[param]["exp_avg"] for param in (first, second)]  # a tenth of what arrived
    assert torch.allclose(torch.cat(moments), 0.1 * share * torch.tensor([3.0, 0.0, 0.0, 4.0]), rtol=1e-4)
    assert first.grad is second.grad is None


def linear(value: float) -> nn.Linear:
    module = nn.Linear(2, 1)
    for param in module.parameters():
        param.data.fill_(value)
    return module


def test_averages_warm_up_and_lag() -> None:
    live = linear(0.0)
    ema = EMA({"part": live}, 0.5)
    expected, seen = 0.0, []
    for step in range(12):
        for param in live.parameters():
            param.data += 1.0
        ema.update(step)
        keep = min(0.5, (1 + step) / (10 + step))
        expected = keep * expected + (1 - keep) * (step + 1)
        seen.append(ema.state["part"]["weight"][0, 0].item())
        assert seen[-1] == pytest.approx(expected, rel=1e-6)
        assert seen[-1] < step + 1
    assert seen[0] == pytest.approx(0.9)  # 1/10 of the start is kept, then 2/11, ... up to the decay
    assert seen[-1] == pytest.approx(11, abs=0.1)  # a ramp is followed decay / (1 - decay) = 1 step behind


def test_averages_are_frozen_copies_and_the_weights_themselves_without_a_decay() -> None:
    live = linear(1.0).train()
    averaged = EMA({"part": live}, 0.9).state["part"]
    assert averaged.keys() == live.state_dict().keys()
    assert not any(own is param for own in averaged.values() for param in live.parameters())
    assert not any(own.requires_grad for own in averaged.values())
    assert all(param.requires_grad for param in live.parameters())
    none = EMA({"part": live}, 0.0)
    none.update(3)
    assert none.state["part"]["weight"] is live.weight


def test_buffers_are_those_of_the_weights() -> None:
    live = nn.BatchNorm1d(2)
    ema = EMA({"part": live}, 0.9)
    live(torch.randn(8, 2) + 5)
    ema.update(0)
    assert torch.equal(ema.state["part"]["running_mean"], live.running_mean)
    assert live.running_mean.abs().min() > 0.1


def test_the_rate_falls_on_a_plateau_and_the_state_goes_on() -> None:
    plateau = Plateau(PlateauConfig(figure="val", patience=1, factor=0.5, floor=0.2))
    shares = []
    for value in (1.0, 2.0, 2.0, 1.5, 1.9, 1.9, 2.5, 2.0, 2.0, 2.0, 2.0, 2.0):
        kept = Plateau(plateau.config)
        kept.load(plateau.state())
        plateau = kept  # as after a resume
        plateau.see({"val": value})
        shares.append(plateau.share)
    assert shares == [1, 1, 1, 0.5, 0.5, 0.25, 0.25, 0.25, 0.2, 0.2, 0.2, 0.2]
    assert plateau.spent
    with pytest.raises(ValueError, match=r"optimiser\.plateau\.figure 'val' is not measured: there are other"):
        plateau.see({"other": 1.0})


def test_a_plateau_of_a_figure_that_should_fall() -> None:
    plateau = Plateau(PlateauConfig(figure="loss", better="lower", patience=0, least=0.1))
    for value, share in ((1.0, 1.0), (0.8, 1.0), (0.75, 0.5), (0.6, 0.5)):
        plateau.see({"loss": value})
        assert plateau.share == share


def test_a_plateau_multiplies_the_schedule() -> None:
    optimiser = Optimiser(config(plateau={"figure": "val", "patience": 0}), [{"params": [weight(2, 2)]}], 10)
    assert optimiser.plateau is not None
    before = optimiser.rate(3)
    optimiser.plateau.see({"val": 1.0})
    optimiser.plateau.see({"val": 1.0})
    assert optimiser.rate(3) == before * 0.5


def test_a_group_with_a_rate_of_its_own_is_not_muons_too() -> None:
    own, other = weight(4, 4), weight(4, 4, seed=1)
    optimiser = Optimiser(config(), [{"params": [other], "muon": True}, {"params": [own], "muon": True, "scale": 0.5}], 10)
    held = [param for part, _ in optimiser.parts for group in part.param_groups for param in group["params"]]
    assert [param.data_ptr() for param in held].count(own.data_ptr()) == 1
    assert [param for param, _ in optimiser.matrices] == [other]

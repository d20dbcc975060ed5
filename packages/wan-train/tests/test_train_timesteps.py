"""At which noise levels a flow is trained: densities against their formulae, experts on their sides, weights of the loss."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from wan_train.objectives import timesteps
from wan_train.objectives.timesteps import TimestepSettings, draw_sigmas, loss_weights, share_below
from wan_train.store.averages import timestep_key

KINDS = ("logit-normal", "uniform", "mode")


def draws(count: int = 40_000, seed: int = 0, **given: Any) -> torch.Tensor:
    return draw_sigmas(TimestepSettings(**given), count, torch.Generator().manual_seed(seed))


def by_formula(kind: str, shift: float, count: int = 200_000) -> torch.Tensor:
    """The densities as the paper writes them, from other random numbers."""
    generator = torch.Generator().manual_seed(7)
    u = torch.rand(count, generator=generator, dtype=torch.float64)
    if kind == "logit-normal":
        u = torch.sigmoid(torch.randn(count, generator=generator, dtype=torch.float64))
    if kind == "mode":
        u = 1 - u - 1.29 * (torch.cos(math.pi / 2 * u) ** 2 - 1 + u)
    return shift * u / (1 + (shift - 1) * u)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shift", [1.0, 5.0])
def test_draws_have_the_density_of_the_formula(kind: str, shift: float) -> None:
    own, expected = draws(timesteps=kind, shift=shift).double(), by_formula(kind, shift)
    assert own.dtype == torch.float64
    for quantile in (0.05, 0.25, 0.5, 0.75, 0.95):
        assert own.quantile(quantile).item() == pytest.approx(expected.quantile(quantile).item(), abs=0.01)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("boundary", [0.875, 0.9, 0.5])
def test_the_share_of_an_expert_follows_the_boundary_and_it_has_that_part_of_the_density(kind: str, boundary: float) -> None:
    whole = draws(timesteps=kind, shift=5.0)
    share = (whole < boundary).float().mean().item()
    assert share_below(TimestepSettings(timesteps=kind, shift=5.0), boundary) == pytest.approx(share, abs=0.01)
    for expert, part in (("high", whole[whole >= boundary]), ("low", whole[whole < boundary])):
        own = draws(timesteps=kind, shift=5.0, boundary=boundary, expert=expert)
        assert own.double().quantile(0.5).item() == pytest.approx(part.double().quantile(0.5).item(), abs=0.02)


@settings(deadline=None, max_examples=60)
@given(
    kind=st.sampled_from(KINDS), shift=st.floats(0.5, 12), boundary=st.floats(0.05, 0.95), expert=st.sampled_from(["high", "low"]),
    seed=st.integers(0, 99),
)  # fmt: skip
def test_no_draw_crosses_the_boundary(kind: str, shift: float, boundary: float, expert: str, seed: int) -> None:
    own = draws(2000, seed, timesteps=kind, shift=shift, boundary=boundary, expert=expert)
    edge = torch.tensor(boundary, dtype=torch.float32)
    assert bool((own >= edge).all() if expert == "high" else (own < edge).all())
    assert 0 <= own.min() < own.max() <= 1


@pytest.mark.parametrize("expert", ["high", "low"])
def test_a_boundary_on_the_wrong_side_is_found(monkeypatch: pytest.MonkeyPatch, expert: str) -> None:
    """The planted bug takes the shares of the other side: the clamp holds such draws on the boundary, the density tells."""
    side = timesteps._side

    def other(settings: TimestepSettings) -> tuple[float, float]:
        low, high = side(settings)
        return (0.0, low) if settings.expert == "high" else (high, 1.0)

    right = draws(5000, boundary=0.5, expert=expert)
    monkeypatch.setattr(timesteps, "_side", other)
    given = TimestepSettings.model_construct(boundary=0.5, expert=expert)
    planted = draw_sigmas(given, 5000, torch.Generator().manual_seed(0))
    assert abs(planted.quantile(0.5).item() - right.quantile(0.5).item()) > 0.05
    assert planted.std() < 1e-3 < right.std()


def test_the_boundary_is_a_sigma_whatever_the_shift() -> None:
    """An index of a table of 1000 steps would be another noise level under another shift."""
    for shift in (1.0, 3.0, 12.0):
        high, low = (draws(5000, shift=shift, boundary=0.875, expert=expert) for expert in ("high", "low"))
        assert low.max() < 0.875 <= high.min() < 0.885
        assert low.max() > 0.86


def test_weights_are_those_the_field_names_so() -> None:
    sigma = torch.tensor([0.1, 0.5, 0.9])
    assert loss_weights(TimestepSettings(), sigma).tolist() == [1, 1, 1]
    torch.testing.assert_close(loss_weights(TimestepSettings(weighting="sigma_sqrt"), sigma), torch.tensor([100.0, 4.0, 1 / 0.81]))
    diffusers = pytest.importorskip("diffusers.training_utils")
    for weighting in ("cosmap", "sigma_sqrt"):
        expected = diffusers.compute_loss_weighting_for_sd3(weighting, sigma)
        torch.testing.assert_close(loss_weights(TimestepSettings(weighting=weighting), sigma), expected)
    assert loss_weights(TimestepSettings(weighting="sigma_sqrt"), torch.zeros(1)).item() == pytest.approx(1e6)


def test_a_sigma_has_a_bucket_of_the_log() -> None:
    assert {timestep_key(sigma) for sigma in draws(500, boundary=0.9, expert="high").tolist()} == {"loss_t/0.9-1"}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"boundary": 0.9}, "expert and boundary go together"),
        ({"expert": "low"}, "expert and boundary go together"),
        ({"timesteps": "normal"}, "logit-normal"),
        ({"boundary": 1.0, "expert": "low"}, "less than 1"),
        ({"logit_std": 0.0, "shift": 1.0, "boundary": 0.6, "expert": "high"}, "no sigma of these timesteps"),
    ],
)
def test_wrong_settings_are_told(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        TimestepSettings(**given)

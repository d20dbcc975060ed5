"""The adversary that is shown a clip and its reconstruction together and says which is which."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import wan_train.objectives.vae
from torch import Tensor, nn
from wan_train.data.shapes import Shapes
from wan_train.objectives.discriminator import Discriminator, DiscriminatorSettings, adversarial
from wan_train.objectives.vae import VAEObjective
from wan_train.plugins import plugin_manager
from wan_train.randomness import generator

NARROW = {"base_dim": 4, "decoder_base_dim": 4, "z_dim": 4}
PHASE = {"until": 1.0, "frames": 5, "size": 16}


def pair(first: Tensor, second: Tensor) -> Tensor:
    return torch.cat([first, second], dim=1)


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def artefact(video: Tensor) -> Tensor:
    """A faint checkerboard over the pixels, as strided convolutions leave."""
    rows, columns = torch.arange(video.shape[3])[:, None], torch.arange(video.shape[4])
    return video + 0.1 * ((rows + columns) % 2 * 2 - 1)


def test_a_pair_learns_to_tell_a_planted_artefact_in_either_order_and_on_other_clips() -> None:
    torch.manual_seed(0)
    model = DiscriminatorSettings(base_dim=8, levels=2, judges="pair").build()
    optimiser = torch.optim.AdamW(model.parameters(), 2e-3)
    data = Shapes(frames=5, size=(16, 16), length=16)
    video, unseen = data.video(range(12)), data.video(range(12, 16))
    output, found = artefact(video).requires_grad_(), []
    for _ in range(40):
        _, loss = adversarial(model, video, output, output.flatten(1).sum(1), pair=True)
        loss.mean().backward()
        optimiser.step()
        optimiser.zero_grad()
        found.append(loss.mean().item())
    assert found[0] == pytest.approx(1, abs=0.1)
    assert found[-1] < 0.2
    real, fake = model(pair(unseen, artefact(unseen))), model(pair(artefact(unseen), unseen))
    assert (real.flatten(1).mean(1) > 0.5).all()
    assert (fake.flatten(1).mean(1) < -0.5).all()
    assert output.grad is None  # nothing reached what is judged


def test_both_orders_count_the_same() -> None:
    torch.manual_seed(0)
    model, video = Discriminator(4, levels=2, channels=6), noise(3, 3, 5, 16, 16)
    output = noise(3, 3, 5, 16, 16, seed=1).requires_grad_()
    rest = (output - video).abs().flatten(1).mean(1)
    ours, hinge = adversarial(model, video, output, rest, pair=True)
    real, fake = (model(pair(*both)).flatten(1) for both in ((video, output), (output, video)))
    assert torch.allclose(ours, 0.5 * (real - fake).mean(1), atol=1e-6)
    assert torch.allclose(hinge, 0.5 * ((1 - real).clamp_min(0) + (1 + fake).clamp_min(0)).mean(1), atol=1e-6)
    swapped, _ = adversarial(model, output.detach(), (again := video.clone().requires_grad_()), again.flatten(1).sum(1), pair=True)
    assert torch.allclose(ours, -swapped, atol=1e-6)
    same, _ = adversarial(model, video, again, again.flatten(1).sum(1), pair=True)
    assert torch.equal(same, torch.zeros(3)), "nothing to tell"


class Nearness(nn.Module):
    """Says which of a pair is nearer to what it has seen to be real."""

    def __init__(self, real: Tensor) -> None:
        super().__init__()
        self.real = real

    def forward(self, both: Tensor) -> Tensor:
        first, second = both.chunk(2, dim=1)
        distances = [(clip - self.real).square().flatten(1).mean(1, keepdim=True) for clip in (first, second)]
        return distances[1] - distances[0]


def test_the_generators_gradient_points_to_the_original_at_the_norm_of_the_rest() -> None:
    video, output = noise(2, 3, 5, 8, 8), noise(2, 3, 5, 8, 8, seed=1).requires_grad_()
    weights = torch.tensor([1.0, 20.0])
    loss, _ = adversarial(Nearness(video), video, output, weights * (output - video).abs().flatten(1).mean(1), pair=True)
    (gradient,) = torch.autograd.grad(loss.sum(), output)
    towards = (video - output).detach().flatten(1)
    assert torch.cosine_similarity(-gradient.flatten(1), towards).tolist() == pytest.approx([1, 1], abs=1e-5)
    assert gradient.flatten(1).norm(dim=1).tolist() == pytest.approx((weights / (3 * 5 * 8 * 8) ** 0.5).tolist(), rel=1e-4)


def test_a_discriminator_that_was_taught_pulls_reconstructions_to_their_originals() -> None:
    """Where the artefact is all that it knows, following the VAE's side takes the artefact away."""
    torch.manual_seed(0)
    model = Discriminator(8, levels=2, channels=6)
    optimiser = torch.optim.AdamW(model.parameters(), 2e-3)
    video = Shapes(frames=5, size=(16, 16), length=16).video(range(12))
    output = artefact(video).requires_grad_()
    for _ in range(60):
        sides = adversarial(model, video, output, output.flatten(1).sum(1), pair=True)
        sides[1].mean().backward()
        optimiser.step()
        optimiser.zero_grad()
    (gradient,) = torch.autograd.grad(adversarial(model, video, output, output.flatten(1).sum(1), pair=True)[0].sum(), output)
    along = torch.cosine_similarity(-gradient.flatten(1), (video - output).detach().flatten(1))
    assert (along > 0.1).all()  # one at random is below 0.05


def test_each_side_gets_its_own_gradient_in_the_objective(tmp_path: Path) -> None:
    def made(phase: dict[str, Any]) -> tuple[VAEObjective, Tensor, dict[str, Tensor], Any]:
        torch.manual_seed(0)
        fields = {"architecture": NARROW, "phases": [phase], "discriminator": {"base_dim": 4, "judges": "pair"}}
        objective = VAEObjective(fields, Shapes(frames=5, size=(16, 16), length=4), tmp_path, "cpu", plugin_manager())
        batch = objective.batch((0, 1), lambda sample, stream: generator(0, 0, sample, stream), 0.0)
        found, figures = objective.losses(batch)
        found.sum().backward()
        again = objective.batch((0, 1), lambda sample, stream: generator(0, 0, sample, stream), 0.0)
        return objective, found, figures, again

    plain, game = made(PHASE), made({**PHASE, "adversary": 1e-12})
    for (name, one), (_, other) in zip(plain[0].vae.named_parameters(), game[0].vae.named_parameters(), strict=True):
        assert torch.allclose(one.grad, other.grad, atol=1e-7), name
    objective, _, figures, batch = game
    model, video = objective.modules["discriminator"], batch.video
    output = objective.vae.reconstruct(video, batch.generators)[0].detach()
    real, fake = (model(pair(*both)).flatten(1) for both in ((video, output), (output, video)))
    hinge = 0.5 * ((1 + fake).clamp_min(0).mean(1) + (1 - real).clamp_min(0).mean(1))
    assert torch.allclose(hinge, figures["discriminator"], atol=1e-6)
    assert torch.allclose(0.5 * (real - fake).mean(1), figures["adversary"], atol=1e-6)
    expected = torch.autograd.grad(hinge.sum(), list(model.parameters()))
    assert all(torch.allclose(param.grad, value, atol=1e-6) for param, value in zip(model.parameters(), expected, strict=True))


def test_the_adversary_is_balanced_against_all_of_the_reconstruction(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its gradient at the last layer is as long as that of all terms together, wavelets included."""
    seen: dict[str, Tensor] = {}

    def watched(model: nn.Module, video: Tensor, output: Tensor, reconstruction: Tensor, judged: bool) -> tuple[Tensor, Tensor]:
        seen.update(reconstruction=reconstruction.detach())
        return adversarial(model, video, output, reconstruction, judged)

    monkeypatch.setattr(wan_train.objectives.vae, "adversarial", watched)
    fields = {
        "architecture": NARROW, "phases": [{**PHASE, "adversary": 0.5}], "discriminator": {"base_dim": 4, "judges": "pair"},
        "l1": 0.7, "l2": 0.3, "log_l2": 0.1, "wavelet": 0.4, "kl": 0.2,
    }  # fmt: skip
    objective = VAEObjective(fields, Shapes(frames=5, size=(16, 16), length=4), tmp_path, "cpu", plugin_manager())
    batch = objective.batch((0, 1), lambda sample, stream: generator(0, 0, sample, stream), 0.0)
    losses, figures = objective.losses(batch)
    apart = 0.2 * figures["kl"] + 0.5 * figures["adversary"] + figures["discriminator"]
    assert torch.allclose(seen["reconstruction"], losses.detach() - apart, atol=1e-5)
    assert (figures["wavelet"] > 0.01).all()


def test_another_way_to_judge_is_refused(tmp_path: Path) -> None:
    fields = {"architecture": NARROW, "phases": [PHASE], "discriminator": {"judges": "both"}}
    with pytest.raises(ValueError, match=r"discriminator\.judges: .*'single' or 'pair' \(got 'both'\)"):
        VAEObjective(fields, Shapes(frames=5, size=(16, 16), length=4), tmp_path, "cpu", plugin_manager())

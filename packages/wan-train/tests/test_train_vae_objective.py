"""The VAE objective: what it draws, what it minimises and what it leaves behind."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributions import Normal, kl_divergence
from wan_train.data.mix import Mix
from wan_train.data.shapes import Shapes
from wan_train.objectives.vae import VAEObjective
from wan_train.plugins import find, plugin_manager
from wan_train.randomness import generator

Make = Callable[..., VAEObjective]
PHASES = [{"until": 0.25, "frames": 5, "size": 16, "batch": 3}, {"until": 1.0, "frames": 9, "size": 24}]


class Places:
    """Clips whose red, green and blue are the pixel's frame, row and column, each plus 100 times the clip's index."""

    def __init__(self, length: int = 7) -> None:
        self.length = length

    def __len__(self) -> int:
        return self.length

    def video(self, indices: Sequence[int]) -> Tensor:
        t, y, x = torch.meshgrid(torch.arange(13.0), torch.arange(32.0), torch.arange(40.0), indexing="ij")
        return torch.stack([torch.stack([t, y, x]) + 100 * index for index in indices])


@pytest.fixture
def make(tmp_path: Path) -> Make:
    def build(dataset: Any = None, **settings: Any) -> VAEObjective:
        torch.manual_seed(0)
        fields = {"architecture": {"base_dim": 4, "decoder_base_dim": 4, "z_dim": 4}, "phases": PHASES[:1], **settings}
        data = dataset or Shapes(frames=5, size=(16, 16), length=4)
        objective = VAEObjective(fields, data, tmp_path, "cpu", plugin_manager())
        for param in objective.vae.parameters():  # what starts at zero or one would hide what it does
            torch.nn.init.normal_(param, std=0.3)
        return objective

    return build


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def draw(seed: int) -> Any:
    """The draws of a step."""
    return lambda sample, stream: generator(seed, 0, sample, stream)


def loss(objective: VAEObjective, seed: int) -> tuple[Tensor, dict[str, Tensor]]:
    losses, facts = objective.losses(objective.batch((0, 1), draw(seed), 0.0))
    return losses.mean(), {name: values.mean() for name, values in facts.items()}


@pytest.mark.parametrize(
    ("progress", "shape"), [(0.0, (3, 3, 5, 16, 16)), (0.2499, (3, 3, 5, 16, 16)), (0.25, (2, 3, 9, 24, 24)), (1.0, (2, 3, 9, 24, 24))]
)
def test_crops_are_windows_of_the_phases_size(make: Make, progress: float, shape: tuple[int, ...]) -> None:
    objective = make(Places(), phases=PHASES)
    samples = (3, 6, 1)[: objective.batch_size(2, progress)]
    crops = objective.batch(samples, draw(3), progress).video
    assert crops.shape == shape
    for sample, crop in zip(samples, crops, strict=True):
        index, corner = int(crop[0, 0, 0, 0] // 100), crop[:, 0, 0, 0]
        assert index == sample
        t, y, x = (int(value) % 100 for value in corner)
        assert torch.equal(crop, objective.dataset.video([index])[0, :, t : t + shape[2], y : y + shape[3], x : x + shape[4]])


def test_every_place_is_drawn_and_only_by_the_draws_of_the_sample(make: Make) -> None:
    objective = make(Places(), phases=PHASES)
    corners = torch.cat([objective.batch((0, 1), draw(seed), 0.0).video[:, :, 0, 0, 0] for seed in range(150)])
    for axis, (have, want) in enumerate([(13, 5), (32, 16), (40, 16)]):
        assert set((corners[:, axis] % 100).tolist()) == set(range(have - want + 1))
    both, alone = objective.batch((4, 5), draw(5), 0.0).video, objective.batch((5,), draw(5), 0.0).video
    assert torch.equal(both[1:], alone)


def terms(objective: VAEObjective, seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The batch and the outputs that `loss` draws from this seed."""
    batch = objective.batch((0, 1), draw(seed), 0.0)
    return batch.video, *objective.vae.reconstruct(batch.video, batch.generators)


def test_the_kl_term_is_that_of_the_posterior_against_a_unit_normal(make: Make) -> None:
    objective = make(l1=0.0, kl=1.0)
    _, _, mean, logvar = terms(objective, 1)
    expected = kl_divergence(Normal(mean, (0.5 * logvar).exp()), Normal(0.0, 1.0)).mean()
    found, figures = loss(objective, 1)
    assert expected > 0.01
    assert torch.isclose(found, expected, rtol=1e-5)
    assert figures["kl"] == pytest.approx(expected.item(), rel=1e-5)
    wrong = kl_divergence(Normal(0.0, 1.0), Normal(mean, (0.5 * logvar).exp())).mean()
    assert not torch.isclose(found, wrong, rtol=1e-2)  # the other way round is another number


def test_the_loss_is_the_weighted_sum_of_its_terms(make: Make) -> None:
    objective = make(l1=2.0, l2=3.0, log_l2=0.7, kl=0.5)
    video, output, mean, logvar = terms(objective, 1)
    l1, l2 = (output - video).abs().mean(), (output - video).square().mean()
    kl = kl_divergence(Normal(mean, (0.5 * logvar).exp()), Normal(0.0, 1.0)).mean()
    found, figures = loss(objective, 1)
    each = (output - video).square().flatten(1).mean(1)
    assert torch.isclose(found, 2 * l1 + 3 * l2 + 0.7 * (each + 1e-4).log().mean() + 0.5 * kl, rtol=1e-5)
    assert figures["l1"] == pytest.approx(l1.item(), rel=1e-5)
    assert figures["psnr"] == pytest.approx((10 * torch.log10(4 / each)).mean().item(), rel=1e-5)
    assert torch.equal(found, loss(objective, 1)[0])
    assert not torch.isclose(found, loss(objective, 2)[0], rtol=1e-4)


@torch.no_grad()
def test_the_posterior_is_sampled_in_training_only(make: Make) -> None:
    objective = make()
    video = objective.dataset.video([0])
    assert objective.vae.training
    first, second = (objective.vae.reconstruct(video, seeded(seed))[0] for seed in (1, 2))
    assert (first - second).abs().max() > 1e-3
    objective.vae.eval()
    first, second = (objective.vae.reconstruct(video)[0] for _ in range(2))
    assert torch.equal(first, second)
    assert torch.allclose(first.clamp(-1, 1), objective.vae.decode(objective.vae.encode(video)), atol=1e-5)


def test_every_parameter_gets_a_gradient_and_one_group(make: Make) -> None:
    objective = make(kl=0.1)
    loss(objective, 0)[0].backward()
    named = dict(objective.vae.named_parameters())
    assert [name for name, param in named.items() if param.grad is None or not param.grad.abs().max() > 0] == []
    groups = objective.parameter_groups()
    grouped = [id(param) for group in groups for param in group["params"]]
    assert sorted(grouped) == sorted(map(id, named.values()))


def test_muon_gets_the_inner_convolutions_alone(make: Make) -> None:
    objective = make()
    muon = next(group["params"] for group in objective.parameter_groups() if group.get("muon"))
    names = {id(param): name for name, param in objective.vae.named_parameters()}
    marked = {names[id(param)] for param in muon}
    assert all(param.ndim in (4, 5) and param[0].numel() > 1 for param in muon)
    assert not any("head" in name or name.split(".")[1] in ("conv_in", "weight") or name.endswith(("gamma", "bias")) for name in marked)
    convolutions = {name for name, param in objective.vae.named_parameters() if name.endswith("weight") and param.ndim > 3}
    edges = {f"{half}.{end}.weight" for half in ("encoder", "decoder") for end in ("conv_in", "head.conv")}
    assert marked == convolutions - edges - {"quant_conv.weight", "post_quant_conv.weight"}


def test_previews_are_clips_that_training_never_draws_above_their_reconstructions(make: Make) -> None:
    objective = make(validation=4)
    objective.vae.eval()
    clips, figures = objective.measure(objective.preview(objective.modules, range(4)))
    truth = objective.dataset.video(range(4, 8))  # the data set counts 4
    assert torch.equal(clips[:3], truth[:3])
    decoded = torch.cat([objective.vae.decode(objective.vae.encode(clip[None])) for clip in truth])
    assert torch.allclose(clips[3:], decoded[:3], atol=1e-6)
    errors = [10 * torch.log10(4 / (a - b).square().mean()) for a, b in zip(decoded, truth, strict=True)]
    assert figures["val_psnr"] == pytest.approx(torch.stack(errors).mean().item(), rel=1e-4)


def test_the_exported_vae_normalises_the_training_clips(make: Make, tmp_path: Path) -> None:
    objective = make(statistics=4)
    assert objective.vae.config.latents_std == ()
    objective.export(objective.modules, str(tmp_path / "export"))
    vae = find("wan_vaes", str(tmp_path / "export" / "vae")).load()
    assert (len(vae.config.latents_mean), len(vae.config.latents_std)) == (4, 4)

    def figures(model: Any) -> tuple[Tensor, Tensor]:
        latents = torch.cat([model.encode(objective.dataset.video([i])) for i in range(4)]).transpose(0, 1).flatten(1)
        return latents.mean(1), latents.std(1, correction=0)

    mean, deviation = figures(vae)
    assert mean.abs().max() < 0.02
    assert (deviation - 1).abs().max() < 0.02
    vae.config = vae.config.model_copy(update={"latents_mean": (), "latents_std": ()})
    mean, deviation = figures(vae)
    assert max(mean.abs().max(), (deviation - 1).abs().max()) > 0.1  # it was not so before


@pytest.mark.parametrize(("trains", "kept"), [(["decoder", "decoder_head"], True), (["encoder_head", "decoder_input"], False), ([], False)])
def test_statistics_stay_where_the_encoder_does(make: Make, tmp_path: Path, trains: list[str], kept: bool) -> None:
    """A backbone was trained on the latents as they are: a better decoder must not move them."""
    first = make(statistics=4)
    first.export(first.modules, str(tmp_path / "first"))
    phases = [{"until": 1.0, "frames": 5, "size": 16, "trains": trains}]
    dataset = Shapes(seed=9, frames=5, size=(16, 16), length=8, split="heldout")
    objective = make(dataset, vae=str(tmp_path / "first" / "vae"), init="pretrained", architecture={}, phases=phases, statistics=4)
    first_vae = find("wan_vaes", str(tmp_path / "first" / "vae")).load()
    objective.vae.load_state_dict(first_vae.state_dict())  # and not the weights that `make` draws
    objective.export(objective.modules, str(tmp_path / "second"))
    second_vae = find("wan_vaes", str(tmp_path / "second" / "vae")).load()
    assert (second_vae.config.latents_std == first_vae.config.latents_std) is kept
    video = dataset.video([0])
    assert torch.equal(second_vae.encode(video), first_vae.encode(video)) is kept


def test_statistics_are_of_all_data_sets_of_a_mix(make: Make, tmp_path: Path) -> None:
    """The last quarter of a mix is white, and so white counts a quarter in the statistics."""

    class White(Shapes):
        def video(self, indices: Any) -> Tensor:
            return torch.ones_like(super().video(indices))

    small = {"frames": 5, "size": (16, 16)}
    objective = make(Mix({"data": Shapes(**small, length=12), "white": White(**small, length=4)}), statistics=8)
    objective.export(objective.modules, str(tmp_path / "export"))
    vae, own = objective.vae, objective.vae.config.latents_mean
    vae.fit_normaliser(objective.dataset.video([i]) for i in range(0, 16, 2))
    assert vae.config.latents_mean == pytest.approx(own, abs=1e-3)  # weights in fp16
    vae.fit_normaliser(objective.dataset.video([i]) for i in range(8))
    assert vae.config.latents_mean != pytest.approx(own, abs=1e-2)


def test_fresh_weights_forget_the_statistics_of_the_old_ones(make: Make, micro_vae: Path) -> None:
    assert find("wan_vaes", str(micro_vae)).load().config.latents_std == (0.5,) * 4
    assert make(vae=str(micro_vae), architecture={"z_dim": 6}).vae.config.latents_std == ()
    assert make(vae=str(micro_vae), architecture={}, init="pretrained").vae.config.latents_std == (0.5,) * 4


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"phases": []}, r"phases: .*at least 1 item"),
        ({"phases": [{"until": 1.0, "frames": 9, "size": 16}]}, r"9x16x16 .* do not fit into the data's clips of 5x16x16"),
        ({"phases": [{"until": 1.0, "frames": 4, "size": 16}]}, r"4x16x16 .* do not divide: frames must be 1 \+ 4k"),
        ({"phases": [{"until": 1.0, "frames": 5, "size": 12}]}, r"5x12x12 .* multiples of 8 and 8"),
        ({"validation": 0}, r"'objective\.settings': validation: .*\(got 0\)"),
        ({"unknown": 1}, r"unknown: Extra inputs are not permitted \(got 1\)"),
        ({"init": "zero"}, r"init = 'zero'.*use 'random'"),
        ({"init": "pretrained"}, r"'pretrained' with architecture"),
        ({"architecture": {"depth": 3}}, r"architecture of 'tiny': depth: Extra inputs"),
    ],
)
def test_wrong_settings_are_refused_in_one_line(make: Make, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        make(**settings)
    assert "\n" not in str(caught.value)

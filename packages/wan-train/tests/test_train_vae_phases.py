"""The phases of a VAE's training: inflation, parts that learn while others stay, an adversary, a perceptual term, mixed shapes."""

from __future__ import annotations

import tomllib
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from layout_tasks import train
from torch import Tensor, nn
from wan_train import TrainConfig, Trainer
from wan_train.data.shapes import Shapes
from wan_train.objectives.discriminator import Discriminator, adversarial
from wan_train.objectives.inflation import inflate
from wan_train.objectives.vae import VAEObjective
from wan_train.plugins import plugin_manager
from wan_train.randomness import generator
from wan_train.store import shards
from wan_train.store.manifest import folder_name
from wan_vae.config import TINY
from wan_vae.model import WanVAE

Recipe = Callable[..., TrainConfig]
Group = Callable[..., list[Any]]
TOLERANCE = 1e-5
NARROW = {"base_dim": 4, "decoder_base_dim": 4, "z_dim": 4}
PHASES = """[
    {until = 0.3, frames = 1, size = 16},
    {until = 0.6, frames = 5, size = 16, inflate = true, trains = ["encoder_head", "decoder"]},
    {until = 1.0, frames = [1, 5], size = [8, 16], adversary = 0.5},
]"""


class Distance(nn.Module):
    """A network as LPIPS is one: features, unit vectors of them, squared differences."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(8, 8, 3), nn.Softplus())

    def unit(self, pictures: Tensor) -> Tensor:
        found = self.features(pictures)
        return found / found.square().sum(1, keepdim=True).sqrt()

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return (self.unit(a) - self.unit(b)).square().mean((1, 2, 3), keepdim=True)


@pytest.fixture
def network(tmp_path: Path) -> Path:
    torch.manual_seed(1)
    path = tmp_path / "lpips.pt"
    torch.jit.script(Distance()).save(str(path))
    return path


@pytest.fixture
def everything(network: Path) -> list[str]:
    """Overrides: pictures, then an inflated VAE of which parts learn, then an adversary, and a perceptual term in all of them."""
    own = [f"objective.settings.phases={PHASES}", "objective.settings.perceptual=1.0", f"objective.settings.perceptual_weights={network}"]
    return [*own, "objective.settings.discriminator={base_dim = 4, scale = 0.5}", "steps=6", "batch_size=4", "data.settings.length=8"]


@pytest.fixture
def phased(vae_recipe: Recipe, everything: list[str]) -> Recipe:
    return lambda *overrides: vae_recipe(*everything, *overrides)


def made(tmp_path: Path, **settings: Any) -> VAEObjective:
    torch.manual_seed(0)
    data = Shapes(frames=9, size=(24, 24), length=4)
    return VAEObjective({"architecture": NARROW, **settings}, data, tmp_path, "cpu", plugin_manager())


def busy(**fields: Any) -> WanVAE:
    """A VAE in which no weight is zero."""
    torch.manual_seed(0)
    vae = WanVAE(TINY.model_copy(update={**NARROW, **fields}))
    for param in vae.parameters():
        nn.init.normal_(param, std=0.3)
    return vae


def averages(vae: nn.Module) -> dict[str, Tensor]:
    return {name: param.detach() + 1 for name, param in vae.named_parameters()}


def draw(step: int) -> Any:
    return lambda sample, stream: generator(0, step, sample, stream)


def losses(objective: VAEObjective) -> tuple[Tensor, dict[str, Tensor]]:
    """Those of the first step; what is random in a batch is drawn once, so every call makes its own."""
    return objective.losses(objective.batch((0, 1), draw(0), 0.0))


def reconstructed(objective: VAEObjective) -> tuple[Tensor, Tensor]:
    """The clips of the first step, and what is made of them."""
    batch = objective.batch((0, 1), draw(0), 0.0)
    return batch.video, objective.vae.reconstruct(batch.video, batch.generators)[0]


def saved(config: TrainConfig, step: int, prefix: str = "") -> dict[str, Tensor]:
    return shards.read_whole(config.output / "checkpoints" / folder_name(step), prefix)


@torch.no_grad()
def test_an_inflated_vae_codes_every_frame_as_the_picture_it_is() -> None:
    vae = busy(temporal_downsample=(False, False)).eval()
    video = torch.rand(1, 3, 4, 16, 16, generator=torch.Generator().manual_seed(1)) * 2 - 1

    def codes() -> tuple[Tensor, Tensor]:
        pictures = [vae.reconstruct(video[:, :, t : t + 1])[:2] for t in range(4)]
        return vae.reconstruct(video)[0], torch.cat([output for output, _ in pictures], dim=2)

    together, apart = codes()
    assert (together - apart)[:, :, 1:].abs().max() > 0.1
    inflate(vae, averages(vae))
    together, same = codes()
    assert torch.equal(apart, same)  # pictures are coded as before
    assert torch.allclose(together, apart, atol=1e-5)


def test_inflation_leaves_what_single_frames_used_or_never_met() -> None:
    vae = busy()
    before, averaged = {name: param.detach().clone() for name, param in vae.named_parameters()}, averages(vae)
    inflate(vae, averaged)
    muted = []
    for shift, found in ((0, dict(vae.named_parameters())), (1, averaged)):
        for name, value in found.items():
            if torch.equal(value, before[name] + shift):
                continue
            muted.append(name)
            assert torch.equal(value[:, :, -1], before[name][:, :, -1] + shift)
            assert not value[:, :, :-1].any()
    temporal = {f"{name}.weight" for name, module in vae.named_modules() if isinstance(module, nn.Conv3d) and module.kernel_size[0] == 3}
    strided = {"encoder.levels.0.resample.time_conv.weight", "encoder.levels.1.resample.time_conv.weight"}
    assert sorted(muted) == sorted(2 * list(temporal - strided))
    assert strided < temporal


@pytest.mark.parametrize(
    ("before", "now", "begins", "inflates"),
    [(-0.1, 0.0, True, False), (0.1, 0.2, False, False), (0.2, 0.3, True, True), (0.3, 0.4, False, False), (0.5, 0.6, True, False),
     (0.2, 0.7, True, True), (-0.1, 0.3, True, True), (0.9, 1.0, False, False)],
)  # fmt: skip
def test_a_vae_is_inflated_where_its_phase_begins_and_nowhere_else(
    tmp_path: Path, before: float, now: float, begins: bool, inflates: bool
) -> None:
    objective = made(tmp_path, phases=tomllib.loads(f"phases = {PHASES}")["phases"], discriminator={"base_dim": 4})
    weight = objective.vae.encoder.conv_in.weight
    assert objective.enter(now, before, {"vae": averages(objective.vae)}) is begins
    assert bool(weight[:, :, 0].any()) is not inflates


@pytest.mark.parametrize("trains", [["encoder_head", "decoder_input"], ["decoder_head"], ["encoder", "decoder"], []])
def test_parts_that_are_not_trained_do_not_move_and_the_others_do(vae_recipe: Recipe, trains: list[str]) -> None:
    phases = f"[{{until = 1.0, frames = 5, size = 16, trains = {trains}}}]"
    trainer = Trainer(vae_recipe(f"objective.settings.phases={phases}", "steps=3", "optimiser.weight_decay=0.1", "save_every=0"))
    parts = trainer.objective.vae.parameter_groups()
    before = {name: [param.detach().clone() for param in params] for name, params in parts.items()}
    trainer.run()
    moved = {name: [not torch.equal(*pair) for pair in zip(params, before[name], strict=True)] for name, params in parts.items()}
    learning = set(trains) or set(parts)
    assert {name for name, each in moved.items() if all(each)} == learning
    assert {name for name, each in moved.items() if any(each)} == learning


@pytest.mark.parametrize(("precision", "stops"), [("fp32", (2, 3, 5)), ("bf16", (4,))])
def test_a_run_that_is_resumed_in_any_phase_ends_with_the_same_bits(
    phased: Recipe, tmp_path: Path, precision: str, stops: tuple[int, ...]
) -> None:
    own = [f"precision={precision}", "save_every=100"]  # and at the end
    whole = phased(*own, f"output={tmp_path / 'whole'}")
    Trainer(whole).run()
    expected = saved(whole, 6)
    for stop in stops:
        config = phased(*own, f"output={tmp_path / f'stopped-{stop}'}")
        Trainer(config).run(until=stop)
        torch.manual_seed(123)
        Trainer(config).run(resume=True)
        found = saved(config, 6)
        assert found.keys() == expected.keys()
        assert [name for name, value in found.items() if not torch.equal(value, expected[name])] == []


def test_the_discriminator_is_kept_and_averaged_but_not_exported(phased: Recipe) -> None:
    config = phased("save_every=1", "keep=20")
    trainer = Trainer(config)
    folder = trainer.run()
    assert [file.name for file in folder.iterdir()] == ["vae"]
    kept = {step: saved(config, step, "modules/discriminator/") for step in (1, 4, 5, 6)}
    assert all(torch.equal(value, kept[1][name]) for name, value in kept[4].items())  # the adversary comes later
    assert not any(torch.equal(value, kept[4][name]) for name, value in kept[5].items())
    averaged = saved(config, 6, "ema/discriminator/")
    assert averaged.keys() == kept[6].keys()
    assert not any(torch.equal(value, kept[6][name]) for name, value in averaged.items())
    rates = [group["lr"] for group in trainer.optimiser.parts[0][0].param_groups]
    assert rates == [2e-3, 1e-3]
    assert "discriminator" not in Trainer(phased("objective.settings.phases=[{until = 1.0, frames = 5, size = 16}]")).objective.modules


@pytest.mark.xdist_group("distributed")
def test_two_processes_compute_what_one_does(group: Group, vae_toml: Path, everything: list[str]) -> None:
    recipe, own = str(vae_toml), [*everything, "optimiser.name=adamw", "optimiser.weight_decay=0.1"]
    alone = train(recipe, own, 8)
    assert any(name.startswith("discriminator.") for name in alone["gradients"][7])
    for answer in (*group(2, train, recipe, own, 8), train(recipe, [*own, "micro_batch=1"], 8)):
        assert max(abs(a - b) for a, b in zip(answer["losses"], alone["losses"], strict=True)) <= TOLERANCE
        pairs = [(answer["gradients"][7], alone["gradients"][7], TOLERANCE), (answer["weights"], alone["weights"], 10 * TOLERANCE)]
        for found, expected, limit in pairs:
            assert found.keys() == expected.keys()
            assert max(abs(found[name] - value).max() for name, value in expected.items()) <= limit


@pytest.mark.parametrize("shape", [(1, 16, 16), (5, 16, 16), (9, 24, 40), (1, 8, 8)])
def test_the_discriminator_judges_places_of_pictures_and_videos(shape: tuple[int, ...]) -> None:
    model = Discriminator(4, levels=3)
    video = torch.randn(2, 3, *shape)
    logits = model(video)
    assert logits.shape == (2, 1, {1: 1, 5: 2, 9: 3}[shape[0]], shape[1] // 8, shape[2] // 8)
    assert torch.allclose(model(video[:1]), logits[:1], atol=1e-5)  # each sample by itself


def test_the_discriminator_learns_to_tell_videos_from_their_blurred_ones() -> None:
    torch.manual_seed(0)
    model = Discriminator(8, levels=2)
    optimiser = torch.optim.AdamW(model.parameters(), 2e-3)
    video = Shapes(frames=5, size=(16, 16), length=16).video(range(16))
    blurred = nn.functional.avg_pool3d(video, (1, 3, 3), stride=1, padding=(0, 1, 1)).requires_grad_()
    found = []
    for _ in range(60):
        _, loss = adversarial(model, video, blurred, blurred.flatten(1).sum(1))
        loss.mean().backward()
        optimiser.step()
        optimiser.zero_grad()
        found.append(loss.mean().item())
    assert found[0] == pytest.approx(1, abs=0.1)
    assert found[-1] < 0.3
    assert blurred.grad is None  # nothing reached what is judged


def test_the_generators_gradient_reaches_the_output_alone_at_the_norm_of_the_rest() -> None:
    torch.manual_seed(0)
    model, video = Discriminator(4, levels=2), torch.randn(3, 3, 5, 16, 16)
    output = torch.randn(3, 3, 5, 16, 16, requires_grad=True)
    weights = torch.tensor([1.0, 20.0, 0.0])
    loss, _ = adversarial(model, video, output, weights * (output - video).abs().flatten(1).mean(1))
    assert torch.allclose(loss, -model(output).flatten(1).mean(1))
    loss.sum().backward()
    assert all(param.grad is None for param in model.parameters())
    (pull,) = torch.autograd.grad(-model(output).flatten(1).mean(1).sum(), output)
    assert output.grad is not None
    norms = output.grad.flatten(1).norm(dim=1)
    assert norms.tolist() == pytest.approx((weights / (3 * 5 * 16 * 16) ** 0.5).tolist(), rel=1e-4)
    assert torch.cosine_similarity(output.grad[:2].flatten(1), pull[:2].flatten(1)).tolist() == pytest.approx([1, 1], abs=1e-4)


def test_each_side_of_the_game_gets_its_own_gradient(tmp_path: Path) -> None:
    """The gradient of the whole loss is that of the VAE's terms in the VAE, and that of the hinge loss in the discriminator."""
    phase = {"until": 1.0, "frames": 5, "size": 16}
    plain, game = (made(tmp_path, phases=[{**phase, **more}], discriminator={"base_dim": 4}) for more in ({}, {"adversary": 1e-12}))
    losses(plain)[0].sum().backward()
    found, figures = losses(game)
    found.sum().backward()
    for (name, one), (_, other) in zip(plain.vae.named_parameters(), game.vae.named_parameters(), strict=True):
        assert torch.allclose(one.grad, other.grad, atol=1e-7), name
    model = game.modules["discriminator"]
    real, fake = (model(clips.detach()).flatten(1) for clips in reconstructed(game))
    hinge = 0.5 * ((1 + fake).clamp_min(0).mean(1) + (1 - real).clamp_min(0).mean(1))
    assert torch.allclose(hinge, figures["discriminator"], atol=1e-6)
    expected = torch.autograd.grad(hinge.sum(), list(model.parameters()))
    assert all(torch.allclose(param.grad, value, atol=1e-6) for param, value in zip(model.parameters(), expected, strict=True))
    assert all(value.any() for value in expected[:-1])  # the last bias lowers one side and lifts the other


def test_the_perceptual_term_is_the_networks_distance_of_the_frames(tmp_path: Path, network: Path) -> None:
    phases = [{"until": 1.0, "frames": 5, "size": 16}]
    plain = made(tmp_path, phases=phases)
    objective = made(tmp_path, phases=phases, perceptual=2.0, perceptual_weights=network)
    objective.vae.load_state_dict(plain.vae.state_dict())
    without, (found, figures) = losses(plain)[0], losses(objective)
    judge, pairs = torch.jit.load(str(network)), zip(*reconstructed(plain), strict=True)
    expected = torch.stack([judge(a.transpose(0, 1), b.transpose(0, 1)).mean() for a, b in pairs])
    assert expected.min() > 1e-4
    assert torch.allclose(found - without, 2 * expected, atol=1e-6)
    assert torch.allclose(figures["perceptual"], expected, atol=1e-6)
    both, own, term = (
        torch.autograd.grad(loss.sum(), trained.vae.last_layer)[0]
        for loss, trained in ((found, objective), (without, plain), (2 * expected, plain))
    )
    assert torch.allclose(both - own, term, atol=1e-6)
    assert term.abs().max() > 1e-4


def test_a_perceptual_term_without_a_network_is_off_and_said_to_be(tmp_path: Path) -> None:
    phases = [{"until": 1.0, "frames": 5, "size": 16}]
    with pytest.warns(UserWarning, match=r"^the perceptual term is off: give a network in objective\.settings\.perceptual_weights$"):
        objective = made(tmp_path, phases=phases, perceptual=3.0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plain = made(tmp_path, phases=phases)
    found, figures = losses(objective)
    assert torch.equal(found, losses(plain)[0])
    assert "perceptual" not in figures


def test_a_step_has_one_of_the_phases_shapes_for_all_of_its_samples(tmp_path: Path) -> None:
    objective = made(tmp_path, phases=[{"until": 1.0, "frames": [1, 5, 9], "size": [8, 24]}])
    shapes = [objective.batch((0, 1), draw(step), 0.0).video.shape for step in range(40)]
    assert {(shape[2], *shape[3:]) for shape in shapes} == {(frames, size, size) for frames in (1, 5, 9) for size in (8, 24)}
    assert [objective.batch((3,), draw(step), 0.0).video.shape[1:] for step in range(40)] == [shape[1:] for shape in shapes]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"trains": ["decoder_tail"]}, r"trains 'decoder_tail', and the parts of the VAE are encoder, encoder_head, .*, decoder_head"),
        ({"adversary": 0.5, "size": [8, 24]}, r"a discriminator of 4 levels needs a size of 16 or more, got 8"),
        ({"frames": [1, 17]}, r"crops of 17x16x16 .* do not fit"),
        ({"size": []}, r"phases\.0\.size: .*at least 1 item"),
        ({"frames": 0}, r"phases\.0\.frames\.0: .*greater than 0 \(got 0\)"),
    ],
)
def test_wrong_phases_are_refused_in_one_line(tmp_path: Path, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        made(tmp_path, phases=[{"until": 1.0, "frames": 5, "size": 16, **settings}], discriminator={"levels": 4})
    assert "\n" not in str(caught.value)


class Mean(nn.Module):
    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return (a - b).square().mean()


class Stiff(nn.Module):
    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return (a.detach() - b).square().mean((1, 2, 3))


class Narrow(nn.Module):
    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return (a.view(-1, 3 * 8 * 8) - b.view(-1, 3 * 8 * 8) * torch.ones(7)).mean(1)


@pytest.mark.parametrize(
    ("judge", "message"),
    [(Mean(), r"gave \[\] for two batches \[2, 3, 16, 16\], expected a distance for each of 2"), (Stiff(), "has no gradients"),
     (Narrow(), r"does not take two batches \[2, 3, 16, 16\]: ")],
)  # fmt: skip
def test_a_network_that_cannot_be_trained_with_is_refused_at_the_start(tmp_path: Path, judge: nn.Module, message: str) -> None:
    torch.jit.script(judge).save(str(tmp_path / "judge.pt"))
    own = {"phases": [{"until": 1.0, "frames": 1, "size": 16}], "perceptual": 1.0, "perceptual_weights": tmp_path / "judge.pt"}
    with pytest.raises(ValueError, match=message) as caught:
        made(tmp_path, **own)
    assert "\n" not in str(caught.value)

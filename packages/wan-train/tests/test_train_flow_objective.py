"""The rectified-flow objective: the convention of the velocity, what is drawn, who is trained and what is encoded once."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from wan_train.cli import main
from wan_train.data.shapes import Shapes
from wan_train.data.tensor_files import TensorFiles
from wan_train.objectives.flow import RectifiedFlow
from wan_train.plugins import find, plugin_manager
from wan_train.randomness import generator

Make = Callable[..., RectifiedFlow]
SMALL = {"dim": 32, "ffn_dim": 32, "num_heads": 2, "num_layers": 2, "in_dim": 4, "out_dim": 4}


@pytest.fixture
def make(tmp_path: Path, micro_vae: Path) -> Make:
    def build(data: dict[str, Any] | None = None, **settings: Any) -> RectifiedFlow:
        torch.manual_seed(0)
        fields = {"vae": str(micro_vae), "architecture": SMALL, "clips": 1, "preview_prompts": 3, "preview_steps": 2, **settings}
        dataset = Shapes(**{"frames": 5, "size": (16, 16), "length": 4, **(data or {})})
        return RectifiedFlow(fields, dataset, tmp_path, "cpu", plugin_manager())

    return build


def prepared(objective: RectifiedFlow) -> RectifiedFlow:
    objective.prepare()
    return objective


def loss(objective: RectifiedFlow, count: int, seed: int = 0, progress: float = 0.0) -> Tensor:
    """Of a step of samples that are drawn again and again; every place of the step has draws of its own."""
    samples = [place % objective.samples for place in range(count)]
    places = iter(range(count * 10))
    batch = objective.batch(samples, lambda sample, stream: generator(seed, next(places), sample, stream), progress)
    return objective.losses(batch)[0].mean()


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


class Exact(nn.Module):
    """Knows the one clean clip, so it can tell the noise and with it the velocity, noise - data; `sign` -1 errs."""

    def __init__(self, clean: Tensor, sign: float = 1.0) -> None:
        super().__init__()
        self.clean, self.sign = clean, sign
        self.timesteps: list[Tensor] = []

    def encode_context(self, text: list[Tensor]) -> list[Tensor]:
        return text

    def forward(self, latents: Tensor, timestep: Tensor, context: list[Tensor]) -> Tensor:
        self.timesteps.append(timestep)
        sigma = (timestep / 1000).view(-1, 1, 1, 1, 1)
        return self.sign * (latents - self.clean) / sigma


@pytest.mark.parametrize(("sign", "right"), [(1.0, True), (-1.0, False)])
def test_the_velocity_is_noise_minus_data(make: Make, sign: float, right: bool) -> None:
    objective = prepared(make())
    objective.backbone = Exact(objective.latents, sign)
    found = loss(objective, 16).item()
    assert (found < 1e-6) is right
    assert right or found > 1


def test_a_backbone_that_takes_sigma_for_the_share_of_data_is_wrong(make: Make) -> None:
    objective = prepared(make())

    class Turned(Exact):
        def forward(self, latents: Tensor, timestep: Tensor, context: list[Tensor]) -> Tensor:
            return super().forward(latents, 1000 - timestep, context)

    objective.backbone = Turned(objective.latents)
    assert loss(objective, 16).item() > 0.1


@pytest.mark.parametrize("autocast", [False, True])
def test_timesteps_are_a_thousand_sigmas_in_float32(make: Make, autocast: bool) -> None:
    objective = prepared(make())
    objective.backbone = Exact(objective.latents)
    drawn: list[Tensor] = []
    sigmas = objective.sigmas
    objective.sigmas = lambda *given: drawn.append(sigmas(*given)) or drawn[-1]
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        loss(objective, 32)
    (timesteps,) = objective.backbone.timesteps
    assert timesteps.dtype == torch.float32
    assert timesteps.shape == (32,)
    assert torch.equal(timesteps, 1000 * torch.cat(drawn))


@pytest.mark.parametrize(("shift", "mean", "std"), [(3.0, 0.0, 1.0), (1.0, 0.0, 1.0), (5.0, 0.5, 0.7)])
def test_sigmas_are_shifted_logit_normal(make: Make, shift: float, mean: float, std: float) -> None:
    sigmas = make(shift=shift, logit_mean=mean, logit_std=std).sigmas(40_001, seeded(0))
    assert 0 < sigmas.min() < sigmas.max() < 1
    for quantile, normal in ((0.25, -0.67449), (0.5, 0.0), (0.75, 0.67449)):
        u = 1 / (1 + math.exp(-(mean + std * normal)))
        assert sigmas.quantile(quantile).item() == pytest.approx(shift * u / (1 + (shift - 1) * u), abs=0.006)


@pytest.mark.parametrize(("share", "low", "high"), [(0.0, 0.0, 0.0), (0.1, 0.07, 0.13), (1.0, 1.0, 1.0)])
def test_a_share_of_the_prompts_is_dropped_and_the_rest_are_the_clips_own(make: Make, share: float, low: float, high: float) -> None:
    objective = prepared(make(text_drop=share, clips=2))
    objective.backbone = Exact(objective.latents[:1])
    asked: list[str] = []
    prompt = objective._prompt
    objective._prompt = lambda *given: asked.append(prompt(*given)) or asked[-1]
    loss(objective, 1000)
    dropped = asked.count("") / len(asked)
    assert low <= dropped <= high
    captions = {caption for index in range(2) for caption in objective.dataset.captions(index)}
    assert set(asked) - {""} == (captions if share < 1 else set())  # in 900 draws each of the 32 comes up


def test_captions_and_latents_are_of_one_clip(make: Make) -> None:
    objective = prepared(make(text_drop=0.0, clips=3))
    pairs: list[tuple[Tensor, str]] = []
    prompt = objective._prompt
    asked: list[str] = []
    objective._prompt = lambda *given: asked.append(prompt(*given)) or asked[-1]

    class Still(Exact):
        def forward(self, latents: Tensor, timestep: Tensor, context: list[Tensor]) -> Tensor:
            pairs.extend(zip(latents, asked, strict=True))
            return latents

    objective.backbone = Still(objective.latents[:1])
    objective.sigmas = lambda count, generator, shift: torch.full((count,), 1e-6)  # nothing but data
    loss(objective, 12)
    for latents, prompt in pairs:
        index = int((objective.latents - latents).abs().amax((1, 2, 3, 4)).argmin())
        assert prompt in objective.dataset.captions(index)


def test_a_batch_is_fixed_by_its_generator(make: Make) -> None:
    objective = prepared(make(train_text_encoder=True, clips=3))
    nn.init.normal_(objective.backbone.head.proj.weight, std=0.1)  # starts at zero, where the loss would not see the model
    first, second, other = (loss(objective, 4, seed) for seed in (7, 7, 8))
    torch.manual_seed(99)
    assert torch.equal(first, second)
    assert torch.equal(first, loss(objective, 4, 7, 0.5))
    assert not torch.isclose(first, other, rtol=1e-5)


def test_muon_gets_the_matrices_of_the_blocks_and_never_the_text_encoders(make: Make) -> None:
    objective = make(train_text_encoder=True)
    names = {id(param): f"{part}.{name}" for part, module in objective.modules.items() for name, param in module.named_parameters()}
    groups = objective.parameter_groups()
    muon = [param for group in groups if group.get("muon") for param in group["params"]]
    rest = [param for group in groups if not group.get("muon") for param in group["params"]]
    assert sorted(map(id, muon + rest)) == sorted(names)
    assert all(param.ndim == 2 for param in muon)
    marked = {names[id(param)] for param in muon}
    layers = {"self_attn.q", "self_attn.k", "self_attn.v", "self_attn.o", "cross_attn.q", "cross_attn.k", "cross_attn.v", "cross_attn.o"}
    layers |= {"ffn.0", "ffn.2"}
    assert marked == {f"backbone.trunk.blocks.{block}.{layer}.weight" for block in range(2) for layer in layers}


def trained(objective: RectifiedFlow, steps: int = 2) -> None:
    optimiser = torch.optim.SGD([param for group in objective.parameter_groups() for param in group["params"]], lr=0.1)
    for step in range(steps):
        loss(objective, 8, step).backward()
        optimiser.step()
        optimiser.zero_grad()


def test_a_trained_text_encoder_changes(make: Make) -> None:
    objective = prepared(make(train_text_encoder=True))
    assert set(objective.modules) == {"backbone", "text_encoder"}
    before = {name: value.clone() for name, value in objective.text_encoder.state_dict().items()}
    trained(objective)  # the head starts at zero and lets nothing through in the first step
    changed = {name for name, value in objective.text_encoder.state_dict().items() if not torch.equal(value, before[name])}
    assert {"umt5.blocks.0.attn.q.weight", "umt5.token_embedding.weight"} <= changed


def test_a_frozen_text_encoder_stays_and_encodes_each_prompt_once(make: Make) -> None:
    objective = prepared(make(train_text_encoder=False))
    before = {name: value.clone() for name, value in objective.text_encoder.state_dict().items()}
    calls: Counter[str] = Counter()
    encode = objective.text_encoder.encode
    objective.text_encoder.encode = lambda prompts: calls.update(prompts) or encode(prompts)
    trained(objective, steps=4)
    assert set(objective.modules) == {"backbone"}
    assert all(torch.equal(value, before[name]) for name, value in objective.text_encoder.state_dict().items())
    assert len(calls) > 5
    assert set(calls.values()) == {1}
    assert torch.equal(objective.cache.context(""), encode([""])[0])


def cached(folder: Path) -> dict[str, tuple[int, int]]:
    """The files of the latents, and what tells whether they were written again."""
    files = TensorFiles(folder / "cache")
    paths = {key: files.path(key) for key in files.keys() if files.facts(key)["kind"] == "latents"}  # noqa: SIM118
    return {key: (path.stat().st_ino, path.stat().st_mtime_ns) for key, path in paths.items()}


def test_latents_are_encoded_once_and_read_back(make: Make, tmp_path: Path) -> None:
    objective = prepared(make(clips=3))
    files = cached(tmp_path)
    assert len(files) == 3
    encoded = torch.cat([objective.vae.encode(objective.dataset.video([i])) for i in range(3)])
    assert torch.equal(objective.latents, encoded)
    again = prepared(make(clips=3))
    assert torch.equal(again.latents, encoded)
    assert torch.equal(prepared(make(clips=2)).latents, encoded[:2])
    assert cached(tmp_path) == files  # neither rewritten nor joined by others


def test_a_run_reads_what_the_command_has_encoded(make: Make, tmp_path: Path, micro_vae: Path) -> None:
    (tmp_path / "recipe.toml").write_text(
        f'name = "x"\noutput = "{tmp_path}"\nsteps = 1\nbatch_size = 1\n[objective]\nname = "rectified-flow"\n'
        f'settings.vae = "{micro_vae}"\n[data]\nname = "shapes"\nsettings = {{frames = 5, size = [16, 16], length = 4}}\n'
    )
    assert main(["cache", str(tmp_path / "recipe.toml"), "--text-encoder", "none"]) == 0
    files = cached(tmp_path)
    assert len(files) == 4
    prepared(make(clips=3))
    assert cached(tmp_path) == files


@pytest.mark.parametrize("change", ["weights", "normaliser", "data"])
def test_a_cache_is_of_one_vae_and_one_data_set(make: Make, tmp_path: Path, micro_vae: Path, change: str) -> None:
    prepared(make())
    files = cached(tmp_path)
    vae = find("wan_vaes", str(micro_vae)).load()
    if change == "weights":
        vae.encoder.conv_in.weight.data += 0.01
    if change == "normaliser":
        vae.config = vae.config.model_copy(update={"latents_std": (0.25,) * 4})
    vae.save_pretrained(tmp_path / "other")
    data = {"data": {"seed": 1}} if change == "data" else {}
    other = prepared(make(**data, vae=str(tmp_path / "other")))
    assert len(cached(tmp_path)) == 2 * len(files)
    assert files.items() < cached(tmp_path).items()
    assert torch.equal(other.latents, torch.cat([other.vae.encode(other.dataset.video([i])) for i in range(len(other.latents))]))


def test_previews_are_clips_of_the_evaluation_prompts_and_repeat(make: Make) -> None:
    objective = prepared(make(train_text_encoder=True))
    nn.init.normal_(objective.backbone.head.proj.weight, std=0.1)
    made = objective.preview(objective.modules, range(3))
    clips, figures = objective.measure(made)
    assert clips.shape == (3, 3, 5, 16, 16)
    assert -1 <= clips.min() < clips.max() <= 1
    assert {"val_colour", "val_shape", "val_motion", "val_all_right"} <= set(figures)
    assert torch.equal(clips, made)
    assert torch.equal(clips, objective.preview(objective.modules, range(3)))


def test_a_tokenizer_is_trained_on_the_captions(make: Make) -> None:
    objective = prepared(make(train_text_encoder=True, tokenizer=400, clips=4))
    own = find("wan_text_encoders", "tiny").load()
    assert objective.text_encoder.tokenizer.model != own.tokenizer.model
    assert objective.text_encoder.training
    assert objective.modules["text_encoder"] is objective.text_encoder
    trained(objective, steps=1)
    again = make(train_text_encoder=True, tokenizer=400, clips=4)
    assert again.text_encoder.tokenizer.model == objective.text_encoder.tokenizer.model


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"architecture": {**SMALL, "in_dim": 5, "out_dim": 5}}, r"vae '.*' does not fit backbone.*latent_channels is 4.*needs 5"),
        ({"architecture": {**SMALL, "text_dim": 7}}, r"embed_dim is 96, the backbone needs 7"),
        ({"architecture": {**SMALL, "dim": 33}}, r"architecture of 'tiny': .*33"),
        ({"architecture": {**SMALL, "patch_size": (1, 4, 4)}}, r"5x16x16 .* multiples of 32 and 32"),
        ({"data": {"frames": 6}}, r"6x16x16 .*frames must be 1 \+ 4k"),
        ({"text_drop": 1.5}, r"text_drop: .*\(got 1\.5\)"),
        ({"clips": -1}, r"clips: .*\(got -1\)"),
        ({"tokenizer": 300}, r"tokenizer and text_architecture are of a text encoder trained from random weights"),
        ({"text_architecture": {"num_layers": 1}}, r"tokenizer and text_architecture are of a text encoder trained from random weights"),
    ],
)
def test_wrong_settings_are_refused_in_one_line(make: Make, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        make(**settings)
    assert "\n" not in str(caught.value)

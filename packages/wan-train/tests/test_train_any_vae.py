"""The VAE objective on a codec of another package: of any stride, without a posterior, with statistics of batches."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from layout_tasks import train
from plain_codec import MEAN, PlainCodec, with_plain_codec
from safetensors.torch import load_file
from torch import Tensor
from wan_train import TrainConfig, Trainer
from wan_train.data.shapes import Shapes
from wan_train.objectives.vae import VAEObjective
from wan_train.plugins import plugin_manager
from wan_train.randomness import generator
from wan_train.store import shards
from wan_train.store.manifest import folder_name
from wan_vae.plugins import find_vae

Recipe = Callable[..., TrainConfig]
Group = Callable[..., list[Any]]


def made(tmp_path: Path, frames: int, size: int, phase: dict[str, Any] | None = None, **settings: Any) -> VAEObjective:
    torch.manual_seed(0)
    phases = [{"until": 1.0, "frames": frames, "size": size, **(phase or {})}]
    data = Shapes(frames=frames, size=(size, size), length=4)
    return VAEObjective({"vae": "plain", "phases": phases, **settings}, data, tmp_path, "cpu", with_plain_codec())


def losses(objective: VAEObjective) -> tuple[Tensor, dict[str, Tensor]]:
    return objective.losses(objective.batch((0, 1), lambda sample, stream: generator(0, 0, sample, stream), 0.0))


@pytest.mark.parametrize(
    ("stride", "posterior", "frames", "lengths", "size"),
    [((1, 8, 8), False, 1, [1], 16), ((1, 16, 8), False, 6, [1, 2, 6], 32), ((8, 32, 32), True, 17, [1, 9, 17], 32)],
)
def test_a_codec_of_another_package_is_trained_by_every_term(
    vae_recipe: Recipe, stride: tuple[int, int, int], posterior: bool, frames: int, lengths: list[int], size: int
) -> None:
    phases = f"[{{until = 0.5, frames = {lengths}, size = {size}}}, {{until = 1.0, frames = {lengths}, size = {size}, adversary = 0.5}}]"
    architecture = f"{{stride = {list(stride)}, posterior = {str(posterior).lower()}}}"
    config = vae_recipe(
        "objective.settings.vae=plain", f"objective.settings.architecture={architecture}", f"objective.settings.phases={phases}",
        "objective.settings.wavelet=1.0", "objective.settings.discriminator={base_dim = 4, judges = 'pair'}", "preview_every=30",
        f"data.settings={{frames = {frames}, size = [{size}, {size}], length = 8}}", "steps=60", "batch_size=4", "save_every=0",
        "optimiser.lr=0.01", "objective.settings.statistics=8",
    )  # fmt: skip
    trainer = Trainer(config, with_plain_codec())
    before = {name: param.detach().clone() for name, param in trainer.objective.modules["vae"].named_parameters()}
    folder = trainer.run()
    rows = [json.loads(line) for line in (config.output / "log.jsonl").read_text().splitlines()]
    steps = [row for row in rows if "loss" in row]
    assert sum(row["l1"] for row in steps[-5:]) < 0.8 * sum(row["l1"] for row in steps[:5])
    assert all(row["kl"] > 0 for row in steps) if posterior else not any(row["kl"] for row in steps)
    assert all({"wavelet", "psnr"} <= row.keys() for row in steps)
    assert ["adversary" in row for row in steps] == 30 * [False] + 30 * [True]
    found = [row["val_psnr"] for row in rows if "val_psnr" in row]
    assert len(found) == 2
    assert found[1] > found[0]
    assert [name for name, param in trainer.objective.modules["vae"].named_parameters() if torch.equal(param, before[name])] == []
    codec = PlainCodec.from_folder(folder / "vae").requires_grad_(False)
    assert codec.config.stride == stride
    clips = trainer.objective.dataset.video(range(8))
    assert float(codec.encode(clips).std()) == pytest.approx(1, abs=0.05), "statistics are those of the training clips"
    copy = trainer.averaged()["vae"]
    assert torch.allclose(codec.decode(codec.encode(clips)), copy.decode(copy.encode(clips)), atol=0.02), "the averaged weights"


def test_numbers_that_fp16_does_not_hold_are_exported_in_fp32(tmp_path: Path) -> None:
    objective = made(tmp_path, 1, 16, statistics=4)
    for name, value in (("small", 60000.0), ("large", 70000.0)):
        objective.vae.compress[1].running_var.fill_(value)
        objective.export({"vae": deepcopy(objective.vae).eval()}, str(tmp_path / name))
        state = load_file(tmp_path / name / "vae" / "model.safetensors")
        assert (state["compress.1.running_var"] == value).all()
        assert state["to_pixels.weight"].dtype == (torch.float16 if name == "small" else torch.float32)


def test_a_codec_without_a_posterior_has_no_kl_in_its_loss(tmp_path: Path) -> None:
    objective = made(tmp_path, 3, 16, l1=1.0, kl=1000.0)
    found, figures = losses(objective)
    assert torch.equal(found, figures["l1"])
    assert not figures["kl"].any()
    other = made(tmp_path, 3, 16, l1=1.0, kl=1000.0, architecture={"posterior": True})
    found, figures = losses(other)
    assert figures["kl"].min() > 0
    assert torch.allclose(found, figures["l1"] + 1000 * figures["kl"])


@pytest.mark.parametrize(
    ("stride", "frames", "size", "message"),
    [
        ([8, 32, 32], 5, 32, r"5x32x32 .* do not divide: frames must be 1 \+ 8k, height and width multiples of 32 and 32"),
        ([8, 32, 32], 9, 48, r"9x48x48 .* do not divide: .* multiples of 32 and 32"),
        ([1, 8, 16], 3, 24, r"3x24x24 .* do not divide: .* multiples of 8 and 16"),
    ],
)
def test_clips_that_the_stride_does_not_divide_are_refused(tmp_path: Path, stride: list[int], frames: int, size: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        made(tmp_path, frames, size, architecture={"stride": stride})


def test_only_a_wan_vae_keeps_its_weights_and_is_told_the_timestep(tmp_path: Path, micro_vae: Path) -> None:
    told = {"init": "pretrained", "architecture": {"timestep_conditioning": True}}
    with pytest.raises(ValueError, match=r"^timestep_conditioning is for a Wan VAE, and this is a PlainCodec"):
        made(tmp_path, 1, 16, **told)
    with pytest.raises(ValueError, match=r"^init = 'pretrained' with architecture .*'random' \(any architecture\)"):
        made(tmp_path, 5, 16, vae=str(micro_vae), init="pretrained", architecture={"timestep_conditioning": True, "z_dim": 4})
    vae = made(tmp_path, 5, 16, vae=str(micro_vae), **told).vae
    assert vae.config.timestep_conditioning
    assert vae.config.latents_std == (0.5,) * 4
    assert vae.training
    assert all(param.requires_grad for param in vae.parameters())


def test_inflation_is_refused_where_it_would_change_pictures(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^phases: inflate .*this VAE has no convolution over time"):
        made(tmp_path, 3, 16, {"inflate": True})
    small = {
        "encoder_base_channels": 4,
        "decoder_base_channels": 4,
        "latent_channels": 4,
        "encoder_blocks": BLOCKS,
        "decoder_blocks": BLOCKS,
    }
    with pytest.raises(ValueError, match=r"^phases: inflate .*last tap of a convolution over time alone") as caught:
        made(tmp_path, 9, 32, {"inflate": True}, vae="ltx-video-0.9.1", architecture=small)
    assert "\n" not in str(caught.value)
    made(tmp_path, 5, 16, {"inflate": True}, vae="tiny", architecture={"base_dim": 4, "decoder_base_dim": 4, "z_dim": 4})


BLOCKS = [["res_x", 1], ["compress_all", {}], ["compress_all", {}], ["compress_all", {}]]


def test_checking_for_inflation_leaves_the_vae_as_it_was(tmp_path: Path) -> None:
    narrow = {"base_dim": 4, "decoder_base_dim": 4, "z_dim": 4}
    plain = made(tmp_path, 5, 16, vae="tiny", architecture=narrow).vae
    checked = made(tmp_path, 5, 16, {"inflate": True}, vae="tiny", architecture=narrow).vae
    assert all(torch.equal(a, b) for a, b in zip(plain.state_dict().values(), checked.state_dict().values(), strict=True))
    assert all(module.training for module in checked.modules())


PHASES = """[
    {until = 0.33, frames = 1, size = 16},
    {until = 0.66, frames = 1, size = 32, batch = 2, trains = ["encoder_head", "decoder_input"]},
    {until = 1.0, frames = 1, size = 16, trains = ["decoder_head"], adversary = 0.5},
]"""


DECOUPLED = {"vae": "plain", "architecture": "{}", "phases": PHASES, "discriminator": "{base_dim = 4, levels = 2}"}
RUN = ["data.settings={frames = 1, size = [32, 32], length = 8}", "steps=6", "batch_size=4", "optimiser.weight_decay=0.1"]


def decoupled(vae_recipe: Recipe, *overrides: str) -> TrainConfig:
    """Three phases of two steps each: all, the middle, the end."""
    own = [f"objective.settings.{key}={value}" for key, value in DECOUPLED.items()]
    return vae_recipe(*own, *RUN, "save_every=1", "keep=20", *overrides)


@pytest.mark.parametrize("optimiser", ["muon", "adamw"])
def test_each_of_three_decoupled_phases_moves_its_parts_and_nothing_else(vae_recipe: Recipe, optimiser: str) -> None:
    """DC-AE's: all, then encoder head and decoder input, then decoder head; statistics of frozen norms stay, the adversary comes last."""
    config = decoupled(vae_recipe, f"optimiser.name={optimiser}")
    trainer = Trainer(config, with_plain_codec())
    start = {name: value.clone() for name, value in trainer.objective.modules["vae"].state_dict().items()}
    judge = {name: value.clone() for name, value in trainer.objective.modules["discriminator"].state_dict().items()}
    trainer.run()
    names = {id(param): name for name, param in trainer.objective.vae.named_parameters()}
    parts = {part: {names[id(param)] for param in params} for part, params in trainer.objective.vae.parameter_groups().items()}
    buffers = start.keys() - set(names.values())
    assert {name.rpartition(".")[2] for name in buffers} == {"running_mean", "running_var", "num_batches_tracked"}
    kept = [start, *(weights(config, step, "vae") for step in range(1, 7))]
    judges = [judge, *(weights(config, step, "discriminator") for step in range(1, 7))]
    moved = [{name for name in start if not torch.equal(a[name], b[name])} for a, b in pairwise(kept)]
    everything = set(names.values())
    assert set().union(*parts.values()) == everything
    assert moved[:2] == 2 * [everything | buffers]
    assert moved[2:4] == 2 * [parts["encoder_head"] | parts["decoder_input"]]
    assert moved[4:] == 2 * [parts["decoder_head"]]
    told = [any(not torch.equal(a[name], b[name]) for name in a) for a, b in pairwise(judges)]
    assert told == [False, False, False, False, True, True]


@pytest.mark.xdist_group("distributed")
def test_processes_freeze_the_same_statistics(group: Group, vae_toml: Path) -> None:
    """Each sees batches of its own, and what is frozen is the mean, so that all go on with one VAE."""
    own = [f"objective.settings.{key}={value}" for key, value in {**DECOUPLED, "vae": "plain_codec:PlainCodec"}.items()]
    answers = group(2, train, str(vae_toml), [*own, *RUN, "optimiser.name=adamw"], 6)
    one, other = (answer["weights"] for answer in answers)
    assert "vae.compress.1.running_var" in one
    assert [name for name, value in one.items() if not (value == other[name]).all()] == []


@pytest.mark.parametrize("vae", ["wan2.1", "dc-ae-f32c32-in-1.0"])
def test_latents_of_fresh_weights_are_not_tagged_as_the_published_ones(vae: str, tmp_path: Path) -> None:
    narrow = {"encoder_dims": [8] * 6, "decoder_dims": [8] * 6, "head_dim": 4, "z_dim": 4} if "dc-ae" in vae else {}
    narrow |= {"base_dim": 4, "decoder_base_dim": 4} if vae == "wan2.1" else {}
    fields = {"vae": vae, "phases": [{"until": 1.0, "frames": 1, "size": 32}]}
    for said, tag in (({}, f"{find_vae(vae).latent_space}-retrained"), ({"latent_space": "mine-1"}, "mine-1")):
        settings = {**fields, "architecture": {**narrow, **said}}
        objective = VAEObjective(settings, Shapes(frames=1, size=(32, 32), length=4), tmp_path, "cpu", plugin_manager())
        assert objective.vae.spec.latent_space == tag


def test_a_step_that_is_left_out_leaves_no_statistics(vae_recipe: Recipe) -> None:
    trainer = Trainer(decoupled(vae_recipe, "optimiser.name=adamw", "save_every=0"), with_plain_codec())
    trainer._train_step()
    before = {name: value.clone() for name, value in trainer.objective.vae.state_dict().items()}
    batch = trainer.objective.batch
    trainer.objective.batch = lambda *given: replace(made := batch(*given), video=made.video * math.nan)
    with pytest.warns(UserWarning, match="left out"):
        trainer._train_step()
    after = trainer.objective.vae.state_dict()
    assert [name for name in before if name.endswith("num_batches_tracked") != (not torch.equal(before[name], after[name]))] == []


@pytest.mark.xdist_group("distributed")
def test_processes_hold_the_same_statistics_after_every_step(group: Group, vae_toml: Path) -> None:
    """A checkpoint has those of one process, so that a run that is resumed goes on as it would have."""
    settings = {**DECOUPLED, "vae": "plain_codec:PlainCodec", "phases": "[{until = 1.0, frames = 1, size = 16}]"}
    own = [f"objective.settings.{key}={value}" for key, value in settings.items()]
    one, other = (answer["weights"] for answer in group(2, train, str(vae_toml), [*own, *RUN, "optimiser.name=adamw"], 2))
    assert (one["vae.compress.1.running_mean"] != 0).any()
    assert [name for name, value in one.items() if not (value == other[name]).all()] == []


def weights(config: TrainConfig, step: int, module: str) -> dict[str, Tensor]:
    prefix = f"modules/{module}/"
    return {
        name.removeprefix(prefix): value
        for name, value in shards.read_whole(config.output / "checkpoints" / folder_name(step), prefix).items()
    }


def test_muon_gets_convolutions_that_mix_channels_but_neither_the_first_nor_heads(tmp_path: Path) -> None:
    objective = made(tmp_path, 1, 16)
    names = {id(param): name for name, param in objective.vae.named_parameters()}
    muon, rest = ({names[id(param)] for param in group["params"]} for group in objective.parameter_groups())
    assert muon == {"compress.3.weight", "expand.2.weight"}
    assert muon | rest == set(names.values())
    assert muon & rest == set()


@torch.no_grad()
def test_what_a_codec_makes_but_does_not_save_is_in_the_copies_that_preview_and_export(vae_recipe: Recipe) -> None:
    trainer = Trainer(decoupled(vae_recipe), with_plain_codec())
    copy = trainer.averaged()["vae"]
    assert float(copy.mean) == MEAN
    picture = trainer.objective.dataset.video([0])
    assert torch.equal(copy.decode(copy.encode(picture)), trainer.objective.vae.eval().decode(trainer.objective.vae.encode(picture)))

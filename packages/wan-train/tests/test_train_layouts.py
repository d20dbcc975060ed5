"""Every parallel layout computes the same training: losses and gradients of 20 steps against one process, and planted bugs found."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from layout_tasks import encoded, preview, train, types
from wan_train.config import ParallelConfig
from wan_train.layout import Layout
from wan_train.order import Order

pytestmark = pytest.mark.xdist_group("distributed")
SECONDS, TOLERANCE, STEPS = 180, 1e-5, 20
RECIPE = """
name = "layouts"
output = "{folder}/run"
steps = 20
batch_size = 8
ema = 0.9
threads = 1
preview_every = 0
save_every = 0

[data]
name = "shapes"
settings = {{frames = 9, size = [32, 48], length = 24}}

[optimiser]
name = "adamw"
lr = 1e-3

[objective]
name = "rectified-flow"

[objective.settings]
backbone = "{backbone}"
vae = "{vae}"
init = "pretrained"
train_text_encoder = {text}
clips = 24
"""
STAGES = """
precache = false

[more_data.stills]
name = "shapes"
settings = {frames = 1, size = [32, 32], length = 24, seed = 5}

[[stages]]
name = "images"
until = 3
video = [32, 32]
frames = [5, 9]
weights = {video = 0.0}
tokens = 12
batch_size = 6

[[stages]]
name = "joint"
until = 7
video = [32, 48]
image = [32, 32]
frames = [5, 9]
tokens = 40
batch_size = 7

[[stages]]
name = "larger"
until = 20
video = [48, 64]
frames = [9]
tokens = 80
batch_size = 4
"""
Group = Callable[..., list[Any]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, micro_vae: Path, nonzero: Path) -> Path:
    """Recipes that start from a backbone in which no tensor is zero: a zero head would hide every bug of the body at first."""
    folder = tmp_path_factory.mktemp("layouts")
    for name, text in (("frozen", "false"), ("text", "true")):
        (folder / f"{name}.toml").write_text(RECIPE.format(folder=folder, backbone=nonzero, vae=micro_vae, text=text))
    (folder / "stages.toml").write_text(RECIPE.format(folder=folder, backbone=nonzero, vae=micro_vae, text="false") + STAGES)
    return folder


@pytest.fixture(scope="module")
def alone(folder: Path) -> dict[str, dict[str, Any]]:
    """What one process computes."""
    return {name: train(str(folder / f"{name}.toml"), [], STEPS) for name in ("frozen", "text")}


def apart(answer: dict[str, Any], alone: dict[str, Any]) -> tuple[float, float]:
    """Largest differences of a loss, and of a gradient over max(1, largest gradient)."""
    losses = max(abs(a - b) for a, b in zip(answer["losses"], alone["losses"], strict=False))
    worst = 0.0
    for step, expected in alone["gradients"].items():
        if step in answer["gradients"]:
            found = answer["gradients"][step]
            assert found.keys() == expected.keys()
            worst = max(
                worst, *(float(np.abs(found[name] - value).max() / max(1.0, np.abs(value).max())) for name, value in expected.items())
            )
    return losses, worst


LAYOUTS = {
    "DP4": (4, []),
    "FSDP4": (4, ["parallel.fsdp=4"]),
    "HSDP 2x2": (4, ["parallel.fsdp=2"]),
    "Ulysses4": (4, ["parallel.ulysses=4"]),
    "Ring4": (4, ["parallel.ring=4"]),
    "U2 x R2": (4, ["parallel.ulysses=2", "parallel.ring=2"]),
    "FSDP4 over U2 x DP2": (4, ["parallel.fsdp=4", "parallel.ulysses=2"]),
    "FSDP2 in U2 x DP2": (4, ["parallel.fsdp=2", "parallel.ulysses=2"]),
    "DP3": (3, []),
    "accumulation": (1, ["micro_batch=1"]),
    "accumulation, FSDP2": (2, ["parallel.fsdp=2", "micro_batch=3"]),
    "recompute": (1, ["memory.policy=recompute"]),
    "offload": (1, ["memory.policy=offload"]),
    "a policy a block, FSDP2 x U2": (4, ["parallel.fsdp=4", "parallel.ulysses=2", "memory.policy=['recompute', 'offload']"]),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_layout_computes_what_one_process_does(group: Group, folder: Path, alone: dict[str, Any], name: str) -> None:
    size, overrides = LAYOUTS[name]
    answers = group(size, train, str(folder / "frozen.toml"), overrides, STEPS)
    losses, gradients = zip(*(apart(answer, alone["frozen"]) for answer in answers), strict=True)
    assert max(losses) <= TOLERANCE
    assert max(gradients) <= TOLERANCE
    if name in ("recompute", "offload"):
        assert max(losses) == max(gradients) == 0, "the same sums in the same order"


@pytest.mark.parametrize("name", ["FSDP4", "HSDP 2x2", "FSDP4 over U2 x DP2"])
def test_weights_gathered_in_bf16_stay_near_to_fp32(group: Group, folder: Path, alone: dict[str, Any], name: str) -> None:
    """Autocast rounds the weights of products; gathered in bf16, gains and modulations are rounded too."""
    (size, overrides), recipe, half = LAYOUTS[name], str(folder / "frozen.toml"), ["precision=bf16"]
    expected = {**alone["frozen"], "gradients": {0: alone["frozen"]["gradients"][0]}}
    rounding = apart(train(recipe, half, 5), expected)
    losses, gradients = zip(*(apart(answer, expected) for answer in group(size, train, recipe, [*overrides, *half], 5)), strict=True)
    assert 0 < max(losses) <= 4 * rounding[0]
    assert 0 < max(gradients) <= 4 * rounding[1]


@pytest.mark.parametrize(
    ("overrides", "computed"),
    [(["precision=bf16"], "torch.bfloat16"), ([], "torch.float32"), (["precision=bf16", "objective.settings.train=lora"], "torch.float32")],
)
def test_sharded_weights_are_gathered_in_bf16_where_all_are_trained(
    group: Group, folder: Path, overrides: list[str], computed: str
) -> None:
    (found, _) = group(2, types, str(folder / "frozen.toml"), ["parallel.fsdp=2", "objective.settings.lora.rank=4", *overrides])
    assert found == {"computed": {computed}, "gradients": {"torch.float32"}, "weights": {"torch.float32"}}


@pytest.mark.parametrize("name", ["DP4", "FSDP4 over U2 x DP2", "U2 x R2"])
def test_a_text_encoder_that_is_trained_too(group: Group, folder: Path, alone: dict[str, Any], name: str) -> None:
    size, overrides = LAYOUTS[name]
    answers = group(size, train, str(folder / "text.toml"), overrides, 5)
    expected = {**alone["text"], "gradients": {0: alone["text"]["gradients"][0]}}
    losses, gradients = zip(*(apart(answer, expected) for answer in answers), strict=True)
    assert max(losses) <= TOLERANCE
    assert max(gradients) <= TOLERANCE


@pytest.mark.parametrize("name", ["DP3", "FSDP4 over U2 x DP2", "a policy a block, FSDP2 x U2"])
@pytest.mark.parametrize("part", ["lora", "context_embedder"])
def test_a_part_beside_a_frozen_base(group: Group, folder: Path, name: str, part: str) -> None:
    (size, overrides), recipe = LAYOUTS[name], str(folder / "frozen.toml")
    own = [f"objective.settings.train={part}", "objective.settings.lora.rank=4", "optimiser.lr=1e-2"]
    expected = train(recipe, own, 5)
    assert all(name.startswith(f"{part}.") for name in expected["gradients"][4])
    assert all(gradient.any() for gradient in expected["gradients"][4].values())
    losses, gradients = zip(*(apart(answer, expected) for answer in group(size, train, recipe, [*overrides, *own], 5)), strict=True)
    assert max(losses) <= TOLERANCE
    assert max(gradients) <= TOLERANCE


@pytest.mark.parametrize(
    ("plant", "name"),
    [("no all-reduce", "DP4"), ("wrong merge", "Ring4"), ("rank order", "Ulysses4"), ("rank order", "U2 x R2"), ("samples by rank", "U2")],
)
def test_a_planted_bug_is_found_by_losses_and_by_gradients(
    group: Group, folder: Path, alone: dict[str, Any], plant: str, name: str
) -> None:
    size, overrides = LAYOUTS.get(name, (4, ["parallel.ulysses=2"]))
    answers = group(size, train, str(folder / "frozen.toml"), overrides, 5, plant)
    expected = {**alone["frozen"], "gradients": {0: alone["frozen"]["gradients"][0]}}
    losses, gradients = zip(*(apart(answer, expected) for answer in answers), strict=True)
    assert max(losses) > 10 * TOLERANCE
    assert max(gradients) > 10 * TOLERANCE


def test_processes_that_share_samples_encode_different_ones(group: Group, folder: Path) -> None:
    """VAE and text encoder run data parallel, the backbone context parallel (report, section 4.3.3)."""
    answers = group(4, encoded, str(folder / "frozen.toml"), ["parallel.ulysses=2", "parallel.ring=2", "micro_batch=2"])
    made, computed = ([answer[i] for answer in answers] for i in (0, 1))
    assert sorted(sample for part in made for sample in part) == sorted({sample for part in made for sample in part})
    assert [len(part) for part in made] == [2, 2, 2, 2]
    assert [len(prompts) for prompts in computed] == [8, 8, 8, 8]
    assert all(prompts == computed[0] for prompts in computed)


@pytest.mark.parametrize("name", ["DP3", "FSDP4 over U2 x DP2", "Ring4"])
def test_stages_of_images_and_videos_in_any_layout(group: Group, folder: Path, name: str) -> None:
    """Processes that compute other shapes than their neighbours, and steps of fewer micro-batches than processes."""
    size, overrides = LAYOUTS[name]
    recipe = str(folder / "stages.toml")
    expected = train(recipe, [], STEPS)
    losses, gradients = zip(*(apart(answer, expected) for answer in group(size, train, recipe, overrides, STEPS)), strict=True)
    assert max(losses) <= TOLERANCE
    assert max(gradients) <= TOLERANCE


def test_degrees_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="1 processes do not divide by ring 1 x ulysses 2 = 2"):
        Layout(ParallelConfig(ulysses=2))
    with pytest.raises(ValueError, match="1 processes do not divide by fsdp 4"):
        Layout(ParallelConfig(fsdp=4))


def test_an_epoch_has_every_sample_once_and_the_next_is_another() -> None:
    order = Order(7, seed=3)
    first, second = order.take(0, 7), order.take(7, 7)
    assert sorted(first) == sorted(second) == list(range(7))
    assert first != second
    assert order.take(5, 4) == [*first[5:], *second[:2]], "a step may reach into the next epoch"
    assert Order(7, seed=4).take(0, 7) != first


@pytest.mark.parametrize("degree", ["fsdp", "ulysses"])
def test_a_base_that_is_split_is_whole_in_a_preview(group: Group, folder: Path, tmp_path: Path, degree: str) -> None:
    recipe, own = str(folder / "frozen.toml"), ["objective.settings.train=lora", "objective.settings.preview_prompts=2"]
    own += ["objective.settings.preview_steps=1", "preview_every=2"]
    answers = group(2, preview, recipe, [*own, f"parallel.{degree}=2", f"output={tmp_path / 'split'}"], 2)
    alone = preview(recipe, [*own, f"output={tmp_path / 'alone'}"], 2)
    assert len(answers[0]) == 2
    assert all(np.abs(answer - alone).max() < 1e-4 for answer in answers)
    assert (tmp_path / "split" / "export" / "lora.safetensors").exists()


def test_the_command_trains_with_processes_and_takes_the_run_up_with_another_number(folder: Path, tmp_path: Path) -> None:
    def wan_train(*words: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "wan_train", *words]
        done = subprocess.run(
            command, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, check=False, timeout=SECONDS
        )
        assert done.returncode == 0, done.stderr
        return done

    recipe, base = str(folder / "frozen.toml"), ["save_every=2", "log_every=1", "preview_every=4", "objective.settings.preview_prompts=2"]
    short = [*base, "objective.settings.preview_steps=1"]
    done = wan_train("run", recipe, "--nproc", "2", *short, "steps=2", f"output={tmp_path / 'run'}", "parallel.fsdp=2")
    assert done.stdout.count("trained parts: ") == 1, "one process reports"
    wan_train("resume", str(tmp_path / "run"), "steps=4", "parallel.fsdp=1", "parallel.ulysses=2", "--nproc=2")
    wan_train("run", recipe, *short, "steps=4", f"output={tmp_path / 'alone'}")
    losses = [
        [json.loads(line)["loss"] for line in (tmp_path / name / "log.jsonl").read_text().splitlines() if "loss" in json.loads(line)]
        for name in ("run", "alone")
    ]
    assert len(losses[0]) == 4
    assert losses[0] == pytest.approx(losses[1], abs=TOLERANCE)
    assert (tmp_path / "run" / "export" / "backbone" / "model.safetensors").exists()

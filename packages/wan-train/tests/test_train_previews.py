"""Previews by several processes: the clips and figures of one, and nobody who waits for a process that has failed."""

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
import torch
from preview_tasks import failing, first_preview, plateau, slow
from wan_train import TrainConfig, Trainer

pytestmark = pytest.mark.xdist_group("distributed")
Group = Callable[..., list[Any]]
Recipe = Callable[..., TrainConfig]
BROKEN = """
from wan_train.data.shapes import Shapes


class Broken(Shapes):
    def evaluate(self, clips, prompts):
        raise ValueError("no eyes to see with\\nand more")
"""


@pytest.fixture
def pretrained(nonzero: Path) -> list[str]:
    """Overrides of the flow recipe: a backbone whose velocity is not zero, and the encoder as it is."""
    own = ["architecture={}", "text_architecture={}", "train_text_encoder=false", "init=pretrained", f"backbone={nonzero}"]
    return [f"objective.settings.{each}" for each in own]


def told(answers: list[Any]) -> list[Any]:
    return [answer["asked"] for answer in answers]


@pytest.mark.parametrize(
    ("size", "overrides", "asked", "apart"),
    [
        (3, ["objective.settings.scheduler=lcm"], [[0], [1, 2], [3, 4]], 0),
        (3, ["objective.settings.train=lora", "objective.settings.preview_prompts=2"], [[], [0], [1]], 0),
        (3, ["objective.settings.task=i2v", "objective.settings.architecture.in_dim=12"], [[0], [1, 2], [3, 4]], 0),
        (2, ["parallel.fsdp=2"], [[0, 1], [2, 3, 4]], 0),
        (
            2,
            ["parallel.ulysses=2", "objective.settings.train=lora", "memory.policy=recompute"],
            [[0, 1], [2, 3, 4]],
            1e-5,
        ),  # a copy of the base, aligned otherwise
        (4, ["parallel.fsdp=4", "parallel.ulysses=2"], [[0], [1], [2], [3, 4]], 0),
    ],
)
def test_the_clips_are_those_of_one_process(
    group: Group, flow_toml: Path, pretrained: list[str], size: int, overrides: list[str], asked: list[list[int]], apart: float
) -> None:
    own = [*pretrained, "objective.settings.preview_prompts=5", "optimiser.name=adamw"]
    own += [each for each in overrides if not each.startswith("parallel.")]
    alone = first_preview(str(flow_toml), own)
    answers = group(size, first_preview, str(flow_toml), [*own, *overrides])
    assert told(answers) == asked
    assert alone["asked"] == [index for share in asked for index in share]
    assert np.abs(answers[0]["clips"] - alone["clips"]).max() <= apart
    assert answers[0]["figures"] == alone["figures"]
    assert alone["figures"].keys() >= {"val_colour", "val_all_right"}
    assert len({clip.tobytes() for clip in alone["clips"]}) == len(alone["asked"]), "each has noise of its own"
    assert all(answer["clips"] is None and not answer["figures"] for answer in answers[1:]), "one process shows them"


def test_reconstructions_and_their_figure_are_those_of_one_process(group: Group, vae_toml: Path) -> None:
    own = ["objective.settings.validation=4"]
    alone = first_preview(str(vae_toml), own)
    answers = group(3, first_preview, str(vae_toml), own)
    assert told(answers) == [[0], [1], [2, 3]]
    assert np.array_equal(answers[0]["clips"], alone["clips"])
    assert answers[0]["figures"] == alone["figures"] != {}


@pytest.mark.parametrize("overrides", [["scheduler=lcm"], ["task=i2v", "architecture.in_dim=12"]])
def test_a_clip_depends_on_its_index_alone(flow_recipe: Recipe, pretrained: list[str], overrides: list[str]) -> None:
    objective = Trainer(flow_recipe(*pretrained, *(f"objective.settings.{each}" for each in overrides))).objective
    objective.dataset.evaluation_prompts = lambda n: n * ["a red circle moves left"]  # type: ignore[method-assign]
    both = objective.preview(objective.modules, [0, 1])
    assert torch.equal(both[1:], objective.preview(objective.modules, [1]))
    assert not torch.equal(both[0], both[1])


def test_the_plateau_of_every_process_sees_the_figure_that_is_logged(group: Group, vae_toml: Path, tmp_path: Path) -> None:
    own = ["steps=2", "preview_every=1", "objective.settings.validation=4", "optimiser.plateau.figure=val_psnr"]
    own += ["optimiser.plateau.least=100", "optimiser.plateau.patience=0", "optimiser.plateau.factor=0.25"]
    answers = group(3, plateau, str(vae_toml), own)
    records = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    psnr = [record["val_psnr"] for record in records if "val_psnr" in record]
    assert answers[0]["best"] == pytest.approx(psnr[0], abs=1e-5)
    assert answers[0]["share"] == 0.25, "the second is no better by 100 dB"
    assert answers[1] == answers[2] == answers[0]


@pytest.mark.parametrize(
    ("where", "rank", "error", "said"),
    [
        ("preview", 1, torch.OutOfMemoryError("no memory\nTried"), ("RuntimeError", "process 1: OutOfMemoryError: no memory")),
        ("preview", 2, KeyError("prompt"), ("RuntimeError", "process 2: KeyError: 'prompt'")),
        ("copies", 1, MemoryError(), ("RuntimeError", "process 1: MemoryError")),
        ("evaluate", 0, ValueError("a clip shows nothing"), ("ValueError", "process 0: ValueError: a clip shows nothing")),
        ("grid", 0, OSError(28, "disk full"), ("ValueError", "process 0: OSError: [Errno 28] disk full")),
    ],
)
def test_a_process_that_fails_ends_the_run_of_all_with_one_error(
    group: Group, flow_toml: Path, pretrained: list[str], where: str, rank: int, error: Exception, said: tuple[str, str]
) -> None:
    own = [*pretrained, "steps=3", "preview_every=2", "save_every=1", "optimiser.name=adamw", "objective.settings.preview_prompts=3"]
    answers = group(3, failing, str(flow_toml), own, where, rank, error)
    assert [answer[:2] for answer in answers] == 3 * [(said[0], f"the preview failed on {said[1]}")]
    assert [answer[2] for answer in answers] == [repr(error) if i == rank else "None" for i in range(3)]


def test_a_slow_process_is_waited_for_longer_than_the_group_of_the_training_does_and_not_for_ever(group: Group, vae_toml: Path) -> None:
    answers = group(3, slow, str(vae_toml), ["objective.settings.validation=4"], 1.0, 60.0)
    assert answers == [[], [], []]


def test_a_process_that_does_not_come_is_not_waited_for_without_end(group: Group, vae_toml: Path) -> None:
    answers = group(3, slow, str(vae_toml), ["objective.settings.validation=4"], 60.0, 1.0)
    assert answers == 3 * [["another process of the run ended, or took too long over its share of a preview"]]


def test_the_command_ends_where_a_preview_fails(vae_toml: Path, flow_toml: Path, pretrained: list[str], tmp_path: Path) -> None:
    (tmp_path / "broken.py").write_text(BROKEN)
    words = [*pretrained, "data.name=broken:Broken", "steps=1", "preview_every=1", "optimiser.name=adamw", "--nproc=2"]
    done = subprocess.run(
        [sys.executable, "-m", "wan_train", "run", str(flow_toml), *words],
        env={**os.environ, "PYTHONPATH": str(tmp_path), "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, check=False, timeout=120,
    )  # fmt: skip
    assert done.returncode
    lines = [line for line in done.stderr.splitlines() if line.startswith("wan-train: error: ")]
    told = {"wan-train: error: the preview failed on process 0: ValueError: no eyes to see with"}
    assert set(lines) == told, "of both, or of the one that ended first: torchrun ends the other"

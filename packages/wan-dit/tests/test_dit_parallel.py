"""Several real processes compute what one computes: attention, backbones, guidance, sharded weights."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from caching_tasks import cache_task, kernel_task
from documentation import ROOT, blocks
from parallel_tasks import agree_task, attention_task, checkpoint_task, guidance_task, model_task, run
from process_group import grouped
from wan_dit import Pipeline
from wan_dit.testing import difference

pytestmark = pytest.mark.xdist_group("distributed")
SECONDS, TOLERANCE = 90, 1e-5
Group = Callable[..., list[Any]]


@pytest.fixture
def group(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Group:
    """`group(size, task, *arguments)`: the answers of so many processes to a task, by rank."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    preload = ["torch", "torch.distributed", "wan_dit.parallel", "wan_dit.testing"]
    return grouped(run, str(tmp_path / "store"), preload, SECONDS)


@pytest.mark.parametrize(("size", "kinds"), [(2, ["ulysses", "ring"]), (4, ["ulysses", "ring", "plain ring", "2d"])])
def test_attention_over_processes_equals_one_with_its_gradients(group: Group, size: int, kinds: list[str]) -> None:
    for answer in group(size, attention_task, kinds):
        assert [max(differences.values()) <= TOLERANCE for differences in answer.values()] == [True] * len(kinds), answer


@pytest.mark.parametrize(("plant", "kinds"), [("pads", ["ulysses", "ring", "2d"]), ("merge", ["ring", "2d"])])
def test_padding_that_is_attended_to_and_a_wrong_merge_are_found(group: Group, plant: str, kinds: list[str]) -> None:
    answers = group(4, attention_task, kinds, plant)
    for kind in kinds:
        worst = {tokens: max(answer[kind][tokens] for answer in answers) for tokens in answers[0][kind]}
        assert min(worst[13], worst[5], worst[2]) > 1000 * TOLERANCE
        assert (worst[16] <= TOLERANCE) == (plant == "pads"), "16 tokens have no padding"


@pytest.mark.parametrize(
    ("name", "degrees", "times", "fsdp"),
    [
        ("text", {"ulysses": 2}, "sample", False),
        ("text", {"ring": 2}, "frame", False),
        ("text", {"ulysses": 2, "ring": 2}, "one", False),
        pytest.param("text", {"ulysses": 4}, "frame", False, marks=pytest.mark.slow),
        pytest.param("text", {"ring": 4}, "sample", False, marks=pytest.mark.slow),
        ("vace", {"ulysses": 2, "ring": 2}, "frame", False),
        ("vace", {"ulysses": 2}, "sample", True),
        ("image", {"ulysses": 2, "ring": 2}, "sample", True),
    ],
)
def test_a_backbone_over_processes_equals_one_with_its_gradients(
    group: Group, name: str, degrees: dict[str, int], times: str, fsdp: bool
) -> None:
    size = degrees.get("ulysses", 1) * degrees.get("ring", 1)
    for answer in group(size, model_task, name, degrees, times, fsdp):
        assert answer.pop("kept") == pytest.approx(1 / size if fsdp else 1, rel=0.05), "part of the weights between forwards"
        for grid, (velocity, gradients, same) in answer.items():
            assert velocity <= TOLERANCE, grid
            assert gradients <= TOLERANCE, grid
            assert same, "processes differ"


@pytest.mark.parametrize("degrees", [{"ulysses": 2}, {"ring": 2}], ids=str)
def test_blocks_computed_again_in_the_backward_know_their_own_token_count(group: Group, degrees: dict[str, int]) -> None:
    for answer in group(2, checkpoint_task, degrees):
        assert max(answer) <= TOLERANCE


@pytest.mark.parametrize(
    ("degrees", "fsdp"), [({"cfg": 2}, False), ({"cfg": 2, "ulysses": 2}, False), ({"cfg": 2, "ring": 2}, True)], ids=str
)
def test_sampling_with_guidance_over_processes_equals_one(group: Group, degrees: dict[str, int], fsdp: bool) -> None:
    for answer in group(2 * degrees.get("ulysses", 1) * degrees.get("ring", 1), guidance_task, degrees, fsdp):
        for scale, (off, same, forwards) in answer.items():
            assert off <= TOLERANCE, f"scale {scale}"
            assert same, "processes end with different latents"
            assert forwards == 3, "a process runs the backbone once a step"


def test_processes_agree_on_the_largest_value(group: Group) -> None:
    answers = group(4, agree_task)
    assert [answer[:3] for answer in answers] == [[True, False, 0.1 * 3]] * 4
    assert [answer[3] for answer in answers] == [2, 3, 2, 3], "rings are ranks 0, 2 and 1, 3"
    assert all(type(value) is kind for value, kind in zip(answers[0], (bool, bool, float, int), strict=True))


@pytest.mark.parametrize(("degrees", "shape"), [({"ulysses": 2}, (2, 28, 2, 12)), ({"ring": 2}, (2, 14, 4, 12))], ids=str)
def test_a_chosen_attention_runs_within_parallel_attention(group: Group, degrees: dict[str, int], shape: tuple[int, ...]) -> None:
    for velocity, gradients, calls, refused in group(2, kernel_task, degrees):
        assert max(velocity, gradients) <= TOLERANCE
        assert calls
        assert set(calls) == {shape}
        assert refused == "attention 'sdpa' has to be chosen before the backbone is parallelized"


@pytest.mark.parametrize(("degrees", "fsdp"), [({"ulysses": 2}, False), ({"cfg": 2}, False), ({"ring": 2}, True)], ids=str)
def test_caches_skip_the_same_on_every_process(group: Group, degrees: dict[str, int], fsdp: bool) -> None:
    first, second = group(2, cache_task, degrees, fsdp)
    for name, (off, same, skipped) in first.items():
        assert same, f"{name}: processes end with different latents"
        assert skipped == second[name][2] > 0, name
        # where the gate closes, the process of the negative prompt has no state of the prompt yet, so that all of them start anew
        if name != "disagreeing" and (name, *degrees) != ("gated", "cfg"):
            assert off <= 1e-4, name


def test_without_their_group_processes_decide_alone(group: Group) -> None:
    first, second = group(2, cache_task, {"cfg": 2}, False, False)
    assert first["disagreeing"][2] != second["disagreeing"][2]


def test_torchrun_makes_the_video_of_one_process(tmp_path: Path) -> None:
    (text,) = [block.text for block in blocks(ROOT / "docs" / "wan-dit-running.md") if block.title == "parallel.py"]
    script = tmp_path / "parallel.py"
    script.write_text(text + "\nimport os, torch\ntorch.save(result.video, os.environ['RANK'] + '.pt')\n")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)]
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    assert torch.equal(first, second)
    assert difference(first, Pipeline("tiny")("a red circle moves left", seed=1).video) <= 1e-4
    assert (tmp_path / "circle.mp4").stat().st_size > 0

"""Several real processes compute what one computes: attention, backbones, guidance, sharded weights."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from parallel_tasks import agree_task, attention_task, checkpoint_task, guidance_task, model_task, run

pytestmark = pytest.mark.xdist_group("distributed")
SECONDS, TOLERANCE = 90, 1e-5
Group = Callable[..., list[Any]]


@pytest.fixture
def group(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Group:
    """`group(size, task, *arguments)`: the answers of so many processes to a task, by rank."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "torch.distributed"])

    def start(size: int, task: Callable[..., Any], *given: Any) -> list[Any]:
        out = context.Queue()
        arguments = [(task, rank, size, str(tmp_path / "store"), given, out) for rank in range(size)]
        processes = [context.Process(target=run, args=each) for each in arguments]
        for process in processes:
            process.start()
        try:
            answers = [answer for _, answer in sorted((out.get(timeout=SECONDS) for _ in processes), key=lambda given: given[0])]
        finally:
            for process in processes:
                process.join(timeout=10)
                if process.is_alive():
                    process.kill()
        assert not (failed := [answer for answer in answers if isinstance(answer, str)]), "\n".join(failed)
        return answers

    return start


@pytest.mark.parametrize(
    ("kind", "size", "plain"),
    [("ulysses", 2, False), ("ulysses", 4, False), ("ring", 2, False), ("ring", 4, False), ("2d", 4, False), ("ring", 4, True)],
)
def test_attention_over_processes_equals_one_with_its_gradients(group: Group, kind: str, size: int, plain: bool) -> None:
    for answer in group(size, attention_task, kind, plain):
        for tokens, differences in answer.items():
            assert max(differences) <= TOLERANCE, f"{tokens} tokens: output, dq, dk, dv off by {differences}"


@pytest.mark.parametrize(
    ("kind", "plant", "tokens"), [("ulysses", "pads", 13), ("ring", "pads", 13), ("2d", "pads", 5), ("ring", "merge", 16)]
)
def test_padding_that_is_attended_to_and_a_wrong_merge_are_found(group: Group, kind: str, plant: str, tokens: int) -> None:
    answers = group(4, attention_task, kind, False, plant)
    assert max(max(answer[tokens]) for answer in answers) > 1000 * TOLERANCE
    if plant == "pads":
        assert max(max(answer[16]) for answer in answers) <= TOLERANCE, "16 tokens have no padding"


@pytest.mark.parametrize(
    ("name", "degrees", "times", "fsdp"),
    [
        ("text", {"ulysses": 2}, "sample", False),
        ("text", {"ring": 2}, "frame", False),
        ("text", {"ulysses": 4}, "frame", False),
        ("text", {"ring": 4}, "one", False),
        ("text", {"ulysses": 2, "ring": 2}, "sample", False),
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
        for scale, (difference, same, forwards) in answer.items():
            assert difference <= TOLERANCE, f"scale {scale}"
            assert same, "processes end with different latents"
            assert forwards == 3, "a process runs the backbone once a step"


def test_processes_agree_on_the_largest_value(group: Group) -> None:
    answers = group(4, agree_task)
    assert [answer[:3] for answer in answers] == [[True, False, 0.1 * 3]] * 4
    assert [answer[3] for answer in answers] == [2, 3, 2, 3], "rings are ranks 0, 2 and 1, 3"
    assert all(type(value) is kind for value, kind in zip(answers[0], (bool, bool, float, int), strict=True))

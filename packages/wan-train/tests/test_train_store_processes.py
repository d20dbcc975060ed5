"""Checkpoints of several real processes: the same bits, any number of processes, kills at any moment."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import re
import signal
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from store_tasks import damaged, full_disk, health, killable, overtaken, refused, run, stretch, until_asked, write_until_killed
from wan_train.store import Store
from wan_train.store.failpoints import POINTS
from wan_train.store.manifest import folder_name

pytestmark = pytest.mark.xdist_group("distributed")
SECONDS = 90
context = multiprocessing.get_context("forkserver")
Group = Callable[..., list[Any]]


@contextmanager
def started(rendezvous: Path, size: int, task: Callable[..., Any], *given: Any) -> Iterator[tuple[list[Any], Any]]:
    """So many processes at a task, and the queue of their answers; killed at the end."""
    context.set_forkserver_preload(["torch", "torch._dynamo", "store_tasks"])
    rendezvous.unlink(missing_ok=True)
    out = context.Queue()
    processes = [context.Process(target=run, args=(task, rank, size, str(rendezvous), given, out)) for rank in range(size)]
    for process in processes:
        process.start()
    try:
        yield processes, out
    finally:
        for process in processes:
            process.kill()
            process.join()


@pytest.fixture
def group(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Group:
    """`group(size, task, *arguments)`: the answers of so many processes to a task, by rank."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")

    def answers(size: int, task: Callable[..., Any], *given: Any) -> list[Any]:
        with started(tmp_path / "rendezvous", size, task, *given) as (processes, out):
            found = [answer for _, answer in sorted((out.get(timeout=SECONDS) for _ in processes), key=lambda pair: pair[0])]
            for process in processes:
                process.join(timeout=10)
        assert not (failed := [answer for answer in found if isinstance(answer, str)]), "\n".join(failed)
        return found

    return answers


def same_bits(one: dict[str, Any], other: dict[str, Any]) -> bool:
    assert one.keys() == other.keys()
    return all(np.array_equal(one[key], other[key]) for key in one)


@pytest.mark.parametrize(("kind", "size"), [("mlp", 1), ("mlp", 4), ("dit", 2)])
def test_a_run_that_is_taken_up_makes_the_same_bits(group: Group, tmp_path: Path, kind: str, size: int) -> None:
    whole = group(size, stretch, kind, str(tmp_path / "whole"), 6)
    halves = [group(size, stretch, kind, str(tmp_path / "halves"), 3, seed) for seed in (0, 1)]  # another seed: nothing is as it was
    assert halves[1][0]["resumed"] == 3
    assert same_bits(halves[0][0]["end"], halves[1][0]["loaded"])
    assert halves[0][0]["losses"] + halves[1][0]["losses"] == whole[0]["losses"]
    assert same_bits(halves[1][0]["end"], whole[0]["end"])


@pytest.mark.parametrize("kind", ["mlp", "copies of shards", pytest.param("dit", marks=pytest.mark.slow)])
def test_a_run_goes_on_with_other_numbers_of_processes(group: Group, tmp_path: Path, kind: str) -> None:
    alone = group(1, stretch, kind, str(tmp_path / "alone"), 12)[0]
    parts = [group(size, stretch, kind, str(tmp_path / "parts"), 3, seed)[0] for seed, size in enumerate((4, 2, 3, 1))]
    assert [part["resumed"] for part in parts] == [None, 3, 6, 9]
    for before, after in pairwise(parts):
        assert same_bits(before["end"], after["loaded"]), "values are equal after resharding"
    assert np.allclose([loss for part in parts for loss in part["losses"]], alone["losses"], rtol=0, atol=1e-5)
    manifest = json.loads((tmp_path / "parts" / folder_name(9) / "manifest.json").read_text())
    assert manifest["world_size"] == 3
    assert manifest["step"] == 9


@pytest.mark.parametrize("size", [1, 2])
def test_training_that_goes_on_during_a_save_does_not_show_in_it(group: Group, tmp_path: Path, size: int) -> None:
    at_save, held = group(size, overtaken, str(tmp_path / "run"))[0]
    assert same_bits(at_save, held)


def test_a_second_run_is_refused_on_all_processes_in_one_line(group: Group, tmp_path: Path) -> None:
    for (line,) in group(2, refused, str(tmp_path / "run")):
        assert re.fullmatch(r"'.*run' is written to by another run \(process \d+ on .*\): end it, or give another output", line)


def test_processes_share_the_check_and_one_of_them_tells_what_is_damaged(group: Group, tmp_path: Path) -> None:
    for _ in range(2):
        group(2, stretch, "mlp", str(tmp_path), 2)
    shard = tmp_path / folder_name(4) / "__1_0.distcp"
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    answers = group(2, damaged, str(tmp_path))
    assert [step for step, _ in answers] == [2, 2]
    told = [line for _, lines in answers for line in lines]
    assert len(told) == 1
    assert "__1_0.distcp' is damaged: its sha256 is" in told[0]


@pytest.mark.parametrize(("size", "failing"), [(1, 0), (2, 0), (2, 1)])
def test_a_full_disk_is_warned_of_and_the_run_goes_on(group: Group, tmp_path: Path, size: int, failing: int) -> None:
    answers = group(size, full_disk, str(tmp_path / "run"), failing)
    for outcomes, _, left in answers:
        assert outcomes == [True, False, True]
        assert left == [".lock", folder_name(1), folder_name(3)]
    told = [line for line in answers[0][1] if "step" in line]
    assert len(told) == 1
    assert re.search(r"checkpoint of step 2 could not be written \(.*File too large.*\); the last one is of step 1", told[0])
    assert not [line for line in answers[-1][1] if "step" in line] or size == 1, "rank 0 tells"


def test_processes_come_to_one_verdict_and_to_one_set_of_figures(group: Group) -> None:
    answers = group(3, health, [1.0, float("nan"), 1.0, float("inf"), float("nan"), float("nan"), float("nan"), 1.0])
    assert answers[0] == answers[1] == answers[2]
    assert answers[0]["verdicts"] == [0, 1, 0, 1, 1, 1, 2, 0]
    assert answers[0]["times"] == pytest.approx({"step_seconds": 0.21, "step_seconds_max": 0.31, "straggling": 31 / 21, "slowest_rank": 2})
    assert answers[0]["means"] == {"a": (0 + 1 + 2 + 3) / 4, "b": 10.0}
    assert answers[0]["empty"] == {}


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=lambda number: number.name)
def test_a_signal_to_one_process_ends_all_at_one_step_with_their_work_saved(group: Group, tmp_path: Path, number: signal.Signals) -> None:
    report = tmp_path / "report"
    with started(tmp_path / "rendezvous", 2, until_asked, str(tmp_path / "run"), str(report)) as (_, out):
        process = int(wait_for(report.with_suffix(".1")))
        os.kill(process, number)
        os.kill(process, number)  # at once: a launcher and a scheduler both send it
        answers = [out.get(timeout=SECONDS)[1] for _ in range(2)]
    assert answers[0] == answers[1]
    assert answers[0][0] == 128 + number
    assert (tmp_path / "run" / folder_name(answers[0][1]) / "manifest.json").exists()


@pytest.mark.parametrize("point", POINTS)
def test_a_kill_at_every_failpoint_leaves_the_one_before_or_the_new_one(tmp_path: Path, point: str) -> None:
    with started(tmp_path / "rendezvous", 1, write_until_killed, str(tmp_path / "run"), f"{point}:2") as ([process], _):
        process.join(timeout=SECONDS)
        assert process.exitcode == -signal.SIGKILL
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of what was not finished
        with Store(tmp_path / "run") as store:
            found = store.latest()
            assert found == (2 if point == "renamed" else 1)
            store.load(found, into := {"weight": torch.zeros(64, 64)})
    assert bool((into["weight"] == found).all())
    assert [path.name for path in (tmp_path / "run").iterdir() if "tmp" in path.name] == []


def test_failpoints_and_kills_at_random_moments_lose_an_interval_at_most(group: Group, tmp_path: Path) -> None:
    survive(group, tmp_path, kills=1, points=["shard", "manifest", "renamed"])


@pytest.mark.slow
def test_twenty_kills_lose_an_interval_at_most(group: Group, tmp_path: Path) -> None:
    survive(group, tmp_path, kills=14, points=["staged", "shard", "shards", "written", "manifest", "renamed"])


def survive(group: Group, folder: Path, kills: int, points: list[str], size: int = 3, every: int = 5) -> None:
    """Kill a process by SIGKILL at random moments and inside the write, take the run up each time, and compare with one never killed."""
    draw, report = random.Random(0), folder / "report"
    moments: list[str | None] = [*points, *[None] * kills]
    draw.shuffle(moments)
    for moment in moments:
        seen = len(events(report))
        point = {draw.randrange(size) if moment in ("staged", "shard", "shards", "written") else 0: f"{moment}:2"} if moment else {}
        with started(folder / "rendezvous", size, killable, str(folder / "run"), str(report), every, 10**6, point) as (processes, _):
            wait_for(report, seen + 2)
            if moment is None:
                time.sleep(draw.uniform(0, 0.6))
                processes[draw.randrange(size)].kill()
            deadline = time.monotonic() + SECONDS
            while all(process.is_alive() for process in processes) and time.monotonic() < deadline:
                time.sleep(0.01)
            assert any(process.exitcode == -signal.SIGKILL for process in processes), "none was killed"
        check(events(report), every)
    last = max(step for _, step in events(report) if step) + 3
    ends = group(size, killable, str(folder / "run"), str(report), every, last, {})
    check(events(report), every)
    never = group(size, killable, str(folder / "never"), str(folder / "other"), every, last, {})
    assert same_bits(ends[0], never[0]), "the weights are those of a run that was never killed"


def check(told: list[tuple[str, int | None]], every: int) -> None:
    """What a run finds is what was whole before it was killed, or later; of the steps before the last save at most an interval is lost."""
    whole, saved, done = 0, 0, 0
    for event, step in told:
        if event == "resumed":
            assert (step or 0) >= whole, "a checkpoint that was whole is lost"
            assert (step or 0) >= saved - every, "more than an interval before the last save is lost"
            assert (step or 0) <= done, "a checkpoint of the future"
        whole, saved, done = (max(whole, step or 0) if event == "whole" else whole), (step or 0) if event == "save" else saved, step or 0


def events(report: Path) -> list[tuple[str, int | None]]:
    lines = report.read_text().splitlines() if report.exists() else []
    found = []
    for line in lines:
        try:
            found.append(tuple(json.loads(line)))
        except ValueError:  # cut short by the kill, or being written
            continue
    return found


def wait_for(path: Path, lines: int = 0) -> str:
    """The text of a file, when it is there and has so many events."""
    deadline = time.monotonic() + SECONDS
    while time.monotonic() < deadline:
        if path.exists() and path.read_text() and (not lines or len(events(path)) >= lines):
            return path.read_text()
        time.sleep(0.01)
    raise AssertionError(f"'{path.name}' did not come")

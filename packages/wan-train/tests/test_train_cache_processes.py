"""A cache that several processes fill at once, and some of them killed."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from wan_train.data.buckets import Bucket
from wan_train.data.cache import Cache
from wan_train.data.tensor_files import key_of

WANTED = [(index, Bucket(1, 16, 16)) for index in range(40)]


def context_of(prompt: str) -> Tensor:
    """A row a byte."""
    return torch.tensor([*prompt.encode(), 0]).float()[:, None].expand(-1, 3)


class Slow(nn.Module):
    """A text encoder that writes a line for each prompt, and then takes its time."""

    def __init__(self, log: Path, seconds: float) -> None:
        super().__init__()
        self.log, self.seconds = log, seconds

    def encode(self, prompts: list[str]) -> list[Tensor]:
        with self.log.open("a") as file:
            file.write(f"{prompts[0]}\n")
        time.sleep(self.seconds)
        return [context_of(prompt) for prompt in prompts]

    def fingerprint(self) -> str:
        return "slow"


class Prompts:
    """A data set of captions."""

    def __len__(self) -> int:
        return 40

    def captions(self, index: int) -> list[str]:
        return [f"prompt {index}"]


def work(folder: Path, log: Path, seconds: float) -> None:
    torch.set_num_threads(1)
    Cache(folder, text_encoder=Slow(log, seconds)).fill(Prompts(), WANTED)


@pytest.fixture
def started() -> Any:
    """Starts `work` in processes that begin with torch imported."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch"])
    running: list[Any] = []

    def start(count: int, *args: Any) -> list[Any]:
        new = [context.Process(target=work, args=args) for _ in range(count)]
        running.extend(new)
        for process in new:
            process.start()
        return new

    yield start
    for process in running:
        process.kill()
        process.join()


@pytest.mark.xdist_group("distributed")
def test_processes_share_the_work_and_none_of_it_is_done_twice(tmp_path: Path, started: Any) -> None:
    log = tmp_path / "log"
    for process in started(3, tmp_path / "cache", log, 0.02):
        process.join()
        assert process.exitcode == 0
    assert sorted(log.read_text().splitlines()) == sorted(["", *(f"prompt {i}" for i in range(40))])
    found = Cache(tmp_path / "cache", text_encoder=Slow(log, 0)).status(Prompts(), WANTED, verify=True)
    assert (len(found.present), found.missing, found.stale, found.damaged) == (41, [], {}, {})


@pytest.mark.xdist_group("distributed")
def test_a_killed_process_leaves_nothing_half_done_and_its_work_is_taken_up(tmp_path: Path, started: Any) -> None:
    log, cache = tmp_path / "log", Cache(tmp_path / "cache", text_encoder=Slow(tmp_path / "none", 0))
    for moment in (1, 5, 6, 12):
        (process,) = started(1, tmp_path / "cache", log, 0.05)
        while len(log.read_text().splitlines() if log.exists() else []) < moment:
            time.sleep(0.01)
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        assert cache.status(Prompts(), WANTED, verify=True).damaged == {}
    (last,) = started(1, tmp_path / "cache", log, 0.0)
    last.join()
    found = cache.status(Prompts(), WANTED, verify=True)
    assert (len(found.present), found.missing, found.damaged) == (41, [], {})
    assert len(log.read_text().splitlines()) <= 41 + 4  # at most the one that each was at is done again
    assert torch.equal(cache.context("prompt 7"), context_of("prompt 7"))


def test_what_another_process_made_between_two_looks_is_not_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = Cache(tmp_path / "cache", text_encoder=Slow(tmp_path / "log", 0))
    claimed = cache.files.claimed

    def late(key: str, *, wait: bool = False) -> Any:
        facts = next(facts for facts, _ in cache.needed(Prompts(), WANTED) if key_of(facts) == key)
        cache.files.write(facts, torch.ones(1))
        return claimed(key, wait=wait)

    monkeypatch.setattr(cache.files, "claimed", late)
    done = cache.fill(Prompts(), WANTED)
    assert (done.made, done.present, (tmp_path / "log").exists()) == (0, 41, False)

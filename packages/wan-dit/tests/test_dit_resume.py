"""Runs that stop and go on: to the same bits, for every scheduler, under a cache, after Ctrl-C and after a kill."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from wan_dit.cli import main
from wan_dit.events import Done, Step
from wan_dit.pipeline import Pipeline
from wan_dit.plugins import discover, plugin_manager
from wan_dit.state import RunState

PROMPT = "a red circle moves left"
SMALL: dict[str, Any] = {"frames": 5, "size": (32, 32), "seed": 3}
SCHEDULERS = sorted(offer.name for offer in discover("wan_schedulers", plugin_manager()) if offer.dist == "wan-dit")
RUN = """
import signal, sys, wan_dit.generate_command as g
from wan_dit.cli import main
signal.signal(signal.SIGINT, signal.default_int_handler)  # the background job of a shell starts with it ignored
g.SAVE_EVERY = {every}
sys.exit(main(sys.argv[1:]))
"""


def states(pipe: Pipeline, **settings: Any) -> tuple[list[RunState], Any]:
    """The state after every step, and the result."""
    events = list(pipe.stream(PROMPT, **SMALL, **settings))
    assert isinstance(events[-1], Done)
    return [event.state for event in events if isinstance(event, Step) and event.state], events[-1].result


def resumed(state: RunState, **settings: Any) -> Any:
    """In a new pipeline."""
    return Pipeline("tiny", **settings.pop("parts", {}))(PROMPT, **SMALL, **settings, resume=state)


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_every_scheduler_goes_on_to_the_same_bits(scheduler: str, tmp_path: Path) -> None:
    parts = {"scheduler": scheduler}
    kept, whole = states(Pipeline("tiny", **parts), steps=4 if "step" not in scheduler else None)
    for state in kept[:-1]:
        path = state.save(tmp_path / "run.state")
        again = resumed(RunState.load(path), parts=parts, steps=4 if "step" not in scheduler else None)
        assert torch.equal(again.video, whole.video)
    assert kept[-1].steps_done == len(kept)


@pytest.mark.parametrize("cache", ["teacache:threshold=0.3", "easycache:threshold=0.2", "first-block:threshold=0.3", "cfg-gate"])
def test_a_cache_goes_on_too(cache: str, tmp_path: Path) -> None:
    kept, whole = states(Pipeline("tiny"), steps=8, cache=cache)
    again = resumed(RunState.load(kept[4].save(tmp_path / "run.state")), steps=8, cache=cache)
    assert torch.equal(again.video, whole.video)
    assert again.manifest["cache"] == whole.manifest["cache"]
    assert whole.manifest["options"]["cache"] == cache


def test_a_run_stopped_while_it_is_decoded_is_decoded_alone() -> None:
    kept, whole = states(Pipeline("tiny"), steps=2)
    events = list(Pipeline("tiny").stream(PROMPT, **SMALL, steps=2, resume=kept[-1]))
    assert not any(isinstance(event, Step) for event in events)
    assert torch.equal(events[-1].result.video, whole.video)


def test_a_resumed_run_takes_no_step_twice_and_counts_its_time(tmp_path: Path) -> None:
    kept, _ = states(Pipeline("tiny"), steps=4)
    steps = [event.i for event in Pipeline("tiny").stream(PROMPT, **SMALL, steps=4, resume=kept[1]) if isinstance(event, Step)]
    assert steps == [3, 4]
    assert resumed(kept[1], steps=4).timings["denoise"] > kept[1].timings["denoise"]


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"seed": 4}, "seed: 3 -> 4"),
        ({"steps": 5}, "sigmas: "),
        ({"guidance": 3.0}, "guidance: 2.0 -> 3.0"),
        ({"size": (48, 32)}, "size: "),
    ],
)
def test_a_state_of_another_run_is_refused(change: dict[str, Any], field: str) -> None:
    kept, _ = states(Pipeline("tiny"), steps=4)
    with pytest.raises(ValueError, match=f"the saved state is of another run: .*{field}"):
        Pipeline("tiny")(PROMPT, **{**SMALL, "steps": 4, **change}, resume=kept[0])


def test_a_run_of_several_processes_goes_on_in_one() -> None:
    kept, whole = states(Pipeline("tiny"), steps=4)
    options = kept[1].run.options.model_copy(update={"processes": {"ulysses": 2}})
    state = replace(kept[1], run=kept[1].run.model_copy(update={"options": options}))
    assert torch.equal(resumed(state, steps=4).video, whole.video)


@pytest.mark.parametrize("damage", [lambda data: data[:-100], lambda data: b"", lambda data: b"x" * 100])
def test_a_damaged_state_is_one_line(damage: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    kept, _ = states(Pipeline("tiny"), steps=2)
    path = kept[0].save(tmp_path / "run.state")
    path.write_bytes(damage(path.read_bytes()))
    assert main(["resume", str(path)]) == 2
    err = capsys.readouterr().err
    assert f"'{path}' is not the state of a run, or is damaged" in err
    assert len(err.splitlines()) == 1
    assert main(["resume", str(tmp_path / "none.state")]) == 2
    assert [file.name for file in tmp_path.iterdir()] == ["run.state"]


def test_a_state_runs_no_code(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> Any:
            return os.system, ("touch " + str(tmp_path / "owned"),)

    torch.save({"format": "wan-dit-state/1", "run": Evil()}, tmp_path / "run.state")
    with pytest.raises(ValueError, match="is not the state of a run"):
        RunState.load(tmp_path / "run.state")
    assert not (tmp_path / "owned").exists()


def no_room(*_: Any) -> Any:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")


def interrupt(*_: Any) -> Any:
    raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("at", "stop", "code"),
    [("wan_dit.pipeline.Pipeline._decode", no_room, 2), ("wan_dit.media.write_gif", interrupt, 130)],
    ids=["decoding", "writing"],
)
def test_what_is_told_goes_on_with_the_same_parts_and_file(
    at: str, stop: Any, code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["convert", "tiny", "my model", "--to", "own"]) == 0
    run = ["generate", PROMPT, "--backbone", "my model", "--steps", "2", "--frames", "5", "--size", "32x32", "--device", "cpu"]
    before = sorted(file.name for file in tmp_path.iterdir())
    with monkeypatch.context() as patch:
        patch.setattr(at, stop)
        assert main([*run, "--output", "a b.gif"]) == code
    told = next(line for line in capsys.readouterr().err.splitlines() if "go on with: " in line).partition("go on with: ")[2]
    assert sorted(file.name for file in tmp_path.iterdir()) == sorted([*before, "a b.state"])
    assert main([*run, "--output", "a b.gif"]) == 2, "hours of work are not replaced unasked"
    assert "'a b.state' is of a run that was stopped: go on with wan-dit resume, or" in capsys.readouterr().err
    assert main(shlex.split(told)[1:]) == 0
    assert sorted(file.name for file in tmp_path.iterdir()) == sorted([*before, "a b.gif", "a b.json", "a b.png"])


ARGUMENTS = ["--steps", "100", "--frames", "5", "--size", "32x32", "--device", "cpu", "--output", "a.mp4"]


@pytest.fixture(scope="module")
def whole() -> str:
    """Frames of the run that is never stopped."""
    return str(Pipeline("tiny")(PROMPT, frames=5, size=(32, 32), steps=100).manifest["frames_sha256"])


def started(folder: Path, every: float) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", RUN.format(every=every), "generate", PROMPT, *ARGUMENTS]
    return subprocess.Popen(command, cwd=folder, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def wait_for(process: subprocess.Popen[str], text: str) -> None:
    assert process.stderr is not None
    for line in process.stderr:
        if text in line:
            return
    raise AssertionError(f"ended without '{text}'")


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interrupted_run_says_how_to_go_on(
    tmp_path: Path, number: signal.Signals, code: int, monkeypatch: pytest.MonkeyPatch, whole: str
) -> None:
    process = started(tmp_path, 60)
    wait_for(process, "denoising")
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    assert process.returncode == code
    assert "go on with: wan-dit resume a.state" in err
    assert [file.name for file in tmp_path.iterdir()] == ["a.state"]
    check_resume(tmp_path, monkeypatch, whole)


def test_a_killed_run_goes_on_from_what_it_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, whole: str) -> None:
    process = started(tmp_path, 0.0)
    for _ in range(600):
        if (tmp_path / "a.state").exists():
            break
        time.sleep(0.05)
    process.kill()
    process.communicate(timeout=60)
    for scratch in tmp_path.glob(".a.*"):  # a kill leaves what was being written; it is no state
        scratch.unlink()
    check_resume(tmp_path, monkeypatch, whole)


def check_resume(folder: Path, monkeypatch: pytest.MonkeyPatch, whole: str) -> None:
    """It ends as the run that was never stopped, and leaves no state."""
    monkeypatch.chdir(folder)
    assert 1 <= RunState.load("a.state").steps_done < 100
    assert main(["resume", "a.state"]) == 0
    assert sorted(file.name for file in folder.iterdir()) == ["a.json", "a.mp4", "a.png"]
    assert json.loads((folder / "a.json").read_text())["frames_sha256"] == whole

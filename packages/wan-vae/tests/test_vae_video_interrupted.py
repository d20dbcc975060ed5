"""Ctrl-C, termination and a full disk, in real child processes: one line, the right exit code, and nothing half-written."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from shuffle_vae import ShuffleVAE
from wan_vae import VideoCodec
from wan_vae._shared.cli import Parser, run

Film = Callable[..., Path]
THIRD_PARTY = Path(__file__).parent / "third_party"
ENDS = {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGHUP: 129}
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(THIRD_PARTY)}


def sources(film: Film, tmp_path: Path) -> dict[str, Path]:
    """A film of noise and its latent file, and an empty folder `work`."""
    (tmp_path / "work").mkdir()
    VideoCodec(ShuffleVAE()).encode_file(film(60), tmp_path / "film.safetensors")
    return {"encode": tmp_path / "film.mp4", "decode": tmp_path / "film.safetensors"}


def hears_interrupts() -> None:
    for number in ENDS:  # a shell may have started these tests deaf to them
        signal.signal(number, signal.SIG_DFL)


@pytest.mark.parametrize(
    ("command", "name", "before", "end"),
    [
        ("encode", "a.safetensors", b"an older file", signal.SIGINT),
        ("encode", "a.safetensors", b"an older file", signal.SIGTERM),
        ("decode", "a.mkv", b"", signal.SIGHUP),
        ("decode", "pictures", b"", signal.SIGINT),
        pytest.param("decode", "a.mkv", b"an older file", signal.SIGINT, marks=pytest.mark.slow),
        pytest.param("decode", "%d.png", b"", signal.SIGTERM, marks=pytest.mark.slow),
    ],
)
def test_a_command_that_is_ended_leaves_nothing_and_keeps_what_was_there(
    film: Film, tmp_path: Path, command: str, name: str, before: bytes, end: signal.Signals
) -> None:
    source, final = sources(film, tmp_path)[command], tmp_path / "work" / name
    if before:
        final.write_bytes(before)
    kept = {file: file.read_bytes() for file in final.parent.iterdir()}
    line = [sys.executable, "-m", "wan_vae", command, str(source), str(final), "--codec", "shuffle_vae:stuck_vae", "--overwrite"]
    with subprocess.Popen(line, env=ENVIRONMENT, stdout=subprocess.PIPE, text=True, preexec_fn=hears_interrupts) as process:
        try:
            assert process.stdout
            assert process.stdout.readline() == "stuck\n"
            assert len(list(tmp_path.rglob(".*"))) == 1  # the scratch file or folder
            process.send_signal(end)
            process.wait(30)
        finally:
            process.kill()
    assert process.returncode == ENDS[end]
    assert {file: file.read_bytes() for file in final.parent.iterdir()} == kept
    assert not list(tmp_path.rglob(".*"))


def test_signals_that_others_take_stay_theirs_and_the_rest_is_as_before() -> None:
    theirs = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as under nohup
    before = signal.signal(signal.SIGTERM, signal.SIG_DFL)
    seen = []
    try:
        run(lambda args: seen.extend(map(signal.getsignal, (signal.SIGHUP, signal.SIGTERM))), Parser(), [])
        after = signal.getsignal(signal.SIGTERM)
    finally:
        signal.signal(signal.SIGHUP, theirs)
        signal.signal(signal.SIGTERM, before)
    assert seen[0] is signal.SIG_IGN
    assert seen[1] is not signal.SIG_DFL
    assert after is signal.SIG_DFL


def test_a_command_runs_in_a_thread_too() -> None:
    codes: list[int] = []
    thread = threading.Thread(target=lambda: codes.append(run(lambda args: 0, Parser(), [])))
    thread.start()
    thread.join()
    assert codes == [0]


@pytest.mark.parametrize(
    ("command", "name", "options"),
    [
        ("encode", "a.safetensors", []),
        ("decode", "a.mp4", ["--lossless"]),
        ("decode", "pictures", []),
        pytest.param("decode", "a.mkv", ["--lossless"], marks=pytest.mark.slow),
    ],
)
def test_a_full_disk_is_one_line_and_leaves_nothing(film: Film, tmp_path: Path, command: str, name: str, options: list[str]) -> None:
    source, final = sources(film, tmp_path)[command], tmp_path / "work" / name
    room = 150 if name == "pictures" else 30_000
    full = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (room, room))  # noqa: E731
    line = [sys.executable, "-m", "wan_vae", command, str(source), str(final), "--codec", "shuffle_vae:ShuffleVAE", *options]
    done = subprocess.run(line, env=ENVIRONMENT, capture_output=True, text=True, check=False, preexec_fn=full, timeout=60)
    assert (done.returncode, done.stdout) == (2, ""), done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert "File too large" in done.stderr
    assert not list(final.parent.iterdir())
    assert not list(tmp_path.rglob(".*"))

"""Ctrl-C and a full disk, in real child processes: one line, the right exit code, and nothing half-written."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from shuffle_vae import ShuffleVAE
from wan_vae import VideoCodec

Film = Callable[..., Path]
THIRD_PARTY = Path(__file__).parent / "third_party"
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(THIRD_PARTY)}


def sources(film: Film, tmp_path: Path) -> dict[str, Path]:
    """A film of noise and its latent file, and an empty folder `work`."""
    (tmp_path / "work").mkdir()
    VideoCodec(ShuffleVAE()).encode_file(film(60), tmp_path / "film.safetensors")
    return {"encode": tmp_path / "film.mp4", "decode": tmp_path / "film.safetensors"}


def hears_interrupts() -> None:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # a shell may have started these tests deaf to it


@pytest.mark.parametrize(
    ("command", "name", "before"),
    [
        ("encode", "a.safetensors", b"an older file"),
        ("decode", "pictures", b""),
        pytest.param("decode", "a.mkv", b"an older file", marks=pytest.mark.slow),
        pytest.param("decode", "%d.png", b"", marks=pytest.mark.slow),
    ],
)
def test_ctrl_c_leaves_nothing_and_keeps_what_was_there(film: Film, tmp_path: Path, command: str, name: str, before: bytes) -> None:
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
            process.send_signal(signal.SIGINT)
            process.wait(30)
        finally:
            process.kill()
    assert process.returncode == 130
    assert {file: file.read_bytes() for file in final.parent.iterdir()} == kept
    assert not list(tmp_path.rglob(".*"))


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

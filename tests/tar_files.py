"""Films and pictures as bytes, and tars of them: what the tests of tars read."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from PIL import Image
from wan_vae.video import VideoWriter


def film_bytes(frames: int, fps: int = 24, seed: int = 0) -> bytes:
    """An mp4 of noise."""
    rng = np.random.default_rng(seed)
    with TemporaryDirectory() as folder:
        path = Path(folder) / "film.mp4"
        with VideoWriter(path, fps=fps, size=(48, 32)) as writer:
            for _ in range(frames):
                writer.write(rng.integers(0, 256, (32, 48, 3), np.uint8))
        return path.read_bytes()


def picture_bytes(level: int = 80, kind: str = "JPEG", **options: Any) -> bytes:
    """A picture of one grey; kind: a format of Pillow, and `options` those of its file."""
    data = io.BytesIO()
    Image.fromarray(np.full((16, 32, 3), level, np.uint8)).save(data, kind, **options)
    return data.getvalue()


def pack(path: Path, members: dict[str, bytes], mode: Any = "w") -> Path:
    """A tar of members by their names; mode: of `tarfile.open`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, mode) as tar:
        for name, data in members.items():
            header = tarfile.TarInfo(name)
            header.size = len(data)
            tar.addfile(header, io.BytesIO(data))
    return path

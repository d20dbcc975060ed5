"""Damaged files, by the hundred: never a hang, never a crash, never a wrong silent answer."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from shuffle_vae import UncertainVAE
from wan_vae import VideoCodec
from wan_vae.latents import LatentFile, LatentInfo

THIRD_PARTY = Path(__file__).parent / "third_party"
FILMS = {"film.mp4": ("libx264", "faststart"), "film.mov": ("libx264", ""), "film.mkv": ("libx264", ""), "film.avi": ("mpeg4", "")}
FILMS |= {"film.webm": ("libvpx-vp9", ""), "film.ts": ("libx264", "")}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Films in several containers, and a latent file with all that one can hold."""
    folder = tmp_path_factory.mktemp("fuzz")
    for name, (codec, flags) in FILMS.items():
        with av.open(str(folder / name), "w", options={"movflags": flags} if flags else {}) as container:
            stream: Any = container.add_stream(codec, rate=25, options={"g": "8", "bf": "2"})
            stream.width = stream.height = 32
            stream.codec_context.gop_size = 8
            for index in range(24):
                picture = np.roll(np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8), index, axis=0)
                frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
                frame.pts = index + (max(0, index - 11) if name == "film.mov" else 0)
                container.mux(stream.encode(frame))
            container.mux(stream.encode())
    VideoCodec(UncertainVAE()).encode_file(folder / "film.mov", folder / "film.safetensors", logvar=True, dtype=torch.float16)
    assert set(LatentFile.open(folder / "film.safetensors").shapes) == {"latents", "logvar", "timestamps"}
    return folder


def batch(kind: str, seed: int, cases: int, folder: Path) -> Counter[str]:
    """What came of so many damaged files in a process of its own, since a reader in C may take its process with it."""
    line = [sys.executable, str(THIRD_PARTY / "fuzzing.py"), kind, str(seed), str(cases), str(folder)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(THIRD_PARTY)}
    done = subprocess.run(line, capture_output=True, text=True, check=False, timeout=30 + cases, env=environment)
    assert done.returncode == 0, f"{kind} {seed}: exit code {done.returncode}\n{done.stderr[-3000:]}"
    outcomes = Counter(json.loads(done.stdout))
    assert outcomes.total() == cases
    assert not [outcome for outcome in outcomes if "WRONG" in outcome], f"seed {seed}: {outcomes}, see {folder}"
    assert outcomes["refused"] > cases // 10
    return outcomes


@pytest.mark.parametrize("kind", ["latents", "video"])
def test_a_hundred_damaged_files(kind: str, folder: Path) -> None:
    batch(kind, 0, 100, folder)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(1, 5))
@pytest.mark.parametrize("kind", ["latents", "video"])
def test_two_thousand_damaged_files(kind: str, seed: int, folder: Path) -> None:
    batch(kind, seed, 250, folder)


INFO = {
    "format": "wan-vae-latents/2",
    "normalised": "true",
    **dict.fromkeys(("codec", "weights", "weights_dtype", "backend", "latent_space", "color_range"), "x"),
    **dict.fromkeys(("frames", "width", "height", "pad_frames", "pad_right", "pad_bottom", "rotation", "bit_depth", "primaries"), "8"),
    **dict.fromkeys(("fps", "time_base", "pixel_aspect"), "24/1"),
    "transfer": "1",
    "crop": "0,1,2,3",
    "gaps": "1:2:filled,8:0:cut",
}


@given(key=st.sampled_from(sorted(INFO)), text=st.one_of(st.text(max_size=12), st.text("0123456789-/,:.e ", max_size=20), st.none()))
@settings(max_examples=200, deadline=None)
def test_any_metadata_are_refused_or_mean_what_they_say(key: str, text: str | None) -> None:
    changed = {name: text if name == key else value for name, value in INFO.items() if name != key or text is not None}
    try:
        info = LatentInfo.from_metadata(changed)  # type: ignore[arg-type]
    except ValueError:
        return
    assert LatentInfo.from_metadata(info.to_metadata()) == info
    if key not in ("fps", "time_base", "pixel_aspect", "crop", "gaps") and not str(text).startswith("0"):
        assert info.to_metadata()[key] == text


@given(data=st.binary(max_size=300), prefix=st.integers(0, 400))
@settings(max_examples=100, deadline=None)
def test_any_bytes_are_no_latent_file(tmp_path_factory: pytest.TempPathFactory, data: bytes, prefix: int) -> None:
    path = tmp_path_factory.getbasetemp() / "bytes.safetensors"
    path.write_bytes(prefix.to_bytes(8, "little") + data)
    with pytest.raises(ValueError, match="is not a latent file"):
        LatentFile.open(path)

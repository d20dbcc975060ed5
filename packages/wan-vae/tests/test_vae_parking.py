"""Histories of tiles on disk: the same numbers in less memory, one clear error on a full disk, and nothing left behind."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import wan_vae.parking
from wan_vae import load_vae
from wan_vae.parking import Parking
from wan_vae.tiling import TiledVAE

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}
PEAK = """
import sys, torch
from wan_vae import load_vae
from wan_vae.peak_memory import PeakMemory
from wan_vae.tiling import TiledVAE

vae = load_vae("tiny")
vae.decode(torch.randn(1, 16, 2, 4, 4))
tiled = TiledVAE(vae, (160, 160)) if sys.argv[1] == "exact" else vae
memory = PeakMemory(torch.device("cpu"))
for _ in memory.watch(tiled.decode_stream(torch.randn(1, 16, 1, 60, 120) for _ in range(3))):
    pass
print(memory.peak)
"""
FULL = """
import resource, torch
from wan_vae import load_vae, parking
from wan_vae.tiling import TiledVAE

parking.IN_MEMORY = 0
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
TiledVAE(load_vae("tiny"), (32, 32)).decode(torch.randn(1, 16, 2, 8, 8))
"""


@pytest.mark.parametrize("mode", ["exact", "blend"])
@pytest.mark.parametrize("half", ["encode", "decode"])
def test_on_disk_or_in_memory_the_result_is_the_same(monkeypatch: pytest.MonkeyPatch, half: str, mode: str) -> None:
    vae = TiledVAE(load_vae("tiny"), (32, 32), mode)
    generator = torch.Generator().manual_seed(0)
    given = torch.rand(1, 3, 9, 64, 80, generator=generator) if half == "encode" else torch.randn(1, 16, 3, 8, 10, generator=generator)
    expected = getattr(vae, half)(given)
    monkeypatch.setattr(wan_vae.parking, "IN_MEMORY", 0)
    assert torch.equal(getattr(vae, half)(given), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_a_tensor_comes_back_as_it_was(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    monkeypatch.setattr(wan_vae.parking, "IN_MEMORY", 0)
    x = torch.randn(2, 5, 2, 6, 7).to(dtype)
    history = {
        "plain": x,
        "last": x.contiguous(memory_format=torch.channels_last_3d),
        "cut": x[:, 1:4, :, ::2],
        "one": x[:1, :1, :1, :1, :1],
    }
    parking = Parking(2)
    parking.store("a", {name: value + 1 for name, value in history.items()})
    parking.store("b", history)
    parking.store("a", history)  # in the room of the first
    for tile in ("a", "b"):
        found = parking.fetch(tile)
        assert found.keys() == history.keys()
        for name, value in history.items():
            assert found[name].dtype == dtype
            assert torch.equal(found[name], value)
    assert found["last"].is_contiguous(memory_format=torch.channels_last_3d)
    assert parking.fetch("c") == {}
    parking.store("a", {"plain": torch.cat([x, x])})  # larger than its room: what lies beside it stays
    assert torch.equal(parking.fetch("a")["plain"], torch.cat([x, x]))
    assert all(torch.equal(value, history[name]) for name, value in parking.fetch("b").items())


def test_the_scratch_file_has_no_name_and_lies_where_asked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(wan_vae.parking, "IN_MEMORY", 0)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    parking = Parking(2)
    parking.store("a", {"slot": torch.ones(1, 1, 1, 4, 4)})
    held = [os.readlink(f"/proc/self/fd/{name}") for name in os.listdir("/proc/self/fd") if os.path.exists(f"/proc/self/fd/{name}")]
    assert any(link.startswith(str(tmp_path)) for link in held)
    assert not list(tmp_path.iterdir())


def test_a_full_disk_is_an_error_that_says_where(tmp_path: Path) -> None:
    environment = {**ENVIRONMENT, "TMPDIR": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", FULL], env=environment, capture_output=True, text=True, check=False)
    assert f"no room for the histories of 4 tiles in '{tmp_path}': File too large; set TMPDIR to another folder" in done.stderr
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]  # torch may leave an empty folder


@pytest.mark.slow
def test_exact_tiles_take_less_memory_than_the_whole_picture() -> None:
    peaks = {}
    for mode in ("whole", "exact"):
        done = subprocess.run([sys.executable, "-c", PEAK, mode], env=ENVIRONMENT, capture_output=True, text=True, check=True)
        peaks[mode] = int(done.stdout)
    assert peaks["exact"] < 0.5 * peaks["whole"], peaks

"""Memory is predicted before anything runs, tiles are chosen by it, and where it runs out all the same tiles step in."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import wan_vae._shared.memory
import wan_vae.plan
from torch import Tensor
from wan_vae import load_vae
from wan_vae._shared.memory import free_memory
from wan_vae.backoff import BackingOff, out_of_memory, smaller_tiles
from wan_vae.cli import main
from wan_vae.commands.planning import add_tiling, amount, tiled
from wan_vae.config import PRESETS
from wan_vae.footprint import footprint
from wan_vae.plan import make_plan
from wan_vae.setting import Setting, setting_of
from wan_vae.testing import difference
from wan_vae.tiling import TiledVAE

GB = 10**9
CHILD = """
import sys, torch
from wan_vae import codec, load_vae, model

def resident(field):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(field))

half, height, width = sys.argv[1], *map(int, sys.argv[2:])
vae = load_vae("tiny")
before = resident("VmRSS") - sum(parameter.nbytes for parameter in vae.parameters()) // 1024
vae.backend = "direct"
if half == "encoder":
    for _ in vae.encode_stream(torch.rand(1, 3, frames, height, width) for frames in (1, 4, 4, 4)):
        pass
else:
    for _ in vae.decode_stream(torch.randn(1, 16, 1, height // 8, width // 8) for _ in range(4)):
        pass
print(resident("VmHWM") - before)  # ru_maxrss would count what the parent held
"""


TILES = """
import sys, torch
from wan_vae import codec
from wan_vae.config import WAN21
from wan_vae.model import WanVAE
from wan_vae.tiling import TiledVAE

def resident(field):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(field))

before = resident("VmRSS")
vae = WanVAE(WAN21.model_copy(update={"base_dim": 32, "decoder_base_dim": 32, "num_res_blocks": 1})).eval()
vae.backend = "direct"
height, width = map(int, sys.argv[1:])
tiled = vae if width == 1536 else TiledVAE(vae, (height, width))
for _ in tiled.decode_stream(torch.randn(1, 16, 1, 8, 192) for _ in range(3)):
    pass
print(resident("VmHWM") - before)
"""


def measured(half: str, height: int, width: int) -> int:
    """Bytes that a process took at its peak, above what it had with everything imported and no weights."""
    command = [sys.executable, "-c", CHILD, half, str(height), str(width)]
    done = subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, check=True)
    return int(done.stdout) * 1024


@pytest.mark.parametrize(("half", "height", "width"), [("encoder", 240, 416), ("decoder", 320, 480)])
def test_the_prediction_is_close_to_what_a_process_takes(half: str, height: int, width: int) -> None:
    parts = footprint(PRESETS["tiny"], half, (height // 8, width // 8), dtype=torch.float32)  # type: ignore[arg-type]
    ratio = parts.predicted() / measured(half, height, width)
    assert 0.5 < ratio < 1.5, f"{ratio:.2f} of what was measured: {parts}"


def test_the_parts_of_a_prediction() -> None:
    parts = footprint(PRESETS["wan2.1"], "decoder", (60, 104), dtype=torch.bfloat16)
    assert parts.weights == 2 * 126_892_531
    assert parts.filters == 0
    twice = footprint(PRESETS["wan2.1"], "decoder", (60, 208), dtype=torch.bfloat16)
    assert twice.history == 2 * parts.history
    assert twice.work == pytest.approx(2 * parts.work, rel=0.02)
    vae = load_vae("tiny")
    session = vae.decode_session()
    for _ in range(3):
        session.push(torch.randn(1, 16, 1, 3, 5))
    state = footprint(PRESETS["tiny"], "decoder", (3, 5), dtype=torch.float32)
    assert state.history == sum(value.nbytes for value in session.state.history.values())


@pytest.mark.slow
def test_what_tiles_take_is_predicted_and_less_than_the_whole_picture() -> None:
    """A Wan2.1 of a third of the width, on a wide strip: decoded whole, and in exact tiles whose histories wait on disk."""
    config = PRESETS["wan2.1"].model_copy(update={"base_dim": 32, "decoder_base_dim": 32, "num_res_blocks": 1})
    setting = Setting(config, "decoder", (64, 1536), backend="direct", memory=GB)
    whole = make_plan(setting, "whole")
    plans = (
        replace(whole, memory=whole.parts.predicted()),
        make_plan(replace(setting, memory=whole.memory // 2)),
    )  # noise never stands still
    assert [plan.mode for plan in plans] == ["whole", "exact"]
    peaks = []
    for plan in plans:
        command = [sys.executable, "-c", TILES, *map(str, plan.tile)]
        done = subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, check=True)
        peaks.append(int(done.stdout) * 1024)
        assert 0.75 < plan.memory / peaks[-1] < 1.35, (plan, peaks)
    assert peaks[1] < 0.7 * peaks[0], peaks


@pytest.mark.parametrize(("device", "dtype"), [("cuda", torch.bfloat16), ("cpu", torch.float32)])
@pytest.mark.parametrize("half", ["encoder", "decoder"])
def test_less_memory_means_smaller_tiles_and_more_work(half: str, device: str, dtype: torch.dtype) -> None:
    setting = Setting(PRESETS["wan2.1"], half, (480, 832), backend="direct", device=torch.device(device), dtype=dtype, memory=1)  # type: ignore[arg-type]
    most = make_plan(setting, "whole").memory
    budgets = [most, most * 7 // 10, most * 7 // 20, most // 100]
    plans = [make_plan(replace(setting, memory=memory)) for memory in budgets]
    assert [plan.mode for plan in plans[:3]] == ["whole", "exact", "exact"]
    assert [plan.fits for plan in plans] == [True, True, True, False]
    assert plans[0].memory > plans[1].memory > plans[2].memory
    assert plans[0].overhead == 0 < plans[1].overhead < plans[2].overhead
    assert plans[1].tiles < plans[2].tiles
    assert "does not fit" in plans[3].note
    assert "approximate" in make_plan(replace(setting, memory=most), "blend").note
    TiledVAE(load_vae("tiny"), plans[1].tile)


def test_small_tiles_where_auto_finds_too_little_memory(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    parser = argparse.ArgumentParser()
    add_tiling(parser)
    vae = load_vae("tiny")
    whole = make_plan(setting_of(vae, "encoder", (256, 384)), "whole").memory
    monkeypatch.setattr(wan_vae.plan, "free_budget", lambda device: whole * 9 // 10)
    model = tiled(vae, parser.parse_args([]), (256, 384), "encoder")
    assert model.vae.mode == "exact"
    assert "256x384 pixels would not fit into" in capsys.readouterr().err
    model = tiled(vae, parser.parse_args(["--tile-mode", "blend"]), (256, 384), "encoder")
    assert model.vae.mode == "blend"
    assert "approximate" in capsys.readouterr().err


def test_what_idle_files_hold_of_a_control_group_is_free(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(wan_vae._shared.memory, "CGROUP", tmp_path)
    everywhere = free_memory()
    for name, text in (("max", "1000"), ("current", "900"), ("stat", "anon 100\ninactive_file 700\nactive_file 100\n")):
        (tmp_path / f"memory.{name}").write_text(text)
    assert free_memory() == 800
    (tmp_path / "memory.stat").unlink()
    assert free_memory() == 100
    (tmp_path / "memory.max").write_text("max")
    assert free_memory() == pytest.approx(everywhere, rel=0.5)


def test_a_picture_takes_less_than_a_film() -> None:
    setting = Setting(PRESETS["tiny"], "encoder", (64, 64), memory=GB)
    assert make_plan(replace(setting, frames=1)).memory < make_plan(setting).memory


def test_the_command_prints_both_halves(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--codec", "wan2.2", "--size", "704x1280", "--dtype", "bf16", "--memory", "6GB", "--json"]) == 0
    encode, decode = json.loads(capsys.readouterr().out)
    assert (encode["command"], decode["command"]) == ("encode", "decode")
    assert encode["weights"] == 2 * 704_688_668
    assert encode["budget"] == 6 * GB
    assert main(["plan", "--size", "47x61"]) == 0
    table = capsys.readouterr().out
    assert "whole" in table
    assert "exact" in table


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--size", "48"], "480x832"),
        (["--size", "99999x8"], "at most 32768 pixels"),
        (["--size", "48x48", "--memory", "much"], "8GB"),
        (["--size", "48x48", "--memory", "8GB", "--device", "abacus"], "there is no device 'abacus'"),
        (["--size", "48x48", "--chunk", "100000"], "from 1 to 9999"),
        (["--size", "48x48", "--codec", "nope"], "nope"),
    ],
)
def test_what_cannot_be_planned_is_one_line(given: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    try:
        code = main(["plan", *given])
    except SystemExit as error:
        code = int(str(error.code))
    output = capsys.readouterr().err
    assert code == 2
    assert message in output
    assert output.count("\n") == 1


def test_amounts_of_memory() -> None:
    assert [amount(text) for text in ("8GB", "8g", "500MiB", "1.5 GB", "7")] == [8 * GB, 8 * GB, 500 * 2**20, 3 * GB // 2, 7]
    with pytest.raises(argparse.ArgumentTypeError, match="8GB"):
        amount("GB")


class Narrow:
    """The tiny VAE on a machine where chunks of more than so many pixels do not fit."""

    def __init__(self, pixels: int, message: str = "DefaultCPUAllocator: can't allocate memory") -> None:
        self.vae, self.pixels, self.message = load_vae("tiny"), pixels, message
        self.spec = self.vae.spec

    def _checked(self, chunks: Iterable[Tensor], scale: int) -> Iterator[Tensor]:
        for chunk in chunks:
            if chunk[:, 0].numel() * scale > self.pixels:
                raise RuntimeError(self.message)
            yield chunk

    def encode_stream(self, chunks: Iterable[Tensor]) -> Iterator[Tensor]:
        return self.vae.encode_stream(self._checked(chunks, 1))  # type: ignore[no-any-return]

    def decode_stream(self, chunks: Iterable[Tensor]) -> Iterator[Tensor]:
        return self.vae.decode_stream(self._checked(chunks, 64))  # type: ignore[no-any-return]


def film() -> list[Tensor]:
    video = torch.rand(1, 3, 9, 64, 96, generator=torch.Generator().manual_seed(0)) * 2 - 1
    return list(video.split([1, 4, 4], dim=2))


@pytest.mark.parametrize("pixels", [64 * 96 - 1, 4 * 64 * 96 - 1])
def test_where_memory_runs_out_tiles_step_in_and_say_so(pixels: int) -> None:
    narrow = Narrow(pixels)
    plenty = Narrow(10**9)
    smaller = lambda half, size: TiledVAE(plenty, (32, 48), "blend", 8)  # noqa: E731
    with pytest.warns(RuntimeWarning, match="memory ran out at 64x96 pixels; going on in blended tiles of 32x48, which is approximate"):
        parts = list(BackingOff(narrow, smaller).encode_stream(film()))
    assert [part.shape[2] for part in parts] == [1, 1, 1]
    expected = list(smaller("encoder", (64, 96)).encode_stream(film()))
    assert difference(torch.cat(parts[1:], 2), torch.cat(expected[1:], 2)) < 1e-6


def test_tiles_of_half_the_picture_by_themselves() -> None:
    narrow = Narrow(4 * 64 * 48)
    with pytest.warns(RuntimeWarning, match="blended tiles of 64x48"):
        parts = list(BackingOff(narrow, smaller_tiles(narrow)).encode_stream(film()))
    assert torch.cat(parts, 2).shape == (1, 16, 3, 8, 12)
    latents = torch.cat(parts, 2)
    with pytest.warns(RuntimeWarning, match="tiles"):
        video = torch.cat(list(BackingOff(Narrow(64 * 48), smaller_tiles(narrow)).decode_stream(latents.split(1, 2))), 2)
    assert video.shape == (1, 3, 9, 64, 96)


def test_a_second_failure_and_other_errors_pass_through() -> None:
    narrow = Narrow(10)
    with pytest.warns(RuntimeWarning), pytest.raises(RuntimeError, match="DefaultCPUAllocator"):
        list(BackingOff(narrow, smaller_tiles(narrow)).encode_stream(film()))
    broken = Narrow(10, "another fault")
    with pytest.raises(RuntimeError, match="another fault"):
        list(BackingOff(broken, smaller_tiles(broken)).encode_stream(film()))
    assert out_of_memory(torch.OutOfMemoryError("full"))
    assert not out_of_memory(ValueError("out of memory"))


def test_a_wan_vae_falls_back_on_tiles_by_plan() -> None:
    vae = load_vae("tiny")
    model = smaller_tiles(vae)("decoder", (256, 384))
    assert model.vae is vae
    assert model.cells[0] * model.cells[1] < 32 * 48
    again = smaller_tiles(model)("decoder", (256, 384))
    assert (again.vae, again.mode) == (vae, model.mode)
    assert again.cells[0] * again.cells[1] < model.cells[0] * model.cells[1]


@pytest.mark.parametrize(("given", "kind"), [([], BackingOff), (["--tile", "off"], None), (["--tile", "32x48"], TiledVAE)])
def test_options_of_commands(given: list[str], kind: type | None) -> None:
    parser = argparse.ArgumentParser()
    add_tiling(parser)
    vae = load_vae("tiny")
    model = tiled(vae, parser.parse_args(given), (64, 96), "encoder")
    assert (model is vae) == (kind is None)
    if kind is TiledVAE:
        assert isinstance(model.vae, TiledVAE)
    assert difference(torch.cat(list(model.encode_stream(film())), 2), torch.cat(list(vae.encode_stream(film())), 2)) < 1e-4
    assert model.fingerprint() == vae.fingerprint()

"""Memory of the codecs that are no Wan VAEs: predicted from streams on the meta device, and close to what a process takes."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import wan_vae.plan
from torch import Tensor
from wan_vae._shared.spec import resolve_name
from wan_vae.codecs.dcae import DCAE
from wan_vae.codecs.dcae_config import PRESETS as DEEP
from wan_vae.codecs.ltx import LTXVAE
from wan_vae.codecs.ltx_config import LTXConfig
from wan_vae.codecs.taehv_config import TAEW21
from wan_vae.commands.planning import add_tiling, tiled
from wan_vae.footprint import Footprint, Meter
from wan_vae.plan import make_plan
from wan_vae.plugins import find_vae
from wan_vae.setting import Setting, config_of, setting_of
from wan_vae.tiles import Half
from wan_vae.traced import KINDS, PRESETS, CopyingConvolutions, meta_codec, streamed

GB = 10**9
BLOCKS: list[Any] = [["res_x", 2], ["compress_all", {}], ["res_x", 2], ["compress_all", {}], ["res_x", 2]]
UP: list[Any] = [["res_x", 2], ["compress_all", {"residual": True, "multiplier": 2}], ["res_x", 2]]
FILM = LTXConfig(
    latent_channels=16, encoder_base_channels=16, decoder_base_channels=32, encoder_blocks=BLOCKS,
    decoder_blocks=[*UP, UP[1], ["res_x", 2]], timestep_conditioning=True, latent_space="test",
)  # fmt: skip
WIDTHS = (32, 64, 64, 128, 128, 128)
PICTURES = DEEP["dc-ae-f32c32-sana-1.0"].model_copy(update={"encoder_dims": WIDTHS, "decoder_dims": WIDTHS})
CASES: dict[str, tuple[Any, tuple[int, int], int]] = {  # configuration, rows and columns of latents, how many
    "ltx": (FILM, (30, 54), 8),
    "dc-ae": (PICTURES, (12, 16), 3),
    "taehv": (TAEW21, (24, 40), 4),
}
CHILD = """
import json, sys, torch
from wan_vae.traced import KINDS

def resident(field):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(field))

name, half, rows, columns, count, fields = sys.argv[1:]
kind = next(kind for kind in KINDS if kind.__name__ == name)
with torch.no_grad():
    torch.nn.functional.conv3d(torch.randn(1, 4, 3, 8, 8), torch.randn(4, 4, 3, 3, 3))
vae = KINDS[kind](kind.model_validate_json(fields)).eval()
time, height, width = vae.spec.stride
rows, columns = int(rows), int(columns)
before = resident("VmRSS")
if half == "encoder":
    stream = vae.encode_stream(torch.rand(1, 3, time if i else 1, rows * height, columns * width) for i in range(int(count)))
else:
    stream = vae.decode_stream(torch.randn(1, vae.spec.latent_channels, 1, rows, columns) for _ in range(int(count)))
for _ in stream:
    pass
print(resident("VmHWM") - before)
"""


def predicted(config: Any, half: Half, cells: tuple[int, int], *, chunks: tuple[int, ...] = (1, 1, 1)) -> Footprint:
    return streamed(config, half, cells, chunks=chunks, dtype=torch.float32, cpu=True)


@pytest.mark.parametrize("half", ["encoder", "decoder"])
@pytest.mark.parametrize("name", CASES)
def test_the_prediction_is_close_to_what_a_process_takes(name: str, half: Half) -> None:
    config, cells, count = CASES[name]
    parts = predicted(config, half, cells)
    line = [sys.executable, "-c", CHILD, type(config).__name__, half, *map(str, cells), str(count), config.model_dump_json()]
    done = subprocess.run(line, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, check=True)
    ratio = (parts.predicted() - parts.weights) / (int(done.stdout) * 1024)
    print(name, half, parts, f"{ratio:.2f}")
    assert 0.5 < ratio < 1.8, f"{ratio:.2f} of what was measured: {parts}"


@pytest.mark.parametrize(("channels", "cpu", "expected"), [(16, True, "columns"), (64, True, "copies"), (64, False, "")])
def test_what_a_convolution_takes_beside_input_and_output(channels: int, cpu: bool, expected: str) -> None:
    """Up to 20480 channels x frames x rows torch writes out what every position sees; oneDNN works on copies; a GPU is left at that."""
    x = torch.empty(1, channels, 6, 160, 32, device="meta")
    weight = torch.empty(8, channels, 3, 3, 3, device="meta")
    with torch.no_grad(), CopyingConvolutions(cpu), Meter([x, weight]) as meter:
        made = torch.conv3d(x, weight)
    extra = {"columns": 4 * weight[0].numel() * made[0, 0].numel(), "copies": x.nbytes + weight.nbytes + made.nbytes, "": 0}
    assert meter.peak == made.nbytes + extra[expected]


def test_specs_tell_what_decoding_takes() -> None:
    """What `wan-dit plan` asks."""
    for name in ("ltx-video-0.9", "dc-ae-f32c32-sana-1.0", "taew2_1", "tiny"):
        spec = find_vae(name)
        assert spec.footprint
        told = resolve_name(spec.footprint)(spec, size=(256, 256), frames=17, dtype="bfloat16", device="cuda")
        assert told["weights"] >= 2 * (spec.parameters or 0) > 0
        assert told["work"] > 2 * 3 * 17 * 256 * 256


@pytest.mark.parametrize("name", CASES)
def test_the_parts_of_a_prediction(name: str) -> None:
    config, _, _ = CASES[name]
    one, two = (predicted(config, "decoder", cells) for cells in ((24, 24), (24, 48)))
    vae = KINDS[type(config)](config)
    assert one.weights == sum(tensor.nbytes for tensor in (*vae.parameters(), *vae.buffers()))
    assert two.work == pytest.approx(2 * one.work, rel=0.1)
    assert two.history == pytest.approx(2 * one.history, rel=0.02)
    half = streamed(config, "decoder", (24, 24), chunks=(1, 1, 1), dtype=torch.bfloat16, cpu=True)
    assert half.weights < 0.51 * one.weights
    assert half.work < 0.95 * one.work  # linear attention stays in fp32
    picture = predicted(config, "decoder", (24, 24), chunks=(1,))
    assert picture.peak <= one.peak


def test_what_a_look_ahead_holds_counts_from_the_first_chunks_on() -> None:
    few, many = (predicted(FILM, "decoder", (8, 8), chunks=(1,) * count) for count in (3, 30))
    assert meta_codec(FILM, torch.float32).look_ahead > 8
    assert few.history == many.history > 10 * 4 * 16 * 8 * 8
    assert few.work == many.work


@pytest.mark.parametrize("name", ["ltx-video-0.9.5", "dc-ae-f128c512-in-1.0", "taew2_2"])
def test_the_command_plans_for_presets_without_their_weights(name: str, run: Callable[..., tuple[int, str, str]]) -> None:
    code, out, err = run("plan", "--codec", name, "--size", "512x768", "--dtype", "bf16", "--memory", "900GB", "--json")
    assert (code, err) == (0, "")
    for row in json.loads(out):
        assert row["mode"] == "whole"
        assert row["weights"] >= 2 * (find_vae(name).parameters or 0) > 0
        assert row["memory"] > row["weights"] + row["work"] + row["history"]
    assert config_of(find_vae(name)) is PRESETS[name]


def test_less_memory_means_blended_tiles() -> None:
    setting = Setting(FILM, "decoder", (512, 512), memory=1)
    whole = make_plan(setting, "whole")
    plan = make_plan(replace(setting, memory=whole.memory // 2))
    assert (plan.mode, plan.fits, plan.tiles > 1) == ("blend", True, True)
    with pytest.raises(ValueError, match="exact tiles take a Wan VAE: use the mode 'blend'"):
        make_plan(setting, "exact")


@pytest.mark.parametrize("build", [lambda: LTXVAE(FILM), lambda: DCAE(PICTURES)], ids=["ltx", "dc-ae"])
def test_auto_finds_tiles_where_memory_is_little(
    build: Callable[[], Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    parser = argparse.ArgumentParser()
    add_tiling(parser)
    vae = build().eval()
    setting = setting_of(vae, "decoder", (512, 768))
    assert setting is not None
    little = make_plan(setting, "whole").memory * 9 // 10
    monkeypatch.setattr(wan_vae.plan, "free_budget", lambda device: little)
    model = tiled(vae, parser.parse_args([]), (512, 768), "decoder")
    assert model.vae.mode == "blend"
    assert "512x768 pixels would not fit into" in capsys.readouterr().err
    _, height, width = vae.spec.stride
    latents = torch.randn(1, vae.spec.latent_channels, 2, 512 // height, 768 // width)
    video: Tensor = model.decode(latents)
    assert video.shape == vae.decode(latents).shape
    with pytest.raises(ValueError, match="use the mode 'blend'"):
        tiled(vae, parser.parse_args(["--tile-mode", "exact"]), (512, 768), "decoder")


def test_a_codec_of_others_is_not_planned() -> None:
    assert setting_of(object(), "decoder", (8, 8)) is None
    with pytest.raises(ValueError, match=r"the memory of 'shuffle' cannot be predicted"):
        config_of(find_vae("shuffle_vae:ShuffleVAE"))

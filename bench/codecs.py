"""What the ideas of other codecs bring at tiny scale: `python bench/codecs.py docs/codecs.md` trains each pair three times, and compares.

Every arm of a study has the data, the seeds and the steps of the others, and differs from them in what the study is about.
`python bench/codecs.py docs/codecs.md STUDY...` trains some of the studies alone; the page has those whose runs are in `runs/codecs`.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from statistics import mean

import torch
from codec_studies import OPTIMISER, PICTURES, RUNS, STUDIES, Study, draw_pictures
from codec_table import section
from curves import panel, smooth
from page import header, machine, table
from PIL import Image, ImageDraw
from torch.utils.flop_counter import FlopCounterMode
from wan_train.config import TrainConfig
from wan_train.trainer import Trainer
from wan_vae import load_vae

SEEDS = (0, 1, 2)
SUMMARY = """
Tiny codecs on procedural clips with the statistics of film (`natural`), trained by wan-train on one thread each, three seeds an arm.
Figures are of clips that no run has seen: the mean over the seeds, the least and the most; `GFLOP` is what one training clip takes
there and back, without the gradients. Arms of a study take as many steps of as many pixels, not the same time. What holds for networks of
a few hundred thousand parameters after minutes of training need not hold for large ones after weeks.
"""


def main(page: str, *chosen: str) -> None:
    torch.set_num_threads(1)
    if "adapted" in (chosen or STUDIES) and not PICTURES.exists():
        draw_pictures()
    for name in chosen or STUDIES:
        for seed in SEEDS:
            for arm in STUDIES[name].arms:
                one(name, arm, seed)
    parts, trained = [header("Codecs", "codecs", SUMMARY), machine(1)], {}
    for name, study in STUDIES.items():
        found = {arm: [json.loads(path.read_text()) for path in sorted((RUNS / name / arm).glob("*/figures.json"))] for arm in study.arms}
        if all(len(runs) == len(SEEDS) for runs in found.values()):
            parts += [
                f"## {study.title}\n\n{study.question}\n",
                results(found),
                f"{study.reading}\n\n![curves](training/codecs-{name}.png)\n",
            ]
            trained |= {f"{name}, {arm}": str(RUNS / name / arm / "0" / "export" / "vae") for arm in study.arms}
            curves(name, study).save(Path(page).parent / "training" / f"codecs-{name}.png", optimize=True)
    if not chosen:
        parts.append(section(RUNS, trained))
    Path(page).write_text("\n".join(parts))


def one(name: str, arm: str, seed: int) -> None:
    """Train and measure a run, unless both are done; what was trained with other settings is trained again."""
    study, folder = STUDIES[name], RUNS / name / arm / str(seed)
    kl = 1e-3 if name.startswith("residual") else 0.0
    settings = {"l1": 0.0, "log_l2": 0.1, "kl": kl, "validation": 8, **study.objective, **study.arms[arm]}
    run = {
        "name": f"{name}, {arm}", "seed": seed, "output": str(folder), "ema": 0.99, "threads": 1, "save_every": 0,
        "optimiser": OPTIMISER, **study.run,
        "objective": {"name": "vae", "settings": settings}, "data": study.data,
    }  # fmt: skip
    asked, figures = folder / "asked.json", folder / "figures.json"
    if not asked.exists() or json.loads(asked.read_text()) != run:
        shutil.rmtree(folder, ignore_errors=True)
        trainer = Trainer(TrainConfig.model_validate(run))
        trainer.run()
        if trainer.step < trainer.config.steps:
            raise SystemExit(f"{folder} was interrupted")
        asked.write_text(json.dumps(run))
    if figures.exists():
        return
    vae = load_vae(str(folder / "export" / "vae"))
    found = {"parameters": sum(each.numel() for each in vae.parameters()), "GFLOP": 0.0, **study.measure(vae, arm)}
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        frames, size = (settings["phases"][0][key] for key in ("frames", "size"))
        vae.to("meta").reconstruct(torch.zeros(1, 3, frames, size, size, device="meta"))
    found["GFLOP"] = counter.get_total_flops() / 1e9
    figures.write_text(json.dumps(found))
    print(name, arm, seed, {key: round(value, 3) for key, value in found.items()}, flush=True)


def results(found: dict[str, list[dict[str, float]]]) -> str:
    heads = list(next(iter(found.values()))[0])
    rows = [[arm, *(shown(head, [run[head] for run in runs]) for head in heads)] for arm, runs in found.items()]
    return table(["arm", *heads], rows)


def shown(head: str, values: list[float]) -> str:
    if head == "parameters":
        return f"{values[0]:,.0f}"
    if head == "GFLOP":
        return f"{values[0]:.2f}"
    digits = 3 if "SSIM" in head else 2
    return f"{mean(values):.{digits}f} ({min(values):.{digits}f} to {max(values):.{digits}f})"


def curves(name: str, study: Study) -> Image.Image:
    """PSNR of validation clips by step, the mean of the seeds."""
    lines = {}
    for arm in study.arms:
        logs = [(RUNS / name / arm / str(seed) / "log.jsonl").read_text().splitlines() for seed in SEEDS]
        runs = [{row["step"]: row["val_psnr"] for row in map(json.loads, log) if "val_psnr" in row} for log in logs]
        lines[arm] = smooth([(step, mean(run[step] for run in runs)) for step in runs[0]])
    picture = Image.new("RGB", (1280, 400), "white")
    panel(ImageDraw.Draw(picture), f"{study.title}: PSNR of validation clips, dB", lines, 0)
    return picture.quantize(32)


if __name__ == "__main__":
    main(*sys.argv[1:])

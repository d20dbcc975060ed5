"""Draw the curves of training logs as PNG, and keep a thinned copy of each log: `python bench/curves.py runs/NAME... docs/training`."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

from PIL import Image, ImageDraw

WIDTH, HEIGHT, EDGE = 1280, 400, 96
COLOURS = ("#1f77b4", "#d62728", "#2ca02c", "#9467bd", "#ff7f0e")
PANELS = {  # title -> figures drawn together
    "loss": ("loss",),
    "PSNR of training clips, dB": ("psnr",),
    "PSNR of validation clips, dB": ("val_psnr",),
    "share of preview clips that are right": ("val_colour", "val_shape", "val_motion", "val_background", "val_all_right"),
}
KEEP = 400  # lines of a thinned log

Point = tuple[float, float]


def main(*arguments: str) -> None:
    *runs, folder = map(Path, arguments)
    folder.mkdir(parents=True, exist_ok=True)
    for run in runs:
        rows = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
        measured, steps = [row for row in rows if "loss" not in row], [row for row in rows if "loss" in row]
        kept = sorted([*steps[:: max(1, len(steps) // KEEP)], *measured], key=lambda row: row["step"])
        (folder / f"{run.name}.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in kept))
        drawing(run.name, rows).save(folder / f"{run.name}.png", optimize=True)


def drawing(name: str, rows: list[dict[str, float]]) -> Image.Image:
    """One panel above another for every figure that the log has."""
    panels = {}
    for title, figures in PANELS.items():
        lines = {figure: smooth([(row["step"], row[figure]) for row in rows if figure in row]) for figure in figures}
        if any(lines.values()):
            panels[f"{name}: {title}"] = {figure: points for figure, points in lines.items() if points}
    picture = Image.new("RGB", (WIDTH, HEIGHT * len(panels)), "white")
    for row, (title, lines) in enumerate(panels.items()):
        panel(ImageDraw.Draw(picture), title, lines, row * HEIGHT)
    return picture.quantize(32)


def smooth(points: list[Point], most: int = 120) -> list[Point]:
    """The mean of neighbouring points, `most` in all."""
    group = max(1, math.ceil(len(points) / most))
    chunks = [points[i : i + group] for i in range(0, len(points), group)]
    return [(chunk[-1][0], sum(value for _, value in chunk) / len(chunk)) for chunk in chunks]


def panel(draw: ImageDraw.ImageDraw, title: str, lines: dict[str, list[Point]], top: int) -> None:
    """Axes with their extreme values, a line a figure and its name."""
    every = [point for points in lines.values() for point in points]
    last, low, high = max(x for x, _ in every), min(y for _, y in every), max(y for _, y in every)
    span = (high - low) or 1.0
    left, right, upper, lower = EDGE, WIDTH - EDGE, top + EDGE, top + HEIGHT - EDGE / 2

    def place(point: Point) -> Point:
        return left + point[0] / last * (right - left), lower - (point[1] - low) / span * (lower - upper)

    draw.text((left, top + 16), title, "black", font_size=24)
    draw.rectangle((left, upper, right, lower), outline="#bbbbbb")
    draw.text((left - 8, upper), f"{high:.3g}", "black", anchor="rt", font_size=20)
    draw.text((left - 8, lower), f"{low:.3g}", "black", anchor="rb", font_size=20)
    draw.text((right, lower + 8), f"step {last}", "black", anchor="rt", font_size=20)
    for i, ((figure, points), colour) in enumerate(zip(lines.items(), COLOURS, strict=False)):
        draw.line([place(point) for point in points], colour, width=3, joint="curve")
        if len(lines) > 1:
            draw.text((left + i * 200, top + 56), figure.removeprefix("val_"), colour, font_size=20)


if __name__ == "__main__":
    main(*sys.argv[1:])

"""Draw the curves of training logs as SVG, and keep a thinned copy of each log: `python bench/curves.py runs/NAME... docs/training`."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

WIDTH, HEIGHT, EDGE = 640, 220, 48
COLOURS = ("#1f77b4", "#d62728", "#2ca02c", "#9467bd", "#ff7f0e")
PANELS = {  # title -> figures drawn together
    "loss": ("loss",),
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
        (folder / f"{run.name}.svg").write_text(drawing(run.name, rows))


def drawing(name: str, rows: list[dict[str, float]]) -> str:
    """One panel above another for every figure that the log has."""
    panels = []
    for title, figures in PANELS.items():
        lines = {figure: [(row["step"], row[figure]) for row in rows if figure in row] for figure in figures}
        if any(lines.values()):
            panels.append(panel(f"{name}: {title}", {figure: smooth(points) for figure, points in lines.items() if points}, len(panels)))
    size = f'width="{WIDTH}" height="{HEIGHT * len(panels)}" viewBox="0 0 {WIDTH} {HEIGHT * len(panels)}"'
    return f'<svg xmlns="http://www.w3.org/2000/svg" {size} font-family="sans-serif" font-size="11">\n' + "\n".join(panels) + "\n</svg>\n"


def smooth(points: list[Point], most: int = 120) -> list[Point]:
    """The mean of neighbouring points, `most` in all."""
    group = math.ceil(len(points) / most)
    chunks = [points[i : i + group] for i in range(0, len(points), group)]
    return [(chunk[-1][0], sum(value for _, value in chunk) / len(chunk)) for chunk in chunks]


def panel(title: str, lines: dict[str, list[Point]], row: int) -> str:
    """Axes with their extreme values, a line a figure and its name."""
    every = [point for points in lines.values() for point in points]
    last, low, high = max(x for x, _ in every), min(y for _, y in every), max(y for _, y in every)
    span, top = (high - low) or 1.0, row * HEIGHT

    def place(point: Point) -> str:
        x = EDGE + point[0] / last * (WIDTH - 2 * EDGE)
        return f"{x:.1f},{top + HEIGHT - EDGE - (point[1] - low) / span * (HEIGHT - 2 * EDGE):.1f}"

    parts = [f'<rect x="0" y="{top}" width="{WIDTH}" height="{HEIGHT}" fill="white"/>']
    parts.append(f'<text x="{EDGE}" y="{top + 20}" font-size="13">{title}</text>')
    box = f'x="{EDGE}" y="{top + EDGE}" width="{WIDTH - 2 * EDGE}" height="{HEIGHT - 2 * EDGE}"'
    parts.append(f'<rect {box} fill="none" stroke="#bbb"/>')
    parts.append(f'<text x="{EDGE - 4}" y="{top + EDGE + 8}" text-anchor="end">{high:.3g}</text>')
    parts.append(f'<text x="{EDGE - 4}" y="{top + HEIGHT - EDGE}" text-anchor="end">{low:.3g}</text>')
    parts.append(f'<text x="{WIDTH - EDGE}" y="{top + HEIGHT - EDGE + 16}" text-anchor="end">step {last}</text>')
    for i, ((figure, points), colour) in enumerate(zip(lines.items(), COLOURS, strict=False)):
        parts.append(f'<polyline points="{" ".join(map(place, points))}" fill="none" stroke="{colour}" stroke-width="1.5"/>')
        if len(lines) > 1:
            parts.append(f'<text x="{EDGE + i * 110}" y="{top + 40}" fill="{colour}">{figure.removeprefix("val_")}</text>')
    return "\n".join(parts)


if __name__ == "__main__":
    main(*sys.argv[1:])

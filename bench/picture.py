"""The picture of the README: `python bench/picture.py docs/images/demo.png` generates four clips and lays out a few of their frames."""

from __future__ import annotations

import sys

import torch
from wan_dit import Pipeline
from wan_dit.media import contact_sheet

PROMPTS = (
    "a red circle moves left",
    "Blue star moving up on a black background.",
    "a square in green that goes right, on white",
    "the purple triangle moves down with a black background",
)
FRAMES = 8


def main(path: str) -> None:
    pipe = Pipeline("tiny")
    rows = [pipe(prompt, seed=1).video for prompt in PROMPTS]
    picked = [video[:, :, torch.linspace(0, video.shape[2] - 1, FRAMES).round().long()] for video in rows]
    contact_sheet(torch.cat(picked, dim=2), path, columns=FRAMES, most=len(rows) * FRAMES)


if __name__ == "__main__":
    main(sys.argv[1])

"""Read the documentation's code blocks, and run its commands in this process."""

from __future__ import annotations

import importlib
import re
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from wan_vae.video import VideoWriter

ROOT = Path(__file__).parents[1]
COMMANDS = {name: f"{name.replace('-', '_')}.cli" for name in ("wan-vae", "wan-text", "wan-dit", "wan-train")}
_PARTS = re.compile(r'^(?:#{2,6} (?P<heading>[^\n]+)|```(?P<language>\w+)(?: title="(?P<title>[^"]+)")?\n(?P<text>.*?)^```)$', re.M | re.S)


@dataclass(frozen=True)
class Block:
    """A fenced block: under which heading it stands, its language, the file that it is (empty: none) and its text."""

    section: str
    language: str
    title: str
    text: str


def blocks(page: Path) -> list[Block]:
    """The fenced blocks of a page, in their order."""
    found, section = [], ""
    for part in _PARTS.finditer(page.read_text()):
        section = part["heading"] or section
        if part["language"]:
            found.append(Block(section, part["language"], part["title"] or "", part["text"]))
    return found


def shell_lines(block: Block) -> Iterator[list[str]]:
    """The single commands of a block, each in words; none where it is no shell."""
    if block.language in ("sh", "bash", "console"):
        for line in re.split(r"\n|&&", block.text.replace("\\\n", " ")):
            if words := shlex.split(line.removeprefix("$ "), comments=True):
                yield words


def run(words: Sequence[str]) -> int:
    """Run one of the four commands in this process; returns its exit code."""
    code: int = importlib.import_module(COMMANDS[words[0]]).main(words[1:])
    return code


def write_film(path: Path, frames: int = 17, size: tuple[int, int] = (64, 64)) -> Path:
    """Write a film of a grey ramp that moves; `size` is (height, width)."""
    with VideoWriter(path, fps=8, size=(size[1], size[0])) as writer:
        for shift in range(frames):
            row = np.roll(np.linspace(0, 255, size[1]).astype(np.uint8), 4 * shift)
            writer.write(np.ascontiguousarray(np.broadcast_to(row[None, :, None], (*size, 3))))
    return path

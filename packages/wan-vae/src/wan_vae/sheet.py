"""The contact sheet: originals, reconstructions and differences side by side, as pixels and as PNG."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Mapping, Sequence
from itertools import islice

import numpy as np

from .evaluation import Measured
from .glyphs import HEIGHT, WIDTH, write
from .thumbnails import AMPLIFY, Sample
from .video import Frame

CLIPS = 24  # on a sheet; the page has them all
SCALE = 2  # of the letters
LINE = HEIGHT * SCALE
GAP = 8
GUTTER = 15 * (WIDTH + 1) * SCALE  # "RECONSTRUCTION" and a space
PAPER, INK, DIM = (24, 24, 26), (236, 236, 236), (150, 150, 156)


def contact_sheet(clips: Mapping[str, Sequence[Measured]], *, captions: bool = True) -> Frame:
    """A block a clip: its frames, then for every codec the reconstruction and the amplified difference; uint8 `[H, W, 3]`."""
    blocks = [block for clip, found in islice(clips.items(), CLIPS) for block in _clip(clip if captions else "", found)]
    if len(clips) > CLIPS:
        blocks.append(_text_block(f"and {len(clips) - CLIPS} more: see index.html", INK))
    width = max(block.shape[1] for block in blocks) + GAP
    height = sum(block.shape[0] + GAP for block in blocks) + GAP
    sheet = _paper(height, width)
    top = GAP
    for block in blocks:
        sheet[top : top + block.shape[0], : block.shape[1]] = block
        top += block.shape[0] + GAP
    return sheet


def png(picture: Frame) -> bytes:
    """A uint8 picture `[H, W, 3]` as a PNG file."""
    height, width = picture.shape[:2]
    filtered = np.zeros((height, 1 + 3 * width), np.uint8)  # a filter type a row, 0 for none
    filtered[:, 1:] = picture.reshape(height, -1)
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)  # 8 bits, RGB, not interlaced
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(filtered.tobytes(), 9)), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data)) for name, data in chunks
    )


def _clip(clip: str, found: Sequence[Measured]) -> list[Frame]:
    pictures = [one.samples.pictures() for one in found]
    heads = [f"frame {sample.index}" for sample in pictures[0]]
    blocks = [_text_block(clip, INK)] if clip else []
    blocks += [_head(heads, pictures[0]), _row(["original"], [sample.original for sample in pictures[0]])]
    for one, samples in zip(found, pictures, strict=True):
        note = f"{one.values['psnr']:.2f} dB"
        blocks.append(_row(["reconstruction", one.codec, note], [sample.reconstruction for sample in samples]))
        blocks.append(_row([f"difference x{AMPLIFY}", one.codec], [sample.difference for sample in samples]))
    return blocks


def _row(labels: Sequence[str], pictures: Sequence[Frame]) -> Frame:
    """Labels in the gutter, pictures beside it."""
    height = max(pictures[0].shape[0], len(labels) * (LINE + GAP))
    row = _paper(height, GAP + GUTTER + sum(picture.shape[1] + GAP for picture in pictures))
    for index, label in enumerate(labels):
        _put(row, _shorten(label), index * (LINE + GAP), GAP, INK if index == 0 else DIM)
    left = GAP + GUTTER
    for picture in pictures:
        row[: picture.shape[0], left : left + picture.shape[1]] = picture
        left += picture.shape[1] + GAP
    return row


def _head(heads: Sequence[str], samples: Sequence[Sample]) -> Frame:
    lefts = np.cumsum([GAP + GUTTER, *(sample.original.shape[1] + GAP for sample in samples)])
    row = _paper(LINE, int(lefts[-1]))
    for head, left in zip(heads, lefts[:-1], strict=True):
        _put(row, head, 0, int(left), DIM)
    return row


def _text_block(words: str, colour: tuple[int, int, int]) -> Frame:
    block = _paper(LINE + GAP, GAP + len(words) * (WIDTH + 1) * SCALE)
    _put(block, words, GAP, GAP, colour)
    return block


def _put(picture: Frame, words: str, top: int, left: int, colour: tuple[int, int, int]) -> None:
    dots = write(words, SCALE)[: picture.shape[0] - top, : picture.shape[1] - left]
    picture[top : top + dots.shape[0], left : left + dots.shape[1]][dots] = colour


def _shorten(label: str) -> str:
    most = GUTTER // ((WIDTH + 1) * SCALE) - 1
    return label if len(label) <= most else ".." + label[-(most - 2) :]


def _paper(height: int, width: int) -> Frame:
    return np.full((height, width, 3), PAPER, np.uint8)

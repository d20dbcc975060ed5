"""Amounts of memory as people write and read them."""

from __future__ import annotations

import argparse
import re

UNITS = {"": 1, "K": 1000, "M": 1000**2, "G": 1000**3, "T": 1000**4, "KI": 1024, "MI": 1024**2, "GI": 1024**3, "TI": 1024**4}


def amount(text: str) -> int:
    """An argparse type: bytes, such as `8GB`, `8G` (both of 1000^3) or `500MiB`."""
    match = re.fullmatch(r"(\d{1,15}(?:\.\d{1,3})?) ?([KMGT]?I?)B?", text.upper(), re.ASCII)
    if not match or match[2] not in UNITS or not float(match[1]):
        raise argparse.ArgumentTypeError(f"'{text}' is not an amount of memory such as 8GB or 500MiB")
    return int(float(match[1]) * UNITS[match[2]])


def in_words(size: int) -> str:
    """Bytes as people read them."""
    return "any amount" if size >= 1 << 60 else f"{size / 1e9:.2f} GB" if size >= 1e9 else f"{size / 1e6:.0f} MB"

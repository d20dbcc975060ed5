"""Procedural pictures with the statistics of natural ones: dead leaves, fractal noise, and both at once. Imports no torch.

Occlusion of objects of all sizes gives photographs their edges and their 1/f spectrum: Ruderman, "Origins of scaling in natural
images" (1997); Lee, Mumford and Huang, "Occlusion models for natural images" (2001); sizes fall with the third power.
"""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

Picture = NDArray[np.float32]

_LUMA = np.array([0.299, 0.587, 0.114], dtype=np.float32)


def palette(rng: np.random.Generator, count: int) -> Picture:
    """`[count, 3]` colours in [0, 1] of one scene: brightness over the whole range, hues around a few, mostly pale."""
    hues = rng.uniform(0, 2 * math.pi, 3)
    hue = rng.choice(hues, count) + rng.normal(0, 0.3, count)
    chroma = rng.beta(1.2, 3.0) * rng.beta(1.5, 1.5, count) * 1.2
    luma = rng.beta(0.9, 0.9, count) * rng.uniform(0.5, 1.0) + rng.uniform(0, 0.3)
    angles = hue[:, None] + np.array([0, 2 * math.pi / 3, 4 * math.pi / 3])
    return np.clip(luma[:, None] + chroma[:, None] * np.cos(angles), 0, 1).astype(np.float32)


def fractal(rng: np.random.Generator, size: int, exponent: float, channels: int = 1) -> Picture:
    """`[size, size, channels]` noise of unit deviation whose amplitude falls as frequency to the `exponent`; it wraps around."""
    phases = rng.normal(size=(channels, size, size // 2 + 1, 2)).astype(np.float32)
    spectrum = (phases[..., 0] + 1j * phases[..., 1]) * _radii(size)[None] ** -exponent
    spectrum[:, 0, 0] = 0
    noise = np.fft.irfft2(spectrum, s=(size, size), axes=(1, 2)).astype(np.float32)
    noise /= noise.std(axis=(1, 2), keepdims=True) + 1e-6
    return np.ascontiguousarray(noise.transpose(1, 2, 0))


@lru_cache(maxsize=8)
def _radii(size: int) -> Picture:
    rows, columns = np.fft.fftfreq(size) * size, np.fft.rfftfreq(size) * size
    return np.maximum(np.hypot(rows[:, None], columns[None]), 1).astype(np.float32)


def clouds(rng: np.random.Generator, size: int) -> Picture:
    """Fractal noise in colour, `[size, size, 3]` in [0, 1]: one field for brightness and two weaker ones for colour."""
    fields = fractal(rng, size, rng.uniform(0.9, 1.9), 3)
    first, second, third = palette(rng, 3)
    contrast = rng.uniform(0.05, 0.3)
    tints = fields[..., 1:2] * (second - second @ _LUMA) + fields[..., 2:] * (third - third @ _LUMA)  # of no brightness
    picture = first + contrast * fields[..., :1] + rng.uniform(0, 0.12) * tints
    return np.clip(picture, 0, 1)


def dead_leaves(rng: np.random.Generator, size: int) -> Picture:
    """Opaque leaves that cover each other, `[size, size, 3]` in [0, 1], shaded and textured, the smallest drawn last."""
    smallest, largest = rng.uniform(1.0, 3.0), size * rng.uniform(0.15, 0.45)
    count = int(rng.integers(40, 260))
    share = rng.uniform(size=count)
    radii = np.sort(1 / np.sqrt(share / smallest**2 + (1 - share) / largest**2))[::-1]
    places = rng.uniform(-0.1, 1.1, (count, 2)) * size
    colours, grain = palette(rng, count), fractal(rng, size, rng.uniform(0.6, 1.6))
    picture = np.broadcast_to(palette(rng, 1)[0], (size, size, 3)).copy()
    rough = rng.beta(1.0, 3.0, count) * 0.25
    for radius, place, colour, amount in zip(radii, places, colours, rough, strict=True):
        _leaf(rng, picture, float(radius), place, colour, float(amount), grain)
    return picture


def _leaf(
    rng: np.random.Generator, picture: Picture, radius: float, place: NDArray[np.float64], colour: Picture, rough: float, grain: Picture
) -> None:
    """Paint one: an ellipse, a box, a bar or a polygon, with a soft edge."""
    size, reach = len(picture), radius * 1.5
    top, left = (max(0, int(edge - reach)) for edge in place)
    bottom, right = (min(size, int(edge + reach) + 2) for edge in place)
    if bottom <= top or right <= left:
        return
    turn, stretch = rng.uniform(0, 2 * math.pi), rng.uniform(0.25, 1.0)
    y, x = np.arange(top, bottom)[:, None] - place[0], np.arange(left, right)[None] - place[1]
    along, across = x * math.cos(turn) + y * math.sin(turn), (y * math.cos(turn) - x * math.sin(turn)) / stretch
    kind = rng.integers(4)
    if kind == 0:
        inside = radius - np.hypot(along, across)
    elif kind == 1:
        inside = radius * 0.85 - np.maximum(np.abs(along), np.abs(across))
    elif kind == 2:
        inside = np.minimum(1.4 * radius - np.abs(along), max(0.5, radius * 0.08) - np.abs(across * stretch))
    else:
        corners, angle = rng.integers(3, 8), np.arctan2(across, along)
        fold = (angle + math.pi / corners) % (2 * math.pi / corners) - math.pi / corners
        inside = radius * 0.8 - np.hypot(along, across) * np.cos(fold)
    alpha = np.clip(inside * rng.uniform(0.4, 1.0) + 0.5, 0, 1).astype(np.float32)[..., None]
    shade = 1 + rng.normal(0, 0.18) * (along / radius)[..., None] + rough * grain[top:bottom, left:right]
    picture[top:bottom, left:right] += alpha * (np.clip(colour * shade, 0, 1) - picture[top:bottom, left:right])


def blurred(picture: Picture, sigma: float) -> Picture:
    """A picture out of focus by a Gaussian of `sigma` pixels; it wraps around."""
    size = len(picture)
    fall = np.exp(-2 * (math.pi * sigma / size * _radii(size)) ** 2).astype(np.float32)
    spectrum = np.fft.rfft2(picture, axes=(0, 1)) * fall[..., None]
    return np.fft.irfft2(spectrum, s=(size, size), axes=(0, 1)).astype(np.float32)


def still(rng: np.random.Generator, size: int) -> Picture:
    """One of them, `[size, size, 3]` in [0, 1]: most are leaves, some of these with clouds over them or out of focus in part."""
    kind = rng.choice(["leaves", "clouds", "veiled", "near and far", "flat"], p=[0.45, 0.15, 0.15, 0.2, 0.05])
    if kind == "leaves":
        picture = dead_leaves(rng, size)
    elif kind == "clouds":
        picture = clouds(rng, size)
    elif kind == "veiled":
        picture = np.clip(dead_leaves(rng, size) + rng.uniform(0.02, 0.12) * fractal(rng, size, rng.uniform(0.4, 1.4)), 0, 1)
    elif kind == "near and far":
        picture, mask = dead_leaves(rng, size), np.clip(3 * fractal(rng, size, 2.5) + 0.5, 0, 1)
        picture = mask * picture + (1 - mask) * blurred(picture, rng.uniform(1, 6))
    else:
        ramp = np.linspace(-0.5, 0.5, size, dtype=np.float32)
        slope = rng.normal(0, 0.4, (2, 3)).astype(np.float32)
        picture = np.clip(palette(rng, 1)[0] + ramp[:, None, None] * slope[0] + ramp[None, :, None] * slope[1], 0, 1)
    return np.clip(blurred(picture, rng.uniform(0.3, 1.2)) if rng.random() < 0.4 else picture, 0, 1)

"""How a picture of some size is best passed through a VAE within some memory: whole, in exact tiles, or in blended tiles.

Streams take the same memory however long the film is, so its length counts only where it is a single frame.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from typing import Any, Literal

import torch
from torch import Tensor

from .config import VAEConfig
from .footprint import Footprint, count, footprint
from .model import WanVAE
from .parking import IN_MEMORY
from .plugins import VAESpec
from .setting import Setting, config_of, free_budget
from .stream import StreamState
from .tiles import Half, Span, kept_apart, overlapping, reach
from .traced import streamed

Mode = Literal["whole", "exact", "blend"]
COSTLY = 3.0  # from this share of recomputed pixels on, blended tiles are taken where exact ones cost more
LEAST = 4  # cells a side of the smallest tile
NARROWEST = 128  # pixels a side of the smallest blended tile
PROBE = (16, 16)  # cells of the tile from which larger and smaller ones are estimated: memory grows with the area


@dataclass(frozen=True)
class Plan:
    """How to run one half of a VAE.

    tile, overlap: pixels (height, width), as `TiledVAE` takes them
    overhead: pixels computed more than once, as a share of the picture
    memory: bytes at the peak, above what Python and torch take, with what is kept while the film stands still
    budget: bytes that were to be kept to; `fits` says whether they are
    """

    half: Half
    mode: Mode
    tile: tuple[int, int]
    overlap: int
    tiles: int
    overhead: float
    memory: int
    budget: int
    parts: Footprint

    @property
    def fits(self) -> bool:
        return self.memory <= self.budget

    @property
    def note(self) -> str:
        """What the plan means, in words."""
        if not self.fits:
            return "does not fit: the least that was found"
        return {"whole": "exact", "exact": "exact", "blend": "approximate: each tile sees itself alone"}[self.mode]


def make_plan(setting: Setting, mode: Mode | None = None) -> Plan:
    """Whole where that fits; else the largest exact tiles that fit; blended ones where those would recompute `COSTLY` and more.

    mode: consider this one alone. Where nothing fits, the plan with the least memory. VAEs other than Wan's have no exact tiles.
    """
    if mode == "exact" and not setting.is_wan:
        raise ValueError("exact tiles take a Wan VAE: use the mode 'blend'")
    if min(setting.size) < 1:
        raise ValueError(f"a picture of {setting.size[0]}x{setting.size[1]} pixels has no content")
    setting = replace(setting, memory=free_budget(setting.device) if setting.memory is None else setting.memory)
    plans = []
    if mode in (None, "whole"):
        plans.append(_whole(setting))
    if mode in (None, "exact") and setting.is_wan and not (plans and plans[0].fits):
        plans += _until_it_fits(_exact(setting, tile) for tile in _smaller(setting.cells, LEAST))
    fitting = [plan for plan in plans if plan.fits]
    if mode == "blend" or (mode is None and not (fitting and fitting[0].overhead < COSTLY)):
        plans += _until_it_fits(
            _blend(setting, tile) for tile in _smaller(setting.cells, max(LEAST, NARROWEST // setting.config.stride[1]))
        )
    fitting = [plan for plan in plans if plan.fits]
    if fitting:
        return min(fitting, key=lambda plan: plan.overhead)
    return min(plans or [_whole(setting)], key=lambda plan: plan.memory)


def decoding(spec: VAESpec, *, size: tuple[int, int], frames: int, dtype: str, device: str) -> dict[str, int]:
    """What `decode` takes for a video of `size` (width, height): the `footprint` of this package's specs."""
    kind = getattr(torch, dtype)
    setting = Setting(config_of(spec), "decoder", (size[1], size[0]), kind, torch.device(device), frames=frames, memory=1 << 62)
    plan = make_plan(setting, "whole")
    video = 3 * frames * size[0] * size[1] * kind.itemsize
    return {"weights": plan.parts.weights, "work": plan.memory - plan.parts.weights + 2 * video}  # in chunks, and joined


def _until_it_fits(plans: Iterable[Plan]) -> list[Plan]:
    """The plans up to the first that fits."""
    seen = []
    for plan in plans:
        seen.append(plan)
        if plan.fits:
            break
    return seen


def _smaller(cells: tuple[int, int], least: int) -> Iterator[tuple[int, int]]:
    """Ever smaller tiles: the longer side in one part more, as long as the parts are not too small."""
    parts = [1, 1]
    while True:
        axis = 0 if cells[0] / parts[0] > cells[1] / parts[1] else 1
        parts[axis] += 1
        tile = -(-cells[0] // parts[0]), -(-cells[1] // parts[1])
        if parts[axis] > cells[axis] or tile[axis] < least:
            return
        yield tile


def _whole(setting: Setting) -> Plan:
    parts = _footprint(setting, setting.cells)
    return _plan(setting, "whole", setting.cells, 1, 0.0, parts, still=True)


def _exact(setting: Setting, tile: tuple[int, int]) -> Plan:
    """Tiles with their surroundings through the convolutions; the deepest part whole, and its result kept for all tiles."""
    config, half, cells = setting.config, setting.half, setting.cells
    rows, columns = (kept_apart(size, side, *reach(config, half)) for size, side in zip(cells, tile, strict=True))
    largest, area = _largest(rows) * _largest(columns), sum(map(_read, rows)) * sum(map(_read, columns))
    trunk = _scaled(_counted(replace(setting, size=(0, 0), memory=0), "trunk"), largest)
    parts = _together(setting, trunk, _counted(replace(setting, memory=0), "bottom"), area / largest)
    return _plan(setting, "exact", tile, len(rows) * len(columns), area / (cells[0] * cells[1]) - 1, parts)


def _together(setting: Setting, trunk: Footprint, deep: Footprint, tiles: float) -> Footprint:
    """What a tile at work takes beside the deepest part, the picture in and out, and what others leave in memory."""
    time, height, width = setting.config.stride
    frames, pixels = setting.chunks[-1], setting.cells[0] * setting.cells[1]
    features = frames * pixels * _width(setting.config, setting.half)
    picture = 3 * pixels * height * width * (1 + (frames - 1) * time if len(setting.chunks) == 1 else frames * time)
    return Footprint(
        trunk.weights,
        max(trunk.filters, deep.filters) if trunk.filters + deep.filters > 1_000_000_000 else trunk.filters + deep.filters,
        _in_memory(setting, trunk.history, tiles) + deep.history,
        max(trunk.work, deep.work) + setting.dtype.itemsize * (features + picture),
        0,
    )


def _blend(setting: Setting, tile: tuple[int, int]) -> Plan:
    """The whole VAE for each tile."""
    overlap = max(1, min(tile) // 4)
    rows, columns = (overlapping(size, side + overlap, overlap) for size, side in zip(setting.cells, tile, strict=True))
    sides = (_largest(rows), _largest(columns))
    single, count_ = _scaled(_counted(replace(setting, size=(0, 0), memory=0), "all"), sides[0] * sides[1]), len(rows) * len(columns)
    pixels = setting.cells[0] * setting.cells[1]
    _, height, width = setting.config.stride
    picture = 2 * 3 * pixels * height * width * setting.chunks[-1] * setting.config.stride[0] * 4
    parts = Footprint(single.weights, single.filters, _in_memory(setting, single.history, count_), single.work + picture, 0)
    return _plan(setting, "blend", sides, count_, count_ * sides[0] * sides[1] / pixels - 1, parts, overlap=overlap)


def _in_memory(setting: Setting, history: int, tiles: float) -> int:
    """Histories in the memory that counts, of so many tiles: those not at work are on disk, or for CUDA with the host."""
    everywhere = round(history * tiles)
    return history if setting.device.type == "cuda" or (setting.device.type == "cpu" and everywhere > IN_MEMORY) else everywhere


def _plan(
    setting: Setting,
    mode: Mode,
    tile: tuple[int, int],
    tiles: int,
    overhead: float,
    parts: Footprint,
    *,
    still: bool = False,
    overlap: int = 0,
) -> Plan:
    _, height, width = setting.config.stride
    memory = parts.predicted(setting.costs["cpu"], still and setting.frames != 1, parked=mode == "exact")
    assert setting.memory is not None
    pixels = tile[0] * height, tile[1] * width
    return Plan(setting.half, mode, pixels, overlap * height, tiles, overhead, memory, setting.memory, parts)


def _footprint(setting: Setting, cells: tuple[int, int]) -> Footprint:
    if not setting.is_wan:
        cpu = setting.device.type != "cuda"
        return streamed(setting.config, setting.half, cells, chunks=setting.chunks, dtype=setting.dtype, cpu=cpu)
    return footprint(setting.config, setting.half, cells, chunks=setting.chunks, **setting.costs)


def _read(span: Span) -> int:
    return span.high - span.low


def _largest(spans: list[Span]) -> int:
    return max(map(_read, spans))


def _width(config: VAEConfig, half: Half) -> int:
    """Channels between the deepest part and the rest."""
    return (config.base_dim if half == "encoder" else config.decoder_base_dim) * config.dim_mult[-1]


def _trunk_shapes(setting: Setting, cells: tuple[int, int]) -> list[tuple[int, ...]]:
    config = setting.config
    if setting.half == "decoder":
        return [(1, _width(config, "decoder"), frames, *cells) for frames in setting.chunks]
    p, (time, height, width) = config.patch_size, config.stride
    sides = cells[0] * height // p, cells[1] * width // p
    return [(1, 3 * p**2, 1 if i == 0 else frames * time, *sides) for i, frames in enumerate(setting.chunks)]


def _bottom_shapes(setting: Setting) -> list[tuple[int, ...]]:
    channels = setting.config.z_dim if setting.half == "decoder" else _width(setting.config, "encoder")
    return [(1, channels, frames, *setting.cells) for frames in setting.chunks]


@lru_cache(maxsize=32)
def _counted(setting: Setting, part: str) -> Footprint:
    """Of "bottom" on the whole grid; of "trunk" and "all" on the grid of `PROBE`."""
    if part == "all":
        return _footprint(setting, PROBE)
    shapes = _bottom_shapes(setting) if part == "bottom" else _trunk_shapes(setting, PROBE)
    return count(setting.config, partial(_run, setting.half, part), shapes, **setting.costs)


def _scaled(probe: Footprint, cells: int) -> Footprint:
    """The same for a tile of so many cells."""
    factor = cells / (PROBE[0] * PROBE[1])
    return replace(probe, history=round(factor * probe.history), work=round(factor * probe.work))


def _run(half: Half, part: str, vae: WanVAE, x: Tensor, state: StreamState) -> Any:
    return getattr(getattr(vae, half), part)(x, state)

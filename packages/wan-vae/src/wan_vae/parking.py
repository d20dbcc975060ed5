"""Where the histories of tiles wait that are not at work: in memory while they are few, else in a scratch file."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

IN_MEMORY = 64_000_000  # bytes of all tiles together up to which no file is made: less than what torch itself takes
ON_DISK = Path("/var/tmp")  # where it exists: /tmp is often kept in memory


@dataclass(frozen=True)
class Place:
    """Where a tensor lies in the file, in bytes, and how its numbers are ordered there."""

    offset: int
    size: int
    shape: tuple[int, ...]
    dtype: torch.dtype
    channels_last: bool


class Parking:
    """Keeps one history for each of several tiles, on a CPU.

    The scratch file has no name, so that nothing is left of it however the process ends; it lies in `TMPDIR`, else in /var/tmp,
    else where temporary files are put. A tile's room in it is used again for each chunk.

    tiles: how many there will be
    """

    def __init__(self, tiles: int) -> None:
        self.tiles = tiles
        self._kept: dict[Hashable, dict[str, Tensor]] = {}
        self._places: dict[tuple[Hashable, str], Place] = {}
        self._file: Any = None  # a raw file
        self._end = 0

    def store(self, tile: Hashable, history: Mapping[str, Tensor]) -> None:
        """Keep the history of a tile until it is fetched. OSError where the scratch disk is full."""
        if self._file is None and sum(value.nbytes for value in history.values()) * self.tiles <= IN_MEMORY:
            self._kept[tile] = dict(history)
            return
        for slot, value in history.items():
            self._write(tile, slot, value)

    def fetch(self, tile: Hashable) -> dict[str, Tensor]:
        """The history of a tile, no longer kept; empty where there is none."""
        if tile in self._kept:
            return self._kept.pop(tile)
        return {slot: self._read(place) for (owner, slot), place in self._places.items() if owner == tile}

    def _write(self, tile: Hashable, slot: str, value: Tensor) -> None:
        spread = value.permute(0, 2, 3, 4, 1)
        channels_last = spread.is_contiguous() and not value.is_contiguous()
        data = (spread if channels_last else value.contiguous()).view(-1).view(torch.uint8).numpy().data
        old = self._places.get((tile, slot))
        offset = self._end if old is None or old.size != len(data) else old.offset
        self._places[tile, slot] = Place(offset, len(data), tuple(value.shape), value.dtype, channels_last)
        self._end = max(self._end, offset + len(data))
        folder = _folder()
        try:
            self._file = self._file or tempfile.TemporaryFile(dir=folder, buffering=0)  # noqa: SIM115 (it lives as long as this object)
            self._file.seek(offset)
            while data:
                data = data[self._file.write(data) :]
        except OSError as error:
            raise OSError(
                error.errno,
                f"no room for the histories of {self.tiles} tiles in '{folder}': {error.strerror}; set TMPDIR to another folder",
            ) from error

    def _read(self, place: Place) -> Tensor:
        value = torch.empty(place.shape, dtype=place.dtype)
        if place.channels_last:
            value = value.contiguous(memory_format=torch.channels_last_3d)
        flat = value.permute(0, 2, 3, 4, 1) if place.channels_last else value
        room = flat.view(-1).view(torch.uint8).numpy().data
        self._file.seek(place.offset)
        while room:
            read = self._file.readinto(room)
            if not read:
                raise OSError(f"the scratch file in '{_folder()}' is shorter than what was written to it")
            room = room[read:]
        return value


def _folder() -> str:
    """Where the scratch file lies."""
    on_disk = not os.environ.get("TMPDIR") and ON_DISK.is_dir() and os.access(ON_DISK, os.W_OK)
    return str(ON_DISK) if on_disk else tempfile.gettempdir()

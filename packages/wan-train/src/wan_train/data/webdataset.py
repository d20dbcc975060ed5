"""The data set `webdataset`: that of a folder, whose films and pictures are read from within uncompressed tars."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

from .folder import Folder, FolderSettings
from .scan import Contents
from .tars import tar_contents


class WebDatasetSettings(FolderSettings):
    """Those of `FolderSettings`; path: a folder of tars, one tar, or a pattern such as `shards/shard-{000000..000099}.tar`."""

    def _contents(self, source: Path) -> Contents:
        return tar_contents(source)


class WebDataset(Folder):
    """Clips of WebDataset's shards by random access; settings are those of `WebDatasetSettings`, errors those of `Folder`.

    Members of a sample share a key, their path up to the first dot of the file's name: `KEY.mp4` or `KEY.jpg`, and captions in
    `KEY.txt`, one a line, or in `KEY.json` under `caption`, `text`, ...: a text or a list.

    Example: `WebDataset("shards/shard-{000000..000099}.tar", fps=16, frames=81)`. A sample is known by the bytes of its member, so
    that a cache made of the unpacked files holds for the tars too.
    """

    name: ClassVar[str] = "webdataset"
    settings_type: ClassVar[type[FolderSettings]] = WebDatasetSettings

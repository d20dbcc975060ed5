"""What a run returns: the video, its record, and how to save them."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from . import manifest, outputs

Timings = dict[str, float]


@dataclass(frozen=True, eq=False)
class Result:
    """A generated video.

    video: `[1, 3, T, H, W]` float32 in [-1, 1] on the CPU
    timings: seconds for load, text, denoise and decode
    manifest: the fields of `wan_dit.manifest.Manifest`
    """

    video: Tensor = field(repr=False)
    fps: int
    seed: int
    timings: Timings
    manifest: dict[str, Any] = field(repr=False)

    def save(self, path: str | os.PathLike[str], *, overwrite: bool = False) -> list[Path]:
        """Write a video, and beside it a contact sheet (.png) and the run manifest (.json), all or none; returns their paths.

        path: FILE.mp4, FILE.gif, FOLDER/%04d.png for numbered frames, or FILE.png for a single one, which needs no contact sheet
        Raises OSError where one of them exists and `overwrite` is not set, ValueError for another name.
        """
        from . import media

        began = time.perf_counter()
        files = outputs.check(path, overwrite=overwrite)
        with outputs.writing(path, overwrite=overwrite) as (video, *sheets, record):
            media.write(self.video, video, self.fps)
            for sheet in sheets:
                media.contact_sheet(self.video, sheet)
            self.timings["write"] = time.perf_counter() - began
            made = manifest.Manifest(**{**self.manifest, "timings": self.timings})
            record.write_text(made.model_dump_json(indent=2) + "\n")
        return list(files)

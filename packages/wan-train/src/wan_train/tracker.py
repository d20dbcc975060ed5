"""What a run leaves to look at: log.jsonl, TensorBoard events and PNG grids of sample clips."""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from einops import rearrange
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter
from wan_dit._shared.files import replacing
from wan_dit.media import contact_sheet


class Tracker:
    """Writes the figures of a run; on a resume the lines after the resumed step are dropped first."""

    def __init__(self, folder: Path, config: dict[str, Any], step: int) -> None:
        self.folder = folder
        self.log_path = folder / "log.jsonl"
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        kept = _lines_until(self.log_path, step) if step and self.log_path.exists() else []
        with replacing(self.log_path) as scratch:
            scratch.write_text("".join(f"{line}\n" for line in kept))
        self.file = self.log_path.open("a")
        self.board = SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1)  # the first step whose points are dropped

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.file.close()
        self.board.close()

    def log(self, step: int, figures: dict[str, float]) -> None:
        """One line in log.jsonl and one point a figure in TensorBoard."""
        self.file.write(json.dumps({"step": step, **{name: round(value, 6) for name, value in figures.items()}}) + "\n")
        self.file.flush()
        for name, value in figures.items():
            self.board.add_scalar(name, value, step)

    def grid(self, step: int, clips: Tensor, columns: int = 6) -> None:
        """`previews/<step>.png`: one row a clip `[N, 3, T, H, W]`, `columns` frames spread over its length."""
        picked = clips[:, :, torch.linspace(0, clips.shape[2] - 1, columns).round().long()]
        (self.folder / "previews").mkdir(exist_ok=True)
        contact_sheet(
            rearrange(picked, "n c t h w -> 1 c (n t) h w"),
            self.folder / "previews" / f"{step:06d}.png",
            columns=columns,
            most=clips.shape[0] * columns,
        )


class Silent(Tracker):
    """Of all processes but the first: writes nothing."""

    def __init__(self, folder: Path, config: dict[str, Any], step: int) -> None:
        pass

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        pass

    def log(self, step: int, figures: dict[str, float]) -> None:
        pass

    def grid(self, step: int, clips: Tensor, columns: int = 6) -> None:
        pass


def _lines_until(path: Path, step: int) -> list[str]:
    """The lines of a log up to `step`; one that a kill cut short is left out."""
    kept = []
    for line in path.read_text().splitlines():
        with suppress(json.JSONDecodeError):
            if json.loads(line)["step"] <= step:
                kept.append(line)
    return kept

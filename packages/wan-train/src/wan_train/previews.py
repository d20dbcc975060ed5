"""Previews by all processes of a run: each makes a share of the clips, and the first one measures and shows them.

They meet twice: to hand over the clips, and to learn what came of them. One that fails brings its error instead of its clips, so
nobody waits for it, and all end alike. They meet in the group of `Ranks`, since a GPU's group loses patience with a slow process.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor

from .store.ranks import Ranks

T = TypeVar("T")
Figures = dict[str, float]


def previewed(count: int, make: Callable[[range], Tensor], show: Callable[[Tensor], Figures], ranks: Ranks) -> Figures:
    """What `show` returns, on every process. Collective.

    make: the clips `[n, 3, T, H, W]` of some of the indices below `count`; not called where there are fewer clips than processes
    show: called on the first process, with the clips of all indices in order
    Where one of them fails, all processes raise the same error of one line: ValueError where it was that or an OSError, else
    RuntimeError. One process alone raises what it was.
    """
    if ranks.size == 1:
        return show(make(range(count)))
    own = range(count * ranks.rank // ranks.size, count * (ranks.rank + 1) // ranks.size)
    made = _tried(lambda: make(own).cpu() if own else None, ranks)
    try:
        told = ranks.first(_outcome(ranks.to_first(made), show, ranks))
    except RuntimeError as error:  # of the group
        raise RuntimeError("another process of the run ended, or took too long over its share of a preview") from error
    if isinstance(told, Exception):
        raise told from told.__cause__ or (made.__cause__ if isinstance(made, Exception) else None)
    return told


def _outcome(parts: list[Tensor | Exception | None] | None, show: Callable[[Tensor], Figures], ranks: Ranks) -> Figures | Exception:
    """What becomes of the parts of all processes, on the first one, which alone has them."""
    if parts is None:
        return {}
    if failed := [part for part in parts if isinstance(part, Exception)]:
        return failed[0]
    clips = [part for part in parts if isinstance(part, Tensor)]
    return _tried(lambda: show(torch.cat(clips)), ranks)


def _tried(task: Callable[[], T], ranks: Ranks) -> T | Exception:
    """What the task returns, or its error as all processes raise it; its cause stays on this one."""
    try:
        return task()
    except Exception as error:
        lines = str(error).strip().splitlines()
        kind = ValueError if isinstance(error, ValueError | OSError) else RuntimeError
        told = kind(f"the preview failed on process {ranks.rank}: {type(error).__name__}" + (f": {lines[0]}" if lines else ""))
        told.__cause__ = error
        return told

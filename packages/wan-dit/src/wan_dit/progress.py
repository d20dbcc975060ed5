"""What a person sees of a run on stderr: a progress bar on a terminal, one plain line a phase anywhere else."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from .events import Decoding, Done, Encoding, Event, Loading, Preparing, Step

if TYPE_CHECKING:
    from tqdm import tqdm


@contextmanager
def progress() -> Iterator[Callable[[Event], None]]:
    """A function to hand the events of one run to; nothing is shown before the first."""
    if not sys.stderr.isatty():
        yield _lines()
        return
    bars: list[tqdm[Any]] = []
    try:
        yield lambda event: _move(bars, event)
    finally:
        for bar in bars:
            bar.close()


def _lines() -> Callable[[Event], None]:
    said = ""

    def follow(event: Event) -> None:
        nonlocal said
        if not isinstance(event, Done) and (phase := _phase(event)) != said:
            said = phase
            print(f"wan-dit: {phase}", file=sys.stderr, flush=True)

    return follow


def _move(bars: list[tqdm[Any]], event: Event) -> None:
    from tqdm import tqdm

    if not bars:
        bars.append(tqdm(bar_format="{desc:<32}{bar:24} {n_fmt}/{total_fmt} {elapsed}", file=sys.stderr))
    bar = bars[0]
    bar.set_description_str(_phase(event), refresh=not isinstance(event, Step))
    if isinstance(event, Step):
        bar.total = event.n
        bar.update(event.i - bar.n)


def _phase(event: Event) -> str:
    match event:
        case Loading(part, name):
            return f"loading {part.replace('_', ' ')} {name}"
        case Encoding():
            return "encoding"
        case Preparing():
            return "encoding images and videos"
        case Step():
            return "denoising"
        case Decoding():
            return "decoding"
        case Done():
            return "done"

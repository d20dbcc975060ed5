"""The state of a stream: what every layer remembers from chunk to chunk.

Shapes: B batch, C channels, T frames, H height, W width.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .convolution import Convolution


class Shard(Protocol):
    """The rows of a picture that this process holds, and the way to the others' (see `sharding.py`)."""

    def extend(self, x_BCTHW: Tensor, above: int, below: int) -> Tensor:
        """`x` with so many rows of the neighbours above and below; zeros at the edges of the picture."""

    def gather(self, x_BCTHW: Tensor) -> Tensor:
        """The whole picture."""

    def own(self, x_BCTHW: Tensor) -> Tensor:
        """The rows of this process out of the whole picture."""


@dataclass
class Trace:
    """What a block did with its last chunk, and whether its memory was the same before and after."""

    given: Tensor
    made: Tensor
    settled: bool


@dataclass
class StreamState:
    """What one stream carries from chunk to chunk: each layer's last input frames, by the layer's name.

    carry: False for a clip given whole, after which nothing follows
    started: whether a chunk has passed; the first frame bypasses all temporal resampling
    convolution: computes the convolutions
    shard: the rows that this process holds, None for all
    timestep: how much noise a conditioned decoder is told there is, `[B]` or for all `[1]`; None: none
    embedding: of that timestep
    held: whether this chunk of the stream repeats the last one; then blocks are compared, and what repeats is reused
    """

    carry: bool = True
    started: bool = False
    convolution: Convolution = field(default_factory=Convolution)
    shard: Shard | None = None
    timestep: Tensor | None = None
    embedding: Tensor | None = None
    history: dict[str, Tensor] = field(default_factory=dict)
    held: bool = False
    last: Tensor | None = None
    traces: dict[str, Trace] = field(default_factory=dict)
    skipped: int = 0

    def recall(self, layer: nn.Module, x_BCTHW: Tensor, frames: int) -> Tensor | None:
        """What `layer` remembers (nothing at the start); remember the last `frames` frames of that and `x`, zeros before them."""
        past = self.history.get(layer.slot)  # type: ignore[call-overload]
        if self.carry and frames:
            kept = x_BCTHW[:, :, -frames:]
            missing = frames - kept.shape[2]
            if missing and past is not None:
                kept = torch.cat([past[:, :, -missing:], kept], dim=2)
            elif missing:
                kept = F.pad(kept, (0, 0, 0, 0, missing, 0))
            else:
                kept = kept.clone()  # a view would keep the whole chunk alive
            self.history[layer.slot] = kept  # type: ignore[index]
        return past

    def forget(self, layer: nn.Module, x_BCTHW: Tensor, frames: int) -> None:
        """Remember zeros, of the size of a frame of `x`, as if the stream began after it."""
        if self.carry:
            self.history[layer.slot] = torch.zeros_like(x_BCTHW[:, :, :1]).expand(-1, -1, frames, -1, -1).clone()  # type: ignore[index]

    def join(self, layer: nn.Module, x_BCTHW: Tensor, frames: int) -> Tensor:
        """Put what `layer` remembers in front of its input, and remember the last `frames` frames."""
        past = self.recall(layer, x_BCTHW, frames)
        return x_BCTHW if past is None else torch.cat([past, x_BCTHW], dim=2)

    def watch(self, chunk: Tensor) -> Tensor:
        """The chunk, in a copy of our own, having noted whether it repeats the last one to the bit, as a still tail does.

        Not where a picture is shared: a process that leaves a block out would leave the neighbours waiting for its rows.
        """
        if self.shard is not None:
            return chunk
        self.held = self.started and self.last is not None and self.last.shape == chunk.shape and torch.equal(self.last, chunk)
        if not self.held:
            self.last = chunk.clone()  # the caller may fill the same tensor again
            self.traces.clear()
        assert self.last is not None
        return self.last

    def run(self, block: nn.Module, x_BCTHW: Tensor) -> Tensor:
        """`block(x, state)`; while the stream repeats itself, the last output where neither input nor memory has changed.

        Equal to the bit: the same computation on the same numbers is left out.
        """
        slot: str | None = getattr(block, "slot", None)  # a block that was put in later has none
        if not self.held or slot is None:
            return block(x_BCTHW, self)  # type: ignore[no-any-return]
        trace = self.traces.get(slot)
        if trace is not None and trace.settled and torch.equal(trace.given, x_BCTHW):
            self.skipped += 1
            return trace.made
        before = {key: value for key, value in self.history.items() if key == slot or key.startswith(f"{slot}.")}
        made: Tensor = block(x_BCTHW, self)
        settled = all(torch.equal(value, self.history[key]) for key, value in before.items())
        self.traces[slot] = Trace(x_BCTHW, made, settled)
        return made

"""One picture over several processes: each holds some rows, convolutions exchange rows with the neighbours.

The result is that of one process: at the edges between processes convolutions see real rows, and what attends to the
whole frame gathers it.

Shapes: B batch, C channels, T frames, H height, W width.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .model import WanVAE


class RowShard:
    """The rows of this process among those of a group (see `stream.Shard`).

    group: None for all processes
    rows: rows of the latent grid that each process holds, by rank in the group; at other resolutions a multiple of them
    ValueError where there is not one number, of at least 1, for each process.
    """

    def __init__(self, group: dist.ProcessGroup | None, rows: Sequence[int]) -> None:
        self.group, self.rows = group, tuple(rows)
        self.rank, size = dist.get_rank(group), dist.get_world_size(group)
        if len(self.rows) != size or min(self.rows) < 1:
            raise ValueError(f"rows {self.rows} for {size} processes, expected at least 1 for each: use fewer processes")

    @classmethod
    def even(cls, rows: int, group: dist.ProcessGroup | None = None) -> RowShard:
        """`rows` of the latent grid over the group, as evenly as can be. ValueError where there are more processes than rows."""
        size = dist.get_world_size(group)
        return cls(group, [rows // size + (rank < rows % size) for rank in range(size)])

    def extend(self, x_BCTHW: Tensor, above: int, below: int) -> Tensor:
        """`x` with so many rows of the neighbours; zeros at the edges of the picture.

        ValueError, on all processes, where the shortest part has fewer rows than a neighbour wants.
        """
        scale = self._scale(x_BCTHW)
        if min(self.rows) * scale < max(above, below):
            shortest = min(self.rows) * scale
            raise ValueError(f"{shortest} rows in the shortest part, a neighbour wants {max(above, below)}: use fewer processes")
        batch, channels, frames, height, width = x_BCTHW.shape
        upper, lower = (x_BCTHW.new_zeros(batch, channels, frames, rows, width) for rows in (above, below))
        operations = []
        if self.rank > 0:
            operations += self._exchange(self.rank - 1, x_BCTHW[:, :, :, :below], upper)
        if self.rank < len(self.rows) - 1:
            operations += self._exchange(self.rank + 1, x_BCTHW[:, :, :, height - above :], lower)
        for request in dist.batch_isend_irecv(operations) if operations else ():
            request.wait()
        return torch.cat([upper, x_BCTHW, lower], dim=3)

    def gather(self, x_BCTHW: Tensor) -> Tensor:
        """The whole picture, on every process."""
        scale = self._scale(x_BCTHW)
        batch, channels, frames, height, width = x_BCTHW.shape
        own = x_BCTHW.new_zeros(batch, channels, frames, max(self.rows) * scale, width)
        own[:, :, :, :height] = x_BCTHW
        parts = [torch.empty_like(own) for _ in self.rows]
        dist.all_gather(parts, own, group=self.group)
        return torch.cat([part[:, :, :, : rows * scale] for part, rows in zip(parts, self.rows, strict=True)], dim=3)

    def own(self, x_BCTHW: Tensor) -> Tensor:
        """The rows of this process out of the whole picture. ValueError where its height is no multiple of the rows."""
        total, height = sum(self.rows), x_BCTHW.shape[3]
        if height % total:
            raise ValueError(f"a picture of {height} rows cannot be shared like one of {total}: expected a multiple")
        scale, start = height // total, sum(self.rows[: self.rank])
        return x_BCTHW[:, :, :, start * scale : (start + self.rows[self.rank]) * scale]

    def _scale(self, x_BCTHW: Tensor) -> int:
        return x_BCTHW.shape[3] // self.rows[self.rank]

    def _exchange(self, neighbour: int, given: Tensor, wanted: Tensor) -> list[dist.P2POp]:
        """Send what the neighbour misses and receive what is missing here; both sides know which is empty."""
        peer = neighbour if self.group is None else dist.get_global_rank(self.group, neighbour)
        operations = []
        if given.shape[3]:
            operations.append(dist.P2POp(dist.isend, given.contiguous(), peer, self.group))
        if wanted.shape[3]:
            operations.append(dist.P2POp(dist.irecv, wanted, peer, self.group))
        return operations


def encode_sharded(vae: WanVAE, chunks: Iterable[Tensor], *, group: dist.ProcessGroup | None = None) -> Iterator[Tensor]:
    """`vae.encode_stream(chunks)` over the processes of a group: each gives the whole chunks and gets the whole latents.

    All processes hold the same weights and run in step. ValueError where there are more of them than rows of latents.
    Example, under torchrun: `dist.init_process_group("gloo"); latents = torch.cat(list(encode_sharded(vae, chunks)), dim=2)`
    """
    session: Any = None
    for chunk in chunks:
        vae.check_video(chunk, started=session is not None)
        if session is None:
            shard = RowShard.even(chunk.shape[3] // vae.spec.stride[1], group)
            session = vae.encode_session(shard=shard)
        if (latents := session.push(shard.own(chunk))).shape[2]:
            yield shard.gather(latents)
    yield from () if session is None else map(shard.gather, session.finish())


def decode_sharded(vae: WanVAE, chunks: Iterable[Tensor], *, group: dist.ProcessGroup | None = None) -> Iterator[Tensor]:
    """`vae.decode_stream(chunks)` over the processes of a group: each gives the whole latents and gets the whole frames.

    All processes hold the same weights and run in step. ValueError where there are more of them than rows of latents.
    """
    session: Any = None
    for chunk in chunks:
        vae.check_latents(chunk)
        if session is None:
            shard = RowShard.even(chunk.shape[3], group)
            session = vae.decode_session(shard=shard)
        if (video := session.push(shard.own(chunk))).shape[2]:
            yield shard.gather(video)
    yield from () if session is None else map(shard.gather, session.finish())

"""What the processes of a run tell each other besides tensors: small Python objects, over a group of their own.

The group is gloo's, so that a checkpoint can be written in the background while training uses the GPUs' group.
"""

from __future__ import annotations

from typing import TypeVar

import torch.distributed as dist

T = TypeVar("T")


class Ranks:
    """This process among those of the run; alone where there is no process group.

    Making one is collective: all processes make theirs, in the same order.
    """

    def __init__(self) -> None:
        together = dist.is_available() and dist.is_initialized()
        self.group: dist.ProcessGroup | None = dist.new_group(backend="gloo") if together else None
        self.rank, self.size = (dist.get_rank(), dist.get_world_size()) if together else (0, 1)

    def gather(self, value: T) -> list[T]:
        """The values of all processes, by rank, on every process."""
        if self.group is None:
            return [value]
        values: list[T] = [value] * self.size
        dist.all_gather_object(values, value, group=self.group)
        return values

    def to_first(self, value: T) -> list[T] | None:
        """The values of all processes, by rank, on rank 0, and None on the others: for what is large."""
        self.gather(None)  # all meet first, which has a time limit; a transfer between two has none
        if self.rank:
            dist.send_object_list([value], dst=0, group=self.group)
            return None
        values = [value]
        for source in range(1, self.size):  # one after another: a collective pads all to the largest
            given: list[T] = [value]
            dist.recv_object_list(given, src=source, group=self.group)
            values += given
        return values

    def first(self, value: T) -> T:
        """The value of rank 0, on every process."""
        given = [value]
        if self.group is not None:
            dist.broadcast_object_list(given, src=0, group=self.group)
        return given[0]

"""Which process does what: data ranks, context parallelism and sharded weights, applied to modules from outside.

Processes have the coordinates (data, ring, ulysses), the last one innermost. Those of one (ring, ulysses) group share their samples
and split the tokens; the weights are split over `fsdp` neighbours, a group that contains the former or lies in it, as in the report
(section 4.3: FSDP and context parallel groups intersect). Gradients are averaged over all processes in the end: a context parallel
group's average is the gradient of its samples (`wan_dit.parallel`), so the loss of a process is that of its samples, times the
number of data ranks, over all samples of the step.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor
from wan_dit.parallel import shard
from wan_dit.parallel.sequence import sequence_parallel

from .config import ParallelConfig

BUCKET = 32 * 2**20  # bytes of gradients that are averaged at a time


class Layout:
    """The processes of a run; one process alone, without a group, is the layout of ones."""

    def __init__(self, config: ParallelConfig, device: str = "cpu") -> None:
        """ValueError where the degrees do not multiply to the number of processes."""
        self.config, self.device = config, torch.device(device)
        self.world = dist.get_world_size() if dist.is_initialized() else 1
        self.rank = dist.get_rank() if dist.is_initialized() else 0
        self.context = config.ring * config.ulysses
        _check(config, self.world)
        self.data_ranks, self.data_rank = self.world // self.context, self.rank // self.context
        self.context_rank = self.rank % self.context
        self.mesh: DeviceMesh | None = None
        self.shards: DeviceMesh | None = None
        if self.world > 1:
            kind = self.device.type
            names = ("data", "ring", "ulysses")
            self.mesh = init_device_mesh(kind, (self.data_ranks, config.ring, config.ulysses), mesh_dim_names=names)
            if config.fsdp > 1:
                self.shards = init_device_mesh(kind, (self.world // config.fsdp, config.fsdp), mesh_dim_names=("replicate", "shard"))

    @property
    def is_main(self) -> bool:
        """Whether this process writes and shows."""
        return self.rank == 0

    def apply(self, modules: dict[str, nn.Module], dtype: torch.dtype | None = None) -> None:
        """Split the tokens and the weights of every module that has a trunk of blocks; all others are copies on each process.

        dtype: what the split weights of a module of which all is trained are gathered and computed with in, None for their own
        """
        for module in modules.values():
            trunk = getattr(module, "trunk", None)
            if not isinstance(trunk, nn.Module):
                continue
            if self.mesh is not None and self.context > 1:
                sequence_parallel(trunk, ulysses=self._group("ulysses"), ring=self._group("ring"))
            if self.shards is not None:
                gathered = dtype if all(parameter.requires_grad for parameter in module.parameters()) else None
                shard(module, self.shards if self.shards.shape[0] > 1 else self.shards["shard"], dtype=gathered)

    @contextmanager
    def accumulating(self, modules: Iterable[nn.Module], last: bool) -> Iterator[None]:
        """Inside it gradients of sharded modules stay unsynchronised unless this is the `last` micro-batch of the step."""
        sharded = [cast(Any, module) for module in modules if self.shards is not None and hasattr(module, "set_requires_gradient_sync")]
        for module in sharded:
            module.set_requires_gradient_sync(last)
        yield

    def average(self, parameters: Iterable[nn.Parameter]) -> None:
        """Average the gradients of what is not sharded over all processes; FSDP has averaged its own."""
        if self.world == 1:
            return
        own = [parameter for parameter in parameters if not isinstance(parameter, DTensor)]
        touched = torch.tensor([parameter.grad is not None for parameter in own], dtype=torch.int32, device=self.device)
        if own:
            dist.all_reduce(touched)
        grads = []
        for parameter, processes in zip(own, touched.tolist(), strict=True):
            if not processes:  # the optimiser leaves it as it is, as it does where there is one process
                continue
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            grads.append(parameter.grad)
        for part in _parts(grads):
            flat = torch.cat([grad.flatten() for grad in part])
            dist.all_reduce(flat)
            flat /= self.world
            for grad, piece in zip(part, flat.split([grad.numel() for grad in part]), strict=True):
                grad.copy_(piece.view_as(grad))

    def total(self, value: Tensor) -> Tensor:
        """The sum of a value of the data ranks, on every process; those of a context parallel group hold the same one."""
        if self.world == 1:
            return value
        total = value.detach().clone() / self.context
        dist.all_reduce(total)
        return total

    def exchanged(self, batches: list[Any]) -> list[Any]:
        """Batches that each process of a context parallel group made, in turn: all of them on each, in the order of the processes.

        So encoders run data parallel, and the backbone context parallel (report, section 4.3.3).
        """
        if self.context == 1:
            return batches
        assert self.mesh is not None
        groups = [group for name in ("ring", "ulysses") if (group := self._group(name)) is not None]
        found: list[Any] = [batches]
        for group in reversed(groups):  # first among the innermost
            gathered: list[Any] = [None] * group.size()
            dist.all_gather_object(gathered, found, group=group)
            found = [batch for part in gathered for batch in part]
        return [batch for turn in zip(*found, strict=True) for batch in turn]

    def barrier(self) -> None:
        if self.world > 1:
            dist.barrier()

    def _group(self, name: str) -> dist.ProcessGroup | None:
        group = self.mesh.get_group(name) if self.mesh is not None else None
        return group if group is not None and group.size() > 1 else None


def _check(config: ParallelConfig, world: int) -> None:
    if world % (context := config.ring * config.ulysses):
        raise ValueError(f"{world} processes do not divide by ring {config.ring} x ulysses {config.ulysses} = {context}: start a multiple")
    if world % config.fsdp:
        raise ValueError(f"{world} processes do not divide by fsdp {config.fsdp}: start a multiple, or change parallel.fsdp")
    if config.fsdp > 1 and config.fsdp % context and context % config.fsdp:
        raise ValueError(f"fsdp {config.fsdp} must be a multiple or a divisor of ring x ulysses = {context}")


def _parts(grads: list[Tensor]) -> Iterator[list[Tensor]]:
    """Of at most so many bytes each, of one type."""
    part: list[Tensor] = []
    for grad in grads:
        if part and (grad.dtype != part[0].dtype or sum(each.nbytes for each in part) + grad.nbytes > BUCKET):
            yield part
            part = []
        part.append(grad)
    if part:
        yield part

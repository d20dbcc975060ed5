"""Processes in a mesh, and a backbone over them.

The mesh has the dimensions `cfg` (prompt and negative prompt), `ring` and `ulysses`, the last one innermost: neighbours in
it talk most and should share a machine.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method

from ..guidance import guided_velocity
from .guidance import CfgParallel
from .sequence import sequence_parallel

DIMENSIONS = ("cfg", "ring", "ulysses")
B = TypeVar("B", bound=nn.Module)
GuidedVelocity = Callable[..., Tensor]


@contextmanager
def init_parallel(*, ulysses: int = 1, ring: int = 1, cfg_parallel: bool = False, device: str | None = None) -> Iterator[DeviceMesh]:
    """The mesh of the processes that torchrun, or another launcher with its environment, has started.

    device: its type; None is "cuda" where there is a GPU, else "cpu". It decides the backend (NCCL, gloo), and each process
    gets the device of its local rank
    A group that exists already is used, and kept; one made here ends with the context.
    Raises ValueError where there is no launcher, or where the degrees do not multiply to the number of processes.

    Example, under `torchrun --nproc-per-node 4`: `with init_parallel(ulysses=2, ring=2) as mesh: parallelize(backbone, mesh)`
    """
    kind = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu")).type
    degrees = 2 if cfg_parallel else 1, ring, ulysses
    given = dist.is_initialized()
    _check(degrees, dist.get_world_size() if given else _launched())
    torch.get_device_module(kind).set_device(int(os.environ.get("LOCAL_RANK", 0)))
    if not given:
        dist.init_process_group(dist.get_default_backend_for_device(kind))
    try:
        yield init_device_mesh(kind, degrees, mesh_dim_names=DIMENSIONS)
        if not given:
            dist.barrier()  # gloo aborts a process whose peers are gone before it has closed its groups
    finally:
        if not given:
            dist.destroy_process_group()


def _launched() -> int:
    """Processes of the launcher."""
    if missing := [name for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]:
        raise ValueError(f"{', '.join(missing)} not set: start several processes by torchrun --nproc-per-node N -m wan_dit ...")
    return int(os.environ["WORLD_SIZE"])


def _check(degrees: tuple[int, int, int], processes: int) -> None:
    cfg, ring, ulysses = degrees
    if min(degrees) < 1:
        raise ValueError(f"degrees must be at least 1, got ulysses {ulysses} and ring {ring}")
    if (needed := cfg * ring * ulysses) != processes:
        product = f"ulysses {ulysses} x ring {ring}" + (" x 2 for guidance" if cfg == 2 else "")
        raise ValueError(f"{processes} processes, but {product} needs {needed}: start {needed}, or change the degrees")


def parallelize(backbone: B, mesh: DeviceMesh, *, fsdp: bool = False) -> B:
    """Put a backbone to work on all processes of a mesh; it is changed in place, and none of its forwards is.

    mesh: from `init_parallel`, or any whose dimensions of the names `ring` and `ulysses` are to split the tokens
    fsdp: also split the weights over all processes there are
    Raises ValueError where the attention heads do not divide by the Ulysses degree, or where the backbone has no trunk.
    """
    if not isinstance(trunk := getattr(backbone, "trunk", None), nn.Module):
        raise ValueError(f"{type(backbone).__name__} has no `trunk` of blocks, around which its tokens could be split: use one process")
    sequence_parallel(trunk, ulysses=_group(mesh, "ulysses"), ring=_group(mesh, "ring"))
    return shard(backbone, init_device_mesh(mesh.device_type, (dist.get_world_size(),))) if fsdp else backbone


def guidance_over(mesh: DeviceMesh) -> GuidedVelocity:
    """What computes a guided velocity on a mesh: both forwards at the same time where it has a dimension `cfg`."""
    group = _group(mesh, "cfg")
    return CfgParallel(group) if group is not None and group.size() > 1 else guided_velocity


def shard(backbone: B, mesh: DeviceMesh, *, dtype: torch.dtype | None = None) -> B:
    """Split the weights of a backbone over a mesh (FSDP): each block's are gathered while it runs.

    mesh: of one dimension, or of two: copies, and shards of each copy
    dtype: what those of the blocks are gathered and computed with in; their gradients are reduced in fp32. None: as they are
    Keys and values of cross-attention are units of their own, since `encode_context` computes them outside the blocks.
    """
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view")  # of the velocity, which nothing writes into
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=dtype and torch.float32, cast_forward_inputs=False)  # times stay fp32
    unit = partial(fully_shard, mesh=mesh, mp_policy=policy)
    trunk = cast(nn.Module, backbone.trunk)
    for block in (*cast(nn.ModuleList, trunk.blocks), *getattr(trunk, "vace_blocks", ())):
        attention = block.cross_attn
        names = ("k", "v", "norm_k", "k_img", "v_img", "norm_k_img")
        unit([child for name, child in attention.named_children() if name in names])
        for name in ("before_proj", "after_proj"):
            if getattr(block, name, None) is not None:
                unit(getattr(block, name))
        unit(block)
    fully_shard(backbone, mesh=mesh)
    register_fsdp_forward_method(backbone, "encode_context")
    return backbone


def agree(value: float, group: dist.ProcessGroup | DeviceMesh) -> float:
    """The largest value of all processes of a group, or of a mesh; a bool is true where one is.

    What data decides, such as whether a cache may skip a step, has to be decided alike wherever processes wait for each other.
    """
    groups = [group.get_group(i) for i in range(group.ndim)] if isinstance(group, DeviceMesh) else [group]
    device = "cpu" if dist.get_backend(groups[0]) == "gloo" else torch.accelerator.current_accelerator()
    largest = torch.tensor(value, dtype=torch.float64, device=device)
    for each in groups:
        dist.all_reduce(largest, dist.ReduceOp.MAX, group=each)
    return type(value)(largest.item())


def _group(mesh: DeviceMesh, name: str) -> dist.ProcessGroup | None:
    return mesh.get_group(name) if name in (mesh.mesh_dim_names or ()) else None

"""Which blocks keep their activations, which move them to the host and which are computed again, solved from what there is.

Offload comes first, as in the report, where the transfer of a block hides behind the forward of at most three: of so many blocks one can
be offloaded at no cost. What then does not fit is computed again.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from wan_dit.run_plan import Rates

from .degrees import Degrees
from .gpus import Gpu
from .job import Job
from .memory import Choice, Policy, blocks_of, memory
from .timing import HIDDEN, block_time


@dataclass(frozen=True)
class Wanted:
    """recompute, offload: how many blocks; None is for the solver to say."""

    recompute: int | None = None
    offload: int | None = None


def solve(job: Job, degrees: Degrees, gpu: Gpu, rates: Rates, wanted: Wanted, room: int, host: int, gamma: float | None = None) -> Policy:
    """The policy that fits `room` bytes on the GPU and `host` in its machine's memory and costs the least time.

    Where nothing fits, the one that takes the least memory. ValueError where more blocks are asked for than there are.
    """
    blocks, each = job.blocks, blocks_of(job, degrees, job.largest, gamma)
    if (wanted.recompute or 0) + (wanted.offload or 0) > blocks:
        raise ValueError(f"{wanted.recompute or 0} blocks to recompute and {wanted.offload or 0} to offload: the model has {blocks}")
    _, swapped, _ = job.frozen()
    most = min(hideable(job, degrees, gpu, rates, each.block), max(0, int((host - swapped) // each.block)))
    keep = spread(blocks, 0, 0)
    left = room - (memory(job, degrees, keep, gamma).total - each.total(keep))  # for activations
    best: Policy | None = None
    for again in range(blocks + 1) if wanted.recompute is None else [wanted.recompute]:
        moved = min(most, blocks - again) if wanted.offload is None else wanted.offload
        policy = spread(blocks, again, moved)
        if each.total(policy) <= left:
            fewer = range(moved + 1) if wanted.offload is None else [moved]
            return next(policy for policy in (spread(blocks, again, count) for count in fewer) if each.total(policy) <= left)
        best = policy if best is None or each.total(policy) < each.total(best) else best
    assert best is not None
    return best


def hideable(job: Job, degrees: Degrees, gpu: Gpu, rates: Rates, size: float) -> int:
    """Blocks of so many bytes whose transfer hides behind the forward of the others, none where it takes that of more than three each."""
    one = block_time(job, degrees, job.largest, gpu, rates).run
    each = max(1, math.ceil(size / gpu.pcie / one - 1e-9))
    return job.blocks // each if each <= HIDDEN else 0


def spread(blocks: int, again: int, moved: int) -> Policy:
    """So many of each, evenly among the first blocks; those that keep their activations stand last, where they are needed soonest."""
    first = again + moved
    offloaded = {i for i in range(first) if (i + 1) * moved // first > i * moved // first} if first else set()
    choices: list[Choice] = ["offload" if i in offloaded else "recompute" for i in range(first)]
    return (*choices, *["keep"] * (blocks - first))  # type: ignore[arg-type]

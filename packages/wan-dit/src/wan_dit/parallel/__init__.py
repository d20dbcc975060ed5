"""One video over several processes, which share the work of every step and, with FSDP, the weights.

`Ulysses` and `Ring` split the tokens, `CfgParallel` the two forwards of guidance, each within a dimension of one mesh; `shard`
splits the weights. All of it is applied from outside; every process gives the same inputs and gets the same result.

Example, started by `torchrun --nproc-per-node 4`:
    >>> with init_parallel(ulysses=2, cfg_parallel=True) as mesh:
    ...     backbone = parallelize(load_backbone("tiny"), mesh)
    ...     velocity = guidance_over(mesh)(backbone, latents, timestep, context, negative_context, 5.0)
"""

from __future__ import annotations

from .guidance import CfgParallel
from .lse import LseAttention
from .mesh import agree, guidance_over, init_parallel, parallelize, shard
from .ring import Ring
from .sequence import gather_tokens, sequence_parallel
from .ulysses import Ulysses

__all__ = [
    "CfgParallel",
    "LseAttention",
    "Ring",
    "Ulysses",
    "agree",
    "gather_tokens",
    "guidance_over",
    "init_parallel",
    "parallelize",
    "sequence_parallel",
    "shard",
]

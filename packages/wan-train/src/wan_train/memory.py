"""What becomes of the activations of a block between its forward and its backward, applied to the blocks of a trunk from outside.

`offload` moves them to the host's memory, `recompute` drops them and runs the block again. The report offloads first, and
recomputes the layers with the most memory for their work where the host's memory runs short (section 4.3.4).
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import nn
from torch.autograd.graph import save_on_cpu
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import ActivationWrapper, CheckpointImpl, checkpoint_wrapper

from .config import MemoryConfig


def apply_policy(module: nn.Module, config: MemoryConfig) -> None:
    """Wrap the blocks of a module's trunk, its VACE blocks last; one without a trunk is left as it is.

    ValueError where the policy is for another number of blocks.
    """
    trunk = getattr(module, "trunk", None)
    if not isinstance(trunk, nn.Module):
        return
    lists = [cast(nn.ModuleList, trunk.blocks), getattr(trunk, "vace_blocks", nn.ModuleList())]
    blocks = [(part, i) for part in lists for i in range(len(part))]
    policy = (config.policy,) * len(blocks) if isinstance(config.policy, str) else config.policy
    if len(policy) != len(blocks):
        raise ValueError(f"memory.policy is for {len(policy)} blocks, the backbone has {len(blocks)}: give one for each, or one for all")
    for (part, i), choice in zip(blocks, policy, strict=True):
        if choice == "recompute":
            part[i] = checkpoint_wrapper(part[i], CheckpointImpl.NO_REENTRANT)
        elif choice == "offload":
            part[i] = _Offloaded(part[i])


class _Offloaded(ActivationWrapper):
    """A block whose saved tensors wait in the host's memory."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        with save_on_cpu(pin_memory=torch.cuda.is_available()):
            return self._checkpoint_wrapped_module(*args, **kwargs)

"""Classifier-free guidance over two processes: one runs the prompt, the other the negative prompt, at the same time."""

from __future__ import annotations

import torch.distributed as dist
from torch import Tensor

from ..contracts import Backbone, Conditioning, Context
from ..guidance import guided_velocity
from .sequence import gather_tokens


class CfgParallel:
    """`wan_dit.guidance.guided_velocity` over a group of two; both processes give the same arguments and get the same velocity.

    Raises ValueError where the group is not one of two.
    Example: `CfgParallel(mesh.get_group("cfg"))(backbone, latents, timestep, context, negative_context, 5.0)`.
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        if group.size() != 2:
            raise ValueError(f"guidance is two forwards: it takes a group of 2 processes, got one of {group.size()}")
        self.group = group

    def __call__(
        self,
        backbone: Backbone,
        latents: Tensor,
        timestep: Tensor,
        context: Context,
        negative_context: Context | None,
        scale: float,
        conditioning: Conditioning | None = None,
    ) -> Tensor:
        """See `guided_velocity`. At scale 1 there is nothing to share: both processes run the prompt."""
        if scale == 1 or negative_context is None:
            return guided_velocity(backbone, latents, timestep, context, negative_context, scale, conditioning)
        own = backbone(latents, timestep, (context, negative_context)[self.group.rank()], conditioning)
        positive, negative = gather_tokens(own.flatten()[None, None], self.group).view(2, *own.shape)
        return negative + scale * (positive - negative)

"""The kernel of AdamW: in one pass over the weights where torch has one, whatever a checkpoint was saved with."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from wan_train.config import OptimiserConfig
from wan_train.optim import Optimiser, gradient_norm

SHAPES, STEPS, CLIP = ((33, 17), (5,), (2, 3, 7)), 5, 2.0


def drawn(step: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(step)
    return [torch.randn(shape, generator=generator) for shape in SHAPES]


def expected() -> list[Tensor]:
    """By torch's AdamW as it comes, and its clipping."""
    params = [nn.Parameter(value) for value in drawn(0)]
    reference = torch.optim.AdamW(params, 0.01, (0.9, 0.99), weight_decay=0.1)
    for step in range(1, 1 + STEPS):
        for param, grad in zip(params, drawn(step), strict=True):
            param.grad = grad
        nn.utils.clip_grad_norm_(params, CLIP)
        reference.step()
    return [param.detach() for param in params]


def trained(params: list[nn.Parameter], saved_with: dict[str, Any] | None = None) -> Optimiser:
    """saved_with: what a checkpoint brings into the groups before the third step."""
    config = OptimiserConfig(name="adamw", lr=0.01, betas=(0.9, 0.99), weight_decay=0.1, clip=CLIP)
    optimiser = Optimiser(config, [{"params": params}], STEPS)
    for step in range(1, 1 + STEPS):
        for param, grad in zip(params, drawn(step), strict=True):
            param.grad = distribute_tensor(grad, param.device_mesh, param.placements) if isinstance(param, DTensor) else grad
        if step == 3:
            optimiser.parts[0][0].param_groups[0].update(saved_with or {})
        optimiser.step(step, float(gradient_norm(params)))
    return optimiser


def assert_as_expected(params: list[nn.Parameter]) -> None:
    for param, value in zip(params, expected(), strict=True):
        got = param.full_tensor() if isinstance(param, DTensor) else param
        torch.testing.assert_close(got.detach(), value, atol=1e-6, rtol=1e-6)


@pytest.fixture
def mesh() -> Iterator[DeviceMesh]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


@pytest.mark.parametrize("saved_with", [None, {"fused": None, "foreach": None}])
def test_whole_weights_are_updated_in_one_pass(saved_with: dict[str, Any] | None) -> None:
    params = [nn.Parameter(value) for value in drawn(0)]
    ((adamw, _),) = trained(params, saved_with).parts
    assert adamw.param_groups[0]["fused"]
    assert_as_expected(params)


def test_weights_that_are_split_and_weights_that_are_not_share_a_group(mesh: DeviceMesh) -> None:
    """Also after a checkpoint of one process, whose weights were all whole."""
    first, *rest = drawn(0)
    params = [nn.Parameter(distribute_tensor(first, mesh, [Shard(0)])), *(nn.Parameter(value) for value in rest)]
    ((adamw, _),) = trained(params, {"fused": True}).parts
    assert not adamw.param_groups[0]["fused"]
    assert_as_expected(params)

"""What the processes of the tests of parallelism run; a module of its own, which a forked server can import.

Each task computes the same thing alone and over the group, and answers how far the two are apart.
"""

from __future__ import annotations

import os
import traceback
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint
from wan_dit import parallel
from wan_dit.attention import sdpa
from wan_dit.config import DiTConfig
from wan_dit.contracts import Conditioning
from wan_dit.guidance import guided_velocity
from wan_dit.model import WanDiT
from wan_dit.parallel import ring as ring_module
from wan_dit.parallel.lse import PlainLse
from wan_dit.plugins import find
from wan_dit.testing import difference

BASE = DiTConfig(dim=48, ffn_dim=64, freq_dim=32, text_dim=20, text_len=24, num_heads=4, num_layers=3, in_dim=4, out_dim=4)
CONFIGS = {
    "text": BASE,
    "vace": BASE.model_copy(update={"vace_layers": (0, 2), "vace_in_dim": 6}),
    "image": BASE.model_copy(update={"image_dim": 10, "in_dim": 6}),
}
GRIDS = {"divides": (4, 4, 4), "odd": (3, 6, 6), "fewer than two each": (5, 2, 2)}  # 16, 27 and 5 tokens


def run(task: Callable[..., Any], rank: int, size: int, store: str, given: tuple[Any, ...], out: Any) -> None:
    """Form a group, do the task, put its answer or its traceback into the queue; nobody waits longer than a minute."""
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    try:
        dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=size, timeout=timedelta(seconds=60))
        answer = task(*given)
        dist.barrier()
        out.put((rank, answer))
    except Exception:
        out.put((rank, traceback.format_exc()))
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def mesh_of(ulysses: int = 1, ring: int = 1, cfg: int = 1) -> DeviceMesh:
    return init_device_mesh("cpu", (cfg, ring, ulysses), mesh_dim_names=("cfg", "ring", "ulysses"))


def make(name: str) -> WanDiT:
    """The same weights in every process, none of them zero or one."""
    model, generator = WanDiT(CONFIGS[name]), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in model.parameters():
            weight.copy_(torch.randn(weight.shape, generator=generator) * (0.3 if weight.ndim == 1 else weight[0].numel() ** -0.5))
    return model.eval()


def inputs(name: str, grid: tuple[int, int, int], times: str = "sample") -> tuple[Tensor, Tensor, list[Tensor], Conditioning]:
    generator = torch.Generator().manual_seed(1)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    timestep = {
        "one": torch.tensor([700.0]),
        "sample": torch.tensor([998.4, 417.2]),
        "frame": 1000 * torch.rand(2, grid[0], generator=generator),
    }
    batch = len(timestep[times])
    given = {
        "text": Conditioning(),
        "vace": Conditioning(vace=normal(batch, 6, *grid), vace_scale=0.7),
        "image": Conditioning(image_context=normal(batch, 7, 10), extra_latents=normal(batch, 2, *grid)),
    }
    return normal(batch, 4, *grid), timestep[times], [normal(3 + 5 * i, 20) for i in range(batch)], given[name]


def averaged(value: Tensor) -> Tensor:
    """The mean over all processes, as DDP makes it of gradients; FSDP has made it already, of shards."""
    if isinstance(value, DTensor):
        return value.full_tensor()
    value = value.clone()
    dist.all_reduce(value)
    return value / dist.get_world_size()


def same_bits(value: Tensor) -> bool:
    """Whether all processes have the same."""
    copies = [torch.empty_like(value) for _ in range(dist.get_world_size())]
    dist.all_gather(copies, value.contiguous())
    return all(torch.equal(copy, value) for copy in copies)


def forward_backward(model: WanDiT, given: tuple[Tensor, Tensor, list[Tensor], Conditioning]) -> tuple[Tensor, dict[str, Tensor]]:
    """Velocity and the gradients of weights, latents and prompt."""
    latents, timestep, text, conditioning = given
    latents, text = latents.clone().requires_grad_(), [tokens.clone().requires_grad_() for tokens in text]
    velocity = model(latents, timestep, model.encode_context(text, conditioning), conditioning)
    (velocity * velocity.detach().sin()).sum().backward()
    gradients = {name: weight.grad for name, weight in model.named_parameters()}
    return velocity.detach(), {**gradients, "latents": latents.grad, "text": text[0].grad}


def model_task(name: str, degrees: dict[str, int], times: str, fsdp: bool) -> dict[str, Any]:
    """Velocity and gradients of a backbone, by grid, and the part of the weights of all blocks that a process keeps."""
    mesh, alone = mesh_of(**degrees), make(name)
    together = parallel.parallelize(make(name), mesh, fsdp=fsdp)
    answer: dict[str, Any] = {}
    for label, grid in GRIDS.items():
        for model in (alone, together):
            model.zero_grad()
        velocity, gradients = forward_backward(alone, inputs(name, grid, times))
        got, got_gradients = forward_backward(together, inputs(name, grid, times))
        worst = max(difference(averaged(got_gradients[key]), gradients[key]) for key in gradients)
        answer[label] = difference(got, velocity), worst, same_bits(got)
    kept = sum(weight.to_local().numel() if isinstance(weight, DTensor) else weight.numel() for weight in together.trunk.parameters())
    return {**answer, "kept": kept / sum(weight.numel() for weight in alone.trunk.parameters())}


def attention_task(kinds: list[str], plant: str = "") -> dict[str, dict[int, float]]:
    """How far output and gradients of attention by itself are apart at worst, by kind and token count."""
    return {kind: {tokens: _attention(_attends(kind), tokens, plant) for tokens in (16, 13, 5, 2)} for kind in kinds}


def _attends(kind: str) -> Callable[..., Tensor]:
    if kind == "2d":
        mesh = mesh_of(ulysses=2, ring=2)
        return parallel.Ulysses(mesh.get_group("ulysses"), parallel.Ring(mesh.get_group("ring")))
    if kind == "ulysses":
        return parallel.Ulysses(dist.group.WORLD)
    return parallel.Ring(dist.group.WORLD, PlainLse() if kind == "plain ring" else None)


def _attention(attend: Callable[..., Tensor], tokens: int, plant: str) -> float:
    """Every process has some of the tokens, and its own part of the loss."""
    size, rank, generator = dist.get_world_size(), dist.get_rank(), torch.Generator().manual_seed(tokens)
    if plant == "merge":
        ring_module.merge = lambda out, lse, part, part_lse: ((out + part) / size, torch.logaddexp(lse, part_lse))
    length = -(-tokens // size)
    *qkv, weight = (torch.randn(2, length * size, 4, 8, generator=generator) for _ in range(4))
    real = [x[:, :tokens].clone().requires_grad_() for x in qkv]
    expected = sdpa(*real)
    (expected * weight[:, :tokens]).sum().backward()
    own = [x[:, rank * length : (rank + 1) * length].clone().requires_grad_() for x in qkv]
    got = attend(*own, None if plant == "pads" else tokens)
    mine = slice(min(rank * length, tokens), min((rank + 1) * length, tokens))
    count = mine.stop - mine.start
    (got[:, :count] * weight[:, mine]).sum().backward()
    pairs = zip((got, *(x.grad for x in own)), (expected, *(x.grad for x in real)), strict=True)
    return max(difference(a[:, :count], b[:, mine]) for a, b in pairs) if count else 0.0


class Checkpointed(nn.Module):
    """A block whose activations are computed again in the backward."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block, self.cross_attn, self.self_attn = block, block.cross_attn, block.self_attn

    def forward(self, *args: Any) -> Tensor:
        return checkpoint(self.block, *args, use_reentrant=False)


def checkpoint_task(degrees: dict[str, int]) -> list[float]:
    """Gradients of two forwards with different token counts, in one backward and in two, where blocks are computed again."""
    alone, together = make("text"), parallel.parallelize(make("text"), mesh_of(**degrees))
    blocks = together.trunk.blocks
    for i in range(len(blocks)):
        blocks[i] = Checkpointed(blocks[i])
    answer = []
    for order in ([0, 1], [1, 0], None):
        gradients = []
        for model in (alone, together):
            model.zero_grad()
            losses = []
            for grid in ((3, 6, 6), (2, 8, 8)):  # 27 and 32 tokens
                latents, timestep, text, _ = inputs("text", grid)
                losses.append(model(latents, timestep, model.encode_context(text)).square().mean())
            if order is None:
                sum(losses).backward()
            else:
                for i in order:
                    losses[i].backward()
            gradients.append([weight.grad for weight in model.parameters()])
        answer.append(max(difference(averaged(got), expected) for expected, got in zip(gradients[0], gradients[1], strict=False)))
    return answer


@torch.no_grad()
def guidance_task(degrees: dict[str, int], fsdp: bool) -> dict[float, tuple[float, bool, int]]:
    """Latents after three steps, and how often a process has run the backbone, by guidance scale."""
    mesh, alone = mesh_of(**degrees), make("text")
    together = parallel.parallelize(make("text"), mesh, fsdp=fsdp)
    calls: list[int] = []
    together.trunk.register_forward_hook(lambda *_: calls.append(1))
    solver = find("wan_schedulers", "unipc").load()
    schedule = solver.schedule(3, 3.0)

    def sample(model: WanDiT, velocity_of: Callable[..., Tensor], scale: float) -> Tensor:
        latents, _, text, _ = inputs("text", (3, 6, 6), "one")
        contexts = model.encode_context(text), model.encode_context([text[0][:2]])
        state = solver.start(schedule)
        for timestep in schedule.timesteps:
            velocity = velocity_of(model, latents, timestep.float().reshape(1), *contexts, scale)
            latents = solver.step(state, velocity, latents)
        return latents

    answer = {}
    for scale in (5.0, 1.0, 0.0):
        calls.clear()
        got = sample(together, parallel.guidance_over(mesh), scale)
        answer[scale] = difference(got, sample(alone, guided_velocity, scale)), same_bits(got), len(calls)
    return answer


def agree_task() -> list[Any]:
    rank, mesh = dist.get_rank(), mesh_of(ulysses=2, ring=2)
    ring = mesh.get_group("ring")
    return [
        parallel.agree(rank == 2, dist.group.WORLD),
        parallel.agree(False, mesh),
        parallel.agree(0.1 * rank, mesh),
        parallel.agree(rank, ring),
    ]

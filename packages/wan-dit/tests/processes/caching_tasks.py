"""A cache of another package, with or without a defect, and what processes do with caches and attentions; a string can name it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import attention_kernels
import torch
import torch.distributed as dist
from parallel_tasks import averaged, forward_backward, inputs, make, mesh_of, same_bits
from torch import Tensor
from wan_dit import parallel
from wan_dit.attentions import use_attention
from wan_dit.caching import Trial, TrunkRun, find_cache
from wan_dit.guidance import guided_velocity
from wan_dit.plugins import find
from wan_dit.testing import difference


@dataclass(frozen=True)
class EveryOther:
    """Runs the trunk at every second evaluation."""

    defect: str = ""
    first: int = 2

    def start(self, timesteps: Tensor, boundary: float | None = None, group: Any = None) -> EveryOtherRun:
        if self.defect == "shared by requests":
            if not SHARED:
                SHARED.append(EveryOtherRun(self, timesteps, boundary, group))
            return SHARED[0]
        return EveryOtherRun(self, timesteps, boundary, group)


SHARED: list[Any] = []


class EveryOtherRun(TrunkRun):
    def __init__(self, policy: EveryOther, timesteps: Tensor, boundary: float | None, group: Any) -> None:
        super().__init__(timesteps, boundary, group)
        self.policy, self.hidden = policy, 0

    def due(self, state: Any, branch: str, position: Any, modulation: Tensor) -> bool:
        if self.policy.defect == "state that is not saved":
            self.hidden += 1
            return self.hidden % 4 < 2
        return position.index < self.policy.first or position.step % 2 == 1

    def state_of(self, branch: str, step: int, expert: str | int) -> Any:
        branch = "both" if self.policy.defect == "branches mixed" else branch
        expert = 0 if self.policy.defect == "no reset at the switch" else expert
        if self.policy.defect == "branches mixed" and branch in self.states:
            self.states[branch]["step"] = step - 1
        return super().state_of(branch, step, expert)

    def count(self, branch: str, computed: bool) -> None:
        super().count(branch, computed or self.policy.defect == "not counted")


@dataclass(frozen=True)
class Disagreeing:
    """Processes take turns in wanting to run the trunk."""

    def start(self, timesteps: Tensor, boundary: float | None = None, group: Any = None) -> TrunkRun:
        return DisagreeingRun(timesteps, boundary, group)


class DisagreeingRun(TrunkRun):
    def due(self, state: Any, branch: str, position: Any, modulation: Tensor) -> bool:
        return position.step % 4 == dist.get_rank() or position.step == 6 * dist.get_rank()


CACHES = {
    "teacache": "teacache:first=2,threshold=9",
    "easycache": "easycache:first=3,threshold=20",
    "first-block": "first-block:threshold=0.5",
    "attention": "attention:first=2",
    "gated": "teacache:first=2,threshold=9+cfg-gate:after=0.3,every=3",
    "disagreeing": "caching_tasks:Disagreeing",
}


def cache_task(degrees: dict[str, int], fsdp: bool, agreeing: bool = True) -> dict[str, Any]:
    """By cache: how far the latents are from those of one process, whether all processes have the same, and what was skipped."""
    mesh, alone = mesh_of(**degrees), make("text")
    together = parallel.parallelize(make("text"), mesh, fsdp=fsdp)
    solver = find("wan_schedulers", "euler").load()
    schedule = solver.schedule(8, 3.0)
    noise, _, text, _ = inputs("text", (3, 6, 6), "one")
    answer = {}
    for name, ref in CACHES.items():
        latents, reports = [], []
        for model, guided, group in ((alone, guided_velocity, None), (together, parallel.guidance_over(mesh), mesh if agreeing else None)):
            with torch.no_grad():
                contexts = model.encode_context(text), model.encode_context([text[0][:2]])
            run = find_cache(ref).start(schedule.timesteps, group=group)
            latents.append(Trial(model, solver, schedule, noise, *contexts, 5.0, guided=guided).latents(run))
            reports.append(run.report())
        answer[name] = difference(latents[1], latents[0]), same_bits(latents[1]), reports[1]["skipped"]
    return answer


def kernel_task(degrees: dict[str, int]) -> tuple[float, float, list[tuple[int, ...]], str]:
    """How far velocity and gradients are apart where an attention is chosen first, what it was called with, and what is said afterwards."""
    alone, together = make("text"), make("text")
    use_attention(together, "attention_kernels:with_log_sum_exp")
    parallel.parallelize(together, mesh_of(**degrees))
    velocity, gradients = forward_backward(alone, inputs("text", (3, 6, 6)))
    attention_kernels.CALLS.clear()
    got, got_gradients = forward_backward(together, inputs("text", (3, 6, 6)))
    worst = max(difference(averaged(got_gradients[key]), gradients[key]) for key in gradients)
    try:
        use_attention(together, "sdpa")
    except ValueError as error:
        return difference(got, velocity), worst, attention_kernels.CALLS, str(error)
    return difference(got, velocity), worst, attention_kernels.CALLS, ""

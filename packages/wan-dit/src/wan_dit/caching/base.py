"""What every cache of one request shares: a state for each branch of guidance, when it starts anew, and what is counted.

A branch is one of the two forwards of guidance, `positive` (the prompt) or `negative`. Their states never mix. A state starts anew
where another expert takes over, and where its branch sat out an evaluation.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from ..contracts import Backbone, Conditioning, Context
from ..guidance import guided_velocity
from ..parallel import agree

Group = dist.ProcessGroup | DeviceMesh | None
State = dict[str, Any]  # of one branch: tensors, numbers, names and lists of them
Forward = Callable[..., Tensor]
BRANCHES = ("positive", "negative")


class Branch(NamedTuple):
    """A context under the name of its branch, as it passes through a guided velocity, which never looks into it."""

    name: str
    context: Any


@dataclass(frozen=True)
class Position:
    """Where a run is: evaluation `index` of the `count` of the present expert, and whether it is the last of the whole run."""

    step: int
    index: int
    count: int
    last: bool


class CacheRun:
    """One request under a cache; a subclass writes `evaluate`.

    timesteps: `[E]` of the run's schedule
    boundary: where the second expert takes over, as in `VideoModelSpec`; None where there is one
    group: all processes that work on this request; they then decide alike, which the caches of sharded weights need
    """

    skips = ""  # what a skipped evaluation leaves out
    needs_trunk = True  # whether it reaches into the backbone

    def __init__(self, timesteps: Tensor, boundary: float | None = None, group: Group = None) -> None:
        self.steps, self.group = len(timesteps), group
        self.high = self.steps if not boundary else int((timesteps >= 1000 * boundary).sum())
        self.states: dict[str, State] = {}
        self.counts = {branch: {"evaluations": 0, "skipped": 0} for branch in BRANCHES}

    def velocity(
        self,
        backbone: Backbone,
        latents: Tensor,
        timestep: Tensor,
        context: Context,
        negative_context: Context | None,
        scale: float,
        conditioning: Conditioning | None = None,
        *,
        step: int,
        expert: str | int = 0,
        guided: Callable[..., Tensor] = guided_velocity,
    ) -> Tensor:
        """What `guided` computes, with less work.

        step: index of the evaluation, 0 ... E - 1
        expert: name or number of the backbone that is given
        guided: `wan_dit.guidance.guided_velocity`, or one over several processes
        Raises ValueError where the cache does not fit the backbone.
        """
        if self.needs_trunk and not hasattr(backbone, "trunk"):
            raise ValueError(f"{type(backbone).__name__} has no `trunk` of blocks that a cache could leave out: use easycache or cfg-gate")
        forward = partial(self._forward, backbone, step, expert)
        negative = None if negative_context is None else Branch("negative", negative_context)
        return guided(forward, latents, timestep, Branch("positive", context), negative, scale, conditioning)

    def evaluate(self, state: State, branch: str, position: Position, forward: Forward, latents: Tensor) -> tuple[Tensor, bool]:
        """The velocity of one branch, and whether it was computed in full.

        state: of the branch, to be changed; empty but for `step` and `expert` where it starts anew
        forward: the backbone's, with all its arguments but `run_trunk`
        """
        raise NotImplementedError

    def agreed(self, compute: bool) -> bool:
        """Whether any process has to compute."""
        return compute if self.group is None else bool(agree(compute, self.group))

    def due_with_prompt(self, branch: str, step: int) -> bool | None:
        """What the prompt has noted as `due` at the same evaluation, for the negative prompt to follow; None where it decides itself.

        Guidance multiplies the difference of the two, so that one that is used again beside one that is not does most harm.
        """
        prompt = self.states.get("positive", {})
        return prompt.get("due") if branch == "negative" and prompt.get("step") == step else None

    def position(self, step: int) -> Position:
        first, end = (0, self.high) if step < self.high else (self.high, self.steps)
        return Position(step, step - first, end - first, step == self.steps - 1)

    def report(self) -> dict[str, Any]:
        """Evaluations and how many of them were skipped, in all and by branch."""
        totals = {name: sum(counts[name] for counts in self.counts.values()) for name in ("evaluations", "skipped")}
        return {**totals, "skips": self.skips, "branches": {branch: dict(counts) for branch, counts in self.counts.items()}}

    def state_dict(self) -> dict[str, Any]:
        """All that a run of the same cache needs to go on to the same bits: tensors, numbers and names."""
        copied: dict[str, Any] = _copied({"states": self.states, "counts": self.counts})
        return copied

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.states, self.counts = (_copied(state[name]) for name in ("states", "counts"))

    def state_of(self, branch: str, step: int, expert: str | int) -> State:
        """The state of a branch; a new one where the expert is another, or the branch sat out the evaluation before."""
        state = self.states.get(branch)
        if state is None or (state["step"], state["expert"]) != (step - 1, expert):
            state = self.states[branch] = {"expert": expert}
        state["step"] = step
        return state

    def count(self, branch: str, computed: bool) -> None:
        self.counts[branch]["evaluations"] += 1
        self.counts[branch]["skipped"] += not computed

    def _forward(
        self,
        backbone: Callable[..., Tensor],
        step: int,
        expert: str | int,
        latents: Tensor,
        timestep: Tensor,
        branch: Branch,
        conditioning: Conditioning | None = None,
    ) -> Tensor:
        forward = partial(backbone, latents, timestep, branch.context, conditioning)
        state = self.state_of(branch.name, step, expert)
        velocity, computed = self.evaluate(state, branch.name, self.position(step), forward, latents)
        self.count(branch.name, computed)
        return velocity


def relative_change(now: Tensor, before: Tensor) -> float:
    """Mean absolute difference over mean absolute value."""
    now, before = now.float(), before.float()
    return float((now - before).abs().mean() / before.abs().mean())


def _copied(value: Any) -> Any:
    """A copy of nested dicts and lists; tensors are shared, since no cache writes into one."""
    if isinstance(value, dict):
        return {key: _copied(item) for key, item in value.items()}
    return [_copied(item) for item in value] if isinstance(value, list) else value

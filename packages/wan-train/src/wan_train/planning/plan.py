"""A plan: a job on GPUs in a layout, what it takes, and whether that fits."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import cached_property

from wan_dit.run_plan import Rates

from .degrees import Degrees
from .gpus import Gpu
from .job import Job
from .memory import Memory, Policy, memory
from .policy import Wanted, solve
from .timing import Timing, timing

SPARE = 0.05  # share of a GPU's memory that lies in pieces between allocations


@dataclass(frozen=True)
class Plan:
    """wanted: what is said about recomputation and offload; the rest is solved
    gamma: bytes a token and channel that a block keeps, measured; None for those counted
    """

    job: Job
    degrees: Degrees
    gpu: Gpu
    rates: Rates
    wanted: Wanted = field(default_factory=Wanted)
    gamma: float | None = None

    def __post_init__(self) -> None:
        self.degrees.check(self.job.config.num_heads)

    @cached_property
    def room(self) -> int:
        """Bytes that can be used on a GPU."""
        return round((1 - SPARE) * self.gpu.memory)

    @cached_property
    def policy(self) -> Policy:
        return solve(self.job, self.degrees, self.gpu, self.rates, self.wanted, self.room, self.gpu.host, self.gamma)

    @cached_property
    def memory(self) -> Memory:
        return memory(self.job, self.degrees, self.policy, self.gamma)

    @cached_property
    def timing(self) -> Timing:
        return timing(self.job, self.degrees, self.policy, self.gpu, self.rates)

    @property
    def fits(self) -> bool:
        return self.memory.total <= self.room and self.memory.host <= self.gpu.host

    @property
    def global_batch(self) -> int:
        """Samples of a step."""
        return self.degrees.data_ranks * self.job.micro_batch * self.job.accumulate

    @property
    def seconds_per_sample(self) -> float:
        return self.timing.step / self.global_batch

    def warnings(self) -> list[str]:
        """What works and is slow or wasteful; what is asked of the host."""
        found = self.degrees.warnings(self.job.config.num_heads, self.job.count(self.job.largest))
        if self.memory.host > self.gpu.host:
            found.append(
                f"{self.memory.host / 1e9:.0f} GB a GPU wait in the host's memory, which has {self.gpu.host / 1e9:.0f} GB for each "
                f"({self.degrees.per_machine} GPUs a machine): offload fewer blocks, or recompute them"
            )
        return found

    def changed(self, **fields: object) -> Plan:
        return replace(self, **fields)  # type: ignore[arg-type]

"""The fastest layout that fits, of all there are with what is given."""

from __future__ import annotations

from .degrees import Degrees, ways
from .plan import Plan


def choose(plan: Plan, ulysses: int | None, ring: int | None, fsdp: int | None) -> Plan:
    """`plan` with its degrees of parallelism chosen where they are None, the count of GPUs as it is.

    Of those that fit, the least time a sample; of those equally fast within 1 %, the one that shares a sample between the fewest
    GPUs, then the one that leaves the most memory. Where none fits, the one that takes the least memory.
    ValueError where what is given does not divide.
    """
    base, heads = plan.degrees, plan.job.config.num_heads
    Degrees(base.gpus, ulysses or 1, ring or 1, fsdp or _least(ulysses, ring), base.per_machine).check(heads)
    found = [plan.changed(degrees=degrees) for degrees in ways(base.gpus, heads, base.per_machine, ulysses, ring, fsdp)]
    fitting = [each for each in found if each.fits]
    if not fitting:
        return min(found, key=lambda each: each.memory.total)
    fastest = min(each.seconds_per_sample for each in fitting)
    close = [each for each in fitting if each.seconds_per_sample <= 1.01 * fastest]
    return min(close, key=lambda each: (each.degrees.context, each.memory.total))


def _least(ulysses: int | None, ring: int | None) -> int:
    return (ulysses or 1) * (ring or 1)

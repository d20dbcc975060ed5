"""How GPUs share the work, checked, and all the ways in which they can.

Processes have the coordinates (data, ring, ulysses), the last one innermost. Weights are split over `fsdp` neighbours, a group that
contains whole context parallel groups or lies in one, as in the report (section 4.3): 128 GPUs are 4 copies of the weights (DP) of 32
shards each, and a group of 32 is 2 samples of Ulysses 8 x Ring 2.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass


@dataclass(frozen=True)
class Degrees:
    """gpus = dp x fsdp, and also data ranks x ring x ulysses."""

    gpus: int = 1
    ulysses: int = 1
    ring: int = 1
    fsdp: int = 1
    per_machine: int = 8

    @property
    def context(self) -> int:
        """GPUs that share a sample."""
        return self.ulysses * self.ring

    @property
    def dp(self) -> int:
        """Copies of the weights."""
        return self.gpus // self.fsdp

    @property
    def data_ranks(self) -> int:
        """Samples in flight, at a micro-batch of one."""
        return self.gpus // self.context

    def check(self, heads: int) -> None:
        """ValueError that says what does not divide, and which degrees do."""
        if min(self.gpus, self.ulysses, self.ring, self.fsdp) < 1:
            raise ValueError(f"degrees must be at least 1, got {self}")
        if heads % self.ulysses:
            fitting = ", ".join(map(str, divisors(heads)[1:]))
            inner = max(u for u in divisors(heads) if self.ulysses % u == 0)
            raise ValueError(
                f"{heads} attention heads do not divide by Ulysses {self.ulysses}: use {fitting}, and a ring for the rest "
                f"(such as Ulysses {inner} x Ring {self.ulysses // inner})"
            )
        if self.gpus % self.context:
            raise ValueError(
                f"{self.gpus} GPUs do not divide by Ulysses {self.ulysses} x Ring {self.ring} = {self.context}: "
                f"use {self.gpus - self.gpus % self.context or self.context} GPUs, or degrees that multiply to one of {_listed(self.gpus)}"
            )
        if self.gpus % self.fsdp:
            raise ValueError(f"{self.gpus} GPUs are no whole number of FSDP groups of {self.fsdp}: use one of {_listed(self.gpus)}")
        if self.fsdp % self.context and self.context % self.fsdp:
            sizes = [size for size in divisors(self.gpus) if size % self.context == 0 or self.context % size == 0]
            raise ValueError(
                f"FSDP {self.fsdp} must be a multiple or a divisor of Ulysses x Ring = {self.context}, whose group it contains: "
                f"use one of {', '.join(map(str, sizes))}"
            )

    def warnings(self, heads: int, tokens: int) -> list[str]:
        """What works and is slow or wasteful, with what to do."""
        found = []
        if self.ulysses > self.per_machine:
            found.append(
                f"Ulysses {self.ulysses} crosses machines of {self.per_machine} GPUs, and nothing hides its all-to-all: "
                f"Ulysses {max(u for u in divisors(heads) if u <= self.per_machine and self.ulysses % u == 0)} and a ring between machines"
            )
        elif self.per_machine % self.ulysses and self.gpus > self.per_machine:
            found.append(f"Ulysses {self.ulysses} does not divide the {self.per_machine} GPUs of a machine: some groups cross machines")
        if waste := padded(tokens, self.context) - tokens:
            found.append(f"{tokens:,} tokens are padded by {waste} to divide by {self.context} GPUs ({waste / tokens:.2%} more work)")
        if self.context > 1 and tokens // self.context < 1024:
            found.append(f"only {tokens // self.context} tokens a GPU: communication will not hide; share a sample between fewer GPUs")
        return found


def padded(tokens: int, context: int) -> int:
    """Tokens that divide by the GPUs that share them."""
    return -(-tokens // context) * context


def ways(gpus: int, heads: int, per_machine: int, ulysses: int | None, ring: int | None, fsdp: int | None) -> Iterator[Degrees]:
    """All layouts with what is given; Ulysses stays within a machine where it is chosen."""
    for u in divisors(gpus) if ulysses is None else [ulysses]:
        if heads % u or (ulysses is None and u > per_machine):
            continue
        for r in divisors(gpus) if ring is None else [ring]:
            if gpus % (u * r):
                continue
            for f in divisors(gpus) if fsdp is None else [fsdp]:
                if gpus % f == 0 and (f % (u * r) == 0 or u * r % f == 0):
                    yield Degrees(gpus, u, r, f, per_machine)


def divisors(number: int) -> list[int]:
    return [size for size in range(1, number + 1) if number % size == 0]


def _listed(number: int) -> str:
    return ", ".join(map(str, divisors(number)))

"""What to change where a plan does not fit: which changes help, by how much, and what they cost."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from .degrees import Degrees, divisors
from .job import PACKED, Bucket, Job
from .plan import Plan
from .policy import Wanted


@dataclass(frozen=True)
class Suggestion:
    """what: in words, with options; saves: bytes a GPU; fits: whether it is enough alone; slower: time a sample, as a factor."""

    what: str
    saves: int
    fits: bool
    slower: float


def suggestions(plan: Plan) -> list[Suggestion]:
    """Single changes that save memory: those that are enough alone first, then by what they save."""
    now, solved = plan.memory.total, Wanted(plan.policy.count("recompute"), plan.policy.count("offload"))
    found = []
    for what, other in changes(plan):
        same = other if other.wanted != plan.wanted else other.changed(wanted=solved)  # room that a change makes is not filled again
        saves = now - same.memory.total
        if saves > 0:
            found.append(Suggestion(what, saves, other.fits, other.seconds_per_sample / plan.seconds_per_sample))
    return sorted(found, key=lambda each: (not each.fits, -each.saves))


def together(plan: Plan) -> list[str] | None:
    """Changes that fit one after the other, the one that saves most first: none to what is trained on where those are enough.

    None where all are not enough.
    """
    return _greedy(plan, data=False) or _greedy(plan, data=True)


def _greedy(plan: Plan, data: bool) -> list[str] | None:
    taken: list[str] = []
    job, gpus = plan.job, plan.degrees.gpus
    while not plan.fits:
        offers = [each for each in changes(plan) if each[1].job.lora == job.lora and each[1].degrees.gpus == gpus]
        offers = [each for each in offers if each[1].job.buckets == plan.job.buckets] or (offers if data else [])
        best = min(offers, key=lambda each: each[1].memory.total, default=None)
        if best is not None and best[1].memory.total >= plan.memory.total and data:
            best = min((e for e in changes(plan) if e[1].job.buckets != plan.job.buckets), key=lambda e: e[1].memory.total, default=None)
        if best is None or best[1].memory.total >= plan.memory.total:
            return None
        taken.append(best[0])
        plan = best[1]
    return taken


def changes(plan: Plan) -> Iterator[tuple[str, Plan]]:
    """Each change there is, in words, and the plan with it."""
    yield from _of_layout(plan)
    yield from _of_activations(plan)
    yield from _of_states(plan)
    yield from _of_data(plan)


def _of_layout(plan: Plan) -> Iterator[tuple[str, Plan]]:
    degrees, heads = plan.degrees, plan.job.config.num_heads
    wider = [size for size in divisors(degrees.gpus) if size > degrees.fsdp and size % degrees.context == 0]
    for size in sorted({wider[0], wider[-1]}) if wider else []:
        yield f"split the weights over {size} GPUs: --fsdp {size}", plan.changed(degrees=_with(plan, fsdp=size))
    for u in (u for u in divisors(heads) if u > degrees.ulysses and u <= degrees.per_machine):
        if degrees.gpus % (u * degrees.ring) == 0 and _divide(degrees.fsdp, u * degrees.ring):
            yield f"share a sample between {u * degrees.ring} GPUs: --ulysses {u}", plan.changed(degrees=_with(plan, ulysses=u))
            break
    r = 2 * degrees.ring
    if degrees.gpus % (degrees.ulysses * r) == 0 and _divide(degrees.fsdp, degrees.ulysses * r):
        yield f"share a sample between {degrees.ulysses * r} GPUs: --ring {r}", plan.changed(degrees=_with(plan, ring=r))
    if degrees.fsdp == degrees.gpus:
        more = _with(plan, gpus=2 * degrees.gpus, fsdp=2 * degrees.fsdp)
        yield f"twice the GPUs: --gpus {more.gpus} --fsdp {more.fsdp}", plan.changed(degrees=more)


def _of_activations(plan: Plan) -> Iterator[tuple[str, Plan]]:
    job = plan.job
    if plan.policy.count("recompute") < job.blocks:
        yield "compute every block again: --checkpointing full", plan.changed(wanted=Wanted(job.blocks, 0))
    if plan.wanted != Wanted():
        yield "keep, offload or recompute as it fits: --checkpointing auto", plan.changed(wanted=Wanted())
    if job.micro_batch > 1:
        turns = job.accumulate * job.micro_batch
        changed = job.changed(micro_batch=1, accumulate=turns)
        yield f"a sample at a time: --micro-batch 1 --accumulate {turns}", plan.changed(job=changed)


def _of_states(plan: Plan) -> Iterator[tuple[str, Plan]]:
    job = plan.job
    if job.optimiser == "adamw":
        yield "moments in 8 bits: --optimiser adamw8bit", plan.changed(job=job.changed(optimiser="adamw8bit"))
    if job.ema:
        yield "no averaged weights: leave out --ema", plan.changed(job=job.changed(ema=False))
    if job.precision == "fp32" and not job.lora:
        yield "products in bf16: --precision bf16", plan.changed(job=job.changed(precision="bf16"))
    if job.precision == "autocast":
        yield "weights gathered in bf16, none cached: --precision bf16 with FSDP", plan.changed(job=job.changed(precision="bf16"))
    if not job.lora:
        yield "adapters in place of all weights: --lora 32", plan.changed(job=job.changed(lora=32, base="bf16"))
        yield (
            "adapters on a base in 8 bits: --lora 32 --base fp8",
            plan.changed(job=job.changed(lora=32, base="fp8", precision="bf16"), wanted=Wanted(job.blocks, 0)),
        )
    elif job.base not in PACKED:
        yield "the frozen weights in 8 bits: --base fp8", plan.changed(job=job.changed(base="fp8"))
    if job.lora and job.swapped < job.blocks:
        most = job.blocks
        enough = next((k for k in range(job.swapped + 1, most) if plan.changed(job=job.changed(swapped=k)).fits), most)
        yield f"{enough} blocks wait in the host's memory: --block-swap {enough}", plan.changed(job=job.changed(swapped=enough))


def _of_data(plan: Plan) -> Iterator[tuple[str, Plan]]:
    job = plan.job
    largest, time = job.largest, job.config.stride[0]
    turns = (largest.frames - 1) // time
    for frames in (1 + time * (turns * part // 4) for part in (3, 2, 1)):
        if frames < largest.frames:
            shorter = plan.changed(job=_limited(job, largest.size, frames))
            if shorter.fits or frames == 1 + time * (turns // 4):
                yield f"shorter clips: --frames {frames}", shorter
                break
    grid = [stride * patch for stride, patch in zip(job.config.stride[:0:-1], job.config.patch_size[:0:-1], strict=True)]
    for share in (0.75, 0.5):
        width, height = (max(step, round(share * side / step) * step) for side, step in zip(largest.size, grid, strict=True))
        smaller = plan.changed(job=_limited(job, (width, height), largest.frames))
        if smaller.fits or share == 0.5:
            yield f"smaller pictures: --size {width}x{height}", smaller
            break


def _limited(job: Job, size: tuple[int, int], frames: int) -> Job:
    """No bucket larger or longer than that."""
    area = size[0] * size[1]
    buckets = (Bucket(size if b.size[0] * b.size[1] > area else b.size, min(b.frames, frames), b.share) for b in job.buckets)
    return job.changed(buckets=tuple(buckets))


def _with(plan: Plan, **fields: int) -> Degrees:
    return replace(plan.degrees, **fields)


def _divide(a: int, b: int) -> bool:
    return a % b == 0 or b % a == 0

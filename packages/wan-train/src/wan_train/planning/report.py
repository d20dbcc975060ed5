"""A plan as a record, and in words."""

from __future__ import annotations

from typing import Any

from wan_dit._shared.amounts import in_words
from wan_dit._shared.cli import show
from wan_dit.plan import operations, parameters

from .advice import suggestions, together
from .plan import Plan
from .work import Flops, flops, traffic


def record(plan: Plan) -> dict[str, Any]:
    """Everything a plan says, in bytes, seconds and floating-point operations; suggestions are there where it does not fit."""
    job, degrees, found, time = plan.job, plan.degrees, plan.memory, plan.timing
    again = plan.policy.count("recompute")
    each = flops(job, job.largest, again)
    offers = suggestions(plan) if not plan.fits else []
    return {
        "gpu": plan.gpu.name,
        "layout": {
            "gpus": degrees.gpus, "ulysses": degrees.ulysses, "ring": degrees.ring, "fsdp": degrees.fsdp, "dp": degrees.dp,
            "data_ranks": degrees.data_ranks, "micro_batch": job.micro_batch, "accumulate": job.accumulate,
            "global_batch": plan.global_batch,
        },
        "parameters": parameters(job.config).total,
        "trained": job.trained,
        "buckets": [
            {"size": list(bucket.size), "frames": bucket.frames, "share": bucket.share, "tokens": job.count(bucket)}
            for bucket in job.buckets
        ],
        "memory": {"total": found.total, "room": plan.room, "host": found.host, **{term.name: term.size for term in found.terms}},
        "fits": plan.fits,
        "policy": list(plan.policy),
        "flops": {
            "forward": each.forward, "model": each.model, "run": each.run, "attention": _attention(plan),
        },
        "traffic": vars(traffic(job, degrees, job.largest, again)),
        "seconds": {
            "step": time.step, "compute": time.compute, "optimiser": time.optimiser, "exposed": time.exposed,
            "per_sample": plan.seconds_per_sample,
        },
        "rates": {"products": plan.rates.products, "attention": plan.rates.attention},
        "mfu": time.mfu,
        "warnings": plan.warnings(),
        "suggestions": [vars(offer) for offer in offers],
        "together": together(plan) if not plan.fits else [],
    }  # fmt: skip


def _attention(plan: Plan) -> float:
    """Share of attention in the operations of a forward."""
    job = plan.job
    found = operations(job.config, job.count(job.largest))
    return found.attention / (found.attention + found.products + found.context)


def tell(plan: Plan, name: str, chosen: bool, verified: dict[str, Any] | None) -> None:
    """Print a plan; chosen: whether the layout was."""
    _tell_job(plan, name, chosen)
    _tell_memory(plan)
    _tell_time(plan)
    for warning in plan.warnings():
        print(f"warning: {warning}")
    if not plan.fits:
        _tell_advice(plan)
    if verified is not None:
        _tell_verified(verified)


def _tell_job(plan: Plan, name: str, chosen: bool) -> None:
    job, degrees = plan.job, plan.degrees
    total = parameters(job.config).total
    trained = f"{job.trained:,} of them trained (LoRA {job.lora})" if job.lora else "all trained"
    print(f"{name}: {total:,} parameters, {trained}; {job.precision}, {job.optimiser}{', averaged weights' if job.ema else ''}")
    for bucket in job.buckets:
        share = f" ({bucket.share / sum(b.share for b in job.buckets):.0%} of the samples)" if len(job.buckets) > 1 else ""
        print(f"{bucket.size[0]}x{bucket.size[1]}, {bucket.frames} frames: {job.count(bucket):,} tokens{share}")
    of = "chosen" if chosen else "given"
    print(
        f"{degrees.gpus} x {plan.gpu.name}, layout {of}: DP {degrees.dp} x FSDP {degrees.fsdp}, of which Ulysses {degrees.ulysses} x Ring "
        f"{degrees.ring} share a sample; micro-batch {job.micro_batch}, accumulated {job.accumulate}: global batch {plan.global_batch}\n"
    )


def _tell_memory(plan: Plan) -> None:
    found = plan.memory
    rows = [{"memory of a GPU": term.name, "size": in_words(term.size), "what": term.what} for term in found.terms if term.size]
    show(rows, as_json=False)
    verdict = "fits" if plan.fits else "does not fit: it would run out of memory"
    print(f"\nthe most at a time: {in_words(found.total)} of {in_words(plan.room)} that can be used: {verdict}")
    if found.host:
        print(f"in the host's memory, of each GPU: {in_words(found.host)}")


def _tell_time(plan: Plan) -> None:
    time, job = plan.timing, plan.job
    each: Flops = flops(job, job.largest, plan.policy.count("recompute"))
    print(
        f"a sample: {_tera(each.forward)} TFLOP forward ({_attention(plan):.1%} attention), {_tera(each.model)} to train, "
        f"{_tera(each.run)} computed"
    )
    waits = ", ".join(f"{name} {_number(value)} s" for name, value in time.exposed.items() if value > 1e-3 * time.step)
    print(
        f"a step: {_number(time.step)} s, of it computing {_number(time.compute)} s"
        + (f", waiting for {waits}" if waits else "")
        + f"; MFU {time.mfu:.1%}, at {_tera(plan.rates.products)} TFLOP/s in products and {_tera(plan.rates.attention)} in attention"
    )


def _tell_advice(plan: Plan) -> None:
    over = plan.memory.total - plan.room
    largest = sorted((term for term in plan.memory.terms if term.size), key=lambda term: -term.size)[:3]
    if over > 0:
        print(f"\n{in_words(over)} too much; the largest: {', '.join(f'{term.name} {in_words(term.size)}' for term in largest)}")
    rows = [
        {
            "change": offer.what,
            "saves": in_words(offer.saves),
            "enough": "yes" if offer.fits else "no",
            "time": f"x {offer.slower:.2f}",
        }
        for offer in suggestions(plan)
    ]
    show(rows, as_json=False, empty="no single change helps")
    if rows and rows[0]["enough"] == "no":
        steps = together(plan)
        print(f"together enough: {'; '.join(steps)}" if steps else "all of what keeps the job as it is together is not enough")


def _tell_verified(verified: dict[str, Any]) -> None:
    print(
        f"built on {verified['gpus']} fake processes: rank 0 holds {in_words(verified['local'])} of parameters, "
        f"planned {in_words(verified['planned'])} ({verified['ratio'] - 1:+.2%})"
    )


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _tera(value: float) -> str:
    return _number(value / 1e12)

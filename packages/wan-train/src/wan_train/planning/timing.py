"""Seconds of a step: what is computed at a given rate, and the communication that it cannot hide.

Ulysses waits for its all-to-all; a ring sends while it attends; FSDP gathers the next block's weights while one runs. The longest of
each pair counts. Data is taken to be at hand, and encodings to be cached.
"""

from __future__ import annotations

from dataclasses import dataclass

from wan_dit.plan import operations, parameters
from wan_dit.run_plan import Rates

from .degrees import Degrees
from .gpus import EFFICIENCY, Gpu
from .job import Bucket, Job
from .memory import Policy, blocks_of, precise, shape_of
from .work import FLASH, flops, forward_traffic, traffic

MERGED = 16  # bytes a number that merging one part into a result takes, read and written in fp32; three times that in the backward
HIDDEN = 3  # blocks of forward that may hide the transfer of one (report, section 4.3.4)


@dataclass(frozen=True)
class Block:
    """Seconds of the forward of one block on one GPU, of a turn."""

    products: float
    attention: float
    ulysses: float
    ring: float
    merge: float
    gather: float

    @property
    def run(self) -> float:
        """With what cannot be hidden."""
        computed = self.products + max(self.attention, self.ring) + self.merge + self.ulysses
        return max(computed, self.gather)

    @property
    def computed(self) -> float:
        return self.products + self.attention


@dataclass(frozen=True)
class Timing:
    """Seconds of a mean step over the buckets.

    compute: products and attention, recomputed ones too; exposed: communication, by kind; optimiser; mfu: of the GPU's peak, model FLOPs
    """

    compute: float
    exposed: dict[str, float]
    optimiser: float
    mfu: float

    @property
    def step(self) -> float:
        return self.compute + sum(self.exposed.values()) + self.optimiser


def default_rates(gpu: Gpu, precision: str) -> Rates:
    """A share of the peak; fp32 runs without the matrix units, at about a sixteenth."""
    rate = EFFICIENCY * gpu.peak / (16 if precision == "fp32" else 1)
    return Rates(rate, rate)


def bandwidth(degrees: Degrees, gpu: Gpu, span: int) -> float:
    """Of a group of neighbours that reaches over `span` GPUs."""
    return gpu.inside if span <= degrees.per_machine else gpu.between


def block_time(job: Job, degrees: Degrees, bucket: Bucket, gpu: Gpu, rates: Rates) -> Block:
    """Of a bucket."""
    job = precise(job, degrees)
    own = shape_of(job, degrees, bucket).own
    each = operations(job.config, job.count(bucket)).attention / job.blocks / degrees.context * job.micro_batch
    sent = forward_traffic(job, degrees, bucket)
    weights = job.block_parameters * (4 if job.precision == "autocast" else job.width)
    if job.lora:
        weights = job.frozen()[0] // job.blocks if job.splits else 0
    shards = degrees.fsdp
    return Block(
        products=2 * parameters(job.config).piece * own / rates.products,
        attention=each / rates.attention,
        ulysses=sent.ulysses / bandwidth(degrees, gpu, degrees.ulysses),
        ring=sent.ring / bandwidth(degrees, gpu, degrees.context),
        merge=own * job.config.dim * MERGED * degrees.ring / gpu.hbm if degrees.ring > 1 else 0.0,
        gather=weights * (shards - 1) / shards / bandwidth(degrees, gpu, shards),
    )


def timing(job: Job, degrees: Degrees, policy: Policy, gpu: Gpu, rates: Rates) -> Timing:
    """Of the mix of buckets, each with its share of the steps."""
    total = sum(bucket.share for bucket in job.buckets)
    steps = [(_step(job, degrees, policy, bucket, gpu, rates), bucket) for bucket in job.buckets]
    compute = sum(bucket.share * step[0] for step, bucket in steps) / total
    exposed = {name: sum(bucket.share * step[1][name] for step, bucket in steps) / total for name in steps[0][0][1]}
    job = precise(job, degrees)
    states = (2 * job.moments + (8 + 4 + 8 * job.ema) * job.trained) / degrees.fsdp  # read and written
    samples = degrees.data_ranks * job.micro_batch * job.accumulate
    model = sum(bucket.share * flops(job, bucket).model for bucket in job.buckets) / total
    optimiser = states / gpu.hbm
    step = compute + sum(exposed.values()) + optimiser
    return Timing(compute, exposed, optimiser, samples * model / (step * gpu.peak * degrees.gpus))


def _step(job: Job, degrees: Degrees, policy: Policy, bucket: Bucket, gpu: Gpu, rates: Rates) -> tuple[float, dict[str, float]]:
    """Seconds of computing, and those that each kind of communication adds, of all turns of a step of one bucket."""
    job = precise(job, degrees)
    again, turns = policy.count("recompute"), job.accumulate
    run = flops(job, bucket, again)
    compute = turns * job.micro_batch / degrees.context * (run.run_products / rates.products + run.run_attention / rates.attention)
    one, sent = block_time(job, degrees, bucket, gpu, rates), traffic(job, degrees, bucket, again)
    backward = 2 * one.products + FLASH * one.attention
    forwards = turns * (job.blocks + again)
    ring = sent.ring / turns / bandwidth(degrees, gpu, degrees.context) - one.ring * (job.blocks + again)  # of the backward
    back = max(0.0, ring / job.blocks - FLASH * one.attention) + 3 * one.merge
    gathers = turns * job.blocks * (max(0.0, one.gather - one.computed) + max(0.0, one.gather - backward))
    _, _, brought = job.frozen()
    swap = brought / gpu.pcie / max(1, job.blocks)
    exposed = {
        "ulysses": sent.ulysses / bandwidth(degrees, gpu, degrees.ulysses),
        "ring": forwards * (max(0.0, one.ring - one.attention) + one.merge) + turns * job.blocks * back,
        "trunk": sent.trunk / bandwidth(degrees, gpu, degrees.context),
        "fsdp": gathers + max(0.0, sent.reduce_scatter / bandwidth(degrees, gpu, degrees.fsdp) - turns * job.blocks * backward),
        "dp": sent.all_reduce / bandwidth(degrees, gpu, degrees.gpus),
        "offload": turns * exposed_offload(job, degrees, policy, bucket, gpu, one),
        "swap": turns * job.blocks * (max(0.0, swap - one.computed) + max(0.0, swap - backward)),
    }
    return compute, exposed


def exposed_offload(job: Job, degrees: Degrees, policy: Policy, bucket: Bucket, gpu: Gpu, one: Block) -> float:
    """Seconds of transfers, out and back, that the forward and the backward of all blocks are too short for."""
    moved = policy.count("offload") * blocks_of(job, degrees, bucket).block / gpu.pcie
    return 2 * max(0.0, moved - job.blocks * one.run)

"""Floating-point operations and bytes on the wire of one step."""

from __future__ import annotations

from dataclasses import dataclass

from wan_dit.plan import operations, parameters

from .degrees import Degrees
from .job import Bucket, Job

FLASH = 2.5  # the backward of a flash kernel, in forwards: it computes the scores again


@dataclass(frozen=True)
class Flops:
    """Operations of one sample: of products and of attention, two a multiplication and addition.

    forward: of the whole model, encoding of the context too; model: with the backward, as MFU counts it; run: what is computed
    """

    forward: int
    model: int
    run_products: int
    run_attention: float

    @property
    def run(self) -> float:
        return self.run_products + self.run_attention


def flops(job: Job, bucket: Bucket, recomputed: int = 0) -> Flops:
    """Of a sample; recomputed: blocks whose forward runs again.

    A backward takes two products for each of the forward, one where the weights are frozen or the input needs no gradient.
    """
    config, count = job.config, job.count(bucket)
    found = operations(config, count)
    products, attention = found.products + found.context, found.attention
    adapters = 2 * job.adapters * count
    backward = products + 2 * adapters if job.lora else 2 * products - _inputs(job, count)
    again = recomputed * (2 * parameters(config).piece * count + attention // job.blocks)
    forward = products + attention + adapters
    run = products + adapters + backward + again - recomputed * (attention // job.blocks)
    attended = attention * (1 + FLASH + recomputed / job.blocks)
    return Flops(forward, forward + backward + 2 * attention, run, attended)


def _inputs(job: Job, count: int) -> int:
    """Operations for gradients of inputs that need none: of patches, times and text."""
    config, (p, q, r) = job.config, job.config.patch_size
    channels = config.in_dim + (config.vace_in_dim if config.vace_layers else 0)
    return 2 * config.dim * (p * q * r * channels * count + config.freq_dim + config.text_len * config.text_dim)


@dataclass(frozen=True)
class Traffic:
    """Bytes that one GPU sends in a step, by collective; trunk: its result, gathered on every GPU that shares a sample."""

    ulysses: float
    ring: float
    trunk: float
    all_gather: float
    reduce_scatter: float
    all_reduce: float


def traffic(job: Job, degrees: Degrees, bucket: Bucket, recomputed: int = 0) -> Traffic:
    """Of all turns of a step. A recomputed block exchanges what its forward does once more."""
    config, width, turns = job.config, job.width, job.accumulate
    r, n = degrees.ring, degrees.fsdp
    one = forward_traffic(job, degrees, bucket)
    blocks = job.blocks
    ring_backward = one.ring + 4 / width * one.ring * (r / (r - 1)) if r > 1 else 0.0  # gradients in fp32, and one hop further
    whole = job.count(bucket) * job.micro_batch * config.dim * 4
    trained, weights = job.trained, parameters(config).total
    gathered = (4 if job.precision == "autocast" else width) * weights
    if job.lora:
        gathered = (job.frozen()[0] if job.splits else 0) + width * trained
    return Traffic(
        ulysses=turns * one.ulysses * (2 * blocks + recomputed),
        ring=turns * (one.ring * (blocks + recomputed) + ring_backward * blocks),
        trunk=turns * 2 * whole * (degrees.context - 1) / degrees.context,
        all_gather=turns * 2 * gathered * (n - 1) / n,
        reduce_scatter=(1 if job.held_gradients else turns) * 4 * trained * (n - 1) / n,
        all_reduce=2 * 4 * trained / n * (degrees.dp - 1) / degrees.dp,
    )


@dataclass(frozen=True)
class BlockTraffic:
    """Bytes that one GPU sends in the forward of a block: all-to-all of q, k, v and the result; keys and values on all their hops."""

    ulysses: float
    ring: float


def forward_traffic(job: Job, degrees: Degrees, bucket: Bucket) -> BlockTraffic:
    """Of one turn and one block."""
    own = -(-job.count(bucket) // degrees.context) * job.micro_batch
    each = job.width * own * job.config.dim
    return BlockTraffic(4 * each * (degrees.ulysses - 1) / degrees.ulysses, 2 * each * (degrees.ring - 1))

"""Bytes that autograd keeps of a block and of the layers around the blocks, counted off `wan_dit.model` and measured in `measured`.

A block keeps for each token `width` bytes for each of its d channels and `hidden` for each of the f of its feed-forward layer: 62 d + 4 f
in bf16, which is 73 d for the 14B model (the report: "gamma can exceed 60"). Norms, rotations, gates and the residual stream are fp32,
which is most of it. A fused or compiled block keeps less: measure it, and give the number.
"""

from __future__ import annotations

from dataclasses import dataclass

from .job import PACKED, Job


@dataclass(frozen=True)
class Kept:
    """width, hidden: bytes of a block for each token and channel, d and f
    boundary: the same of its input, which is all that recomputation keeps
    context: of its keys and values, for each row of the prompt and channel
    """

    width: float
    hidden: float
    boundary: float = 4.0
    context: float = 12.0


KEPT = {"fp32": Kept(80, 8, context=16), "bf16": Kept(62, 4), "autocast": Kept(66, 4)}
ADAPTED = {  # under a LoRA: no gradients of gates, modulations and the gains of norms, so less is kept for them
    "fp32": Kept(60, 8, context=12), "bf16": Kept(42, 4, context=8), "autocast": Kept(46, 4, context=8),
}  # fmt: skip
PER_SAMPLE = 8.0  # more for each token and channel where every sample has its own time: the two norms without scale and shift


def kept(job: Job, gamma: float | None = None) -> Kept:
    """Of a job; gamma: bytes of a whole block for each token and channel, measured elsewhere, in place of those counted."""
    found = (ADAPTED if job.lora else KEPT)[job.precision]
    return found if gamma is None else Kept(gamma, 0.0, found.boundary, found.context)


@dataclass(frozen=True)
class Shape:
    """Of a turn on one GPU: tokens that it has in the blocks, all of them, which the layers around see, and rows of the prompts."""

    own: int
    whole: int
    rows: int


def block_bytes(job: Job, shape: Shape, counts: Kept, *, ulysses: bool = False) -> float:
    """Of one block that is kept as it is."""
    d, f, heads = job.config.dim, job.config.ffn_dim, job.config.num_heads
    each = counts.width * d + counts.hidden * f + 8 * heads + 36  # log-sum-exps of two attentions; statistics of six norms
    each += PER_SAMPLE * d if job.times else 0
    each += job.width * d if ulysses else 0  # attention's result, before and after its heads come home
    each += 8 * job.lora * job.width
    return shape.own * each


def boundary_bytes(job: Job, shape: Shape, counts: Kept) -> float:
    """Of the input of one block."""
    return shape.own * counts.boundary * job.config.dim


def context_bytes(job: Job, shape: Shape, counts: Kept) -> float:
    """Of the keys and values of all blocks and of the prompt's projection."""
    d, config = job.config.dim, job.config
    once = shape.rows * (config.text_dim * job.width + 4 * d * job.width)
    return once + job.blocks * shape.rows * counts.context * d


def head_bytes(job: Job, shape: Shape) -> float:
    """Of the trunk's result and its norm before the head, fp32: whole samples on every GPU, since the blocks alone are split."""
    return shape.whole * (8 + 4 * job.times) * job.config.dim


def around_bytes(job: Job, shape: Shape) -> float:
    """Of patches, rotations and times; where tokens are split, of the trunk's whole input besides, of which a part is used."""
    d, config = job.config.dim, job.config
    each = 16 * (config.in_dim + 2 * config.out_dim) + 4 * config.head_dim
    split = 4 * d if shape.own < shape.whole else 0
    return shape.whole * (each + split) - shape.own * split


def backward_bytes(job: Job, shape: Shape, counts: Kept) -> float:
    """What the backward of a block makes beside what is kept: gradients of the stream, or of the feed-forward layer where that is wide.

    A weight in 8 bits is unpacked for its product, one at a time.
    """
    d, f = job.config.dim, job.config.ffn_dim
    unpacked = (4 + job.width % 4) * d * f if job.base in PACKED and job.lora else 0  # in fp32, and in the type of products
    return shape.own * max(4 * counts.boundary * d, job.width * f + 4 * d) + unpacked

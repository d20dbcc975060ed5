"""Bytes on one GPU at the peak of a step, term by term, and in the memory of its machine."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from wan_dit.plan import CLIP_TOKENS, parameters

from .degrees import Degrees, padded
from .job import Bucket, Job
from .saved import (
    Shape,
    around_bytes,
    backward_bytes,
    block_bytes,
    boundary_bytes,
    context_bytes,
    head_bytes,
    kept,
)  # fmt: skip

Choice = Literal["keep", "offload", "recompute"]
Policy = tuple[Choice, ...]
NAMES: dict[Choice, str] = {"keep": "kept", "offload": "offloaded", "recompute": "recomputed"}
RUNTIME = 1_500_000_000  # bytes of the CUDA context, NCCL's buffers and cuBLAS' workspaces; an estimate


@dataclass(frozen=True)
class Term:
    """Bytes of one kind, and what they are."""

    name: str
    size: int
    what: str


@dataclass(frozen=True)
class Memory:
    """terms: on a GPU; host: bytes in the host's memory, of one GPU's share."""

    terms: tuple[Term, ...]
    host: int

    @property
    def total(self) -> int:
        return sum(term.size for term in self.terms)

    def size(self, name: str) -> int:
        return sum(term.size for term in self.terms if term.name == name)


def precise(job: Job, degrees: Degrees) -> Job:
    """bf16 is FSDP's mixed precision where weights are sharded, or that of a frozen base; without either it is autocast."""
    return job.changed(precision="autocast") if job.precision == "bf16" and degrees.fsdp == 1 and not job.lora else job


def shape_of(job: Job, degrees: Degrees, bucket: Bucket) -> Shape:
    """Tokens of a turn."""
    count, config = job.count(bucket), job.config
    images = 0 if config.image_dim is None else config.pos_embed_seq_len or CLIP_TOKENS
    own = padded(count, degrees.context) // degrees.context
    return Shape(own * job.micro_batch, count * job.micro_batch, (config.text_len + images) * job.micro_batch)


def states(job: Job, degrees: Degrees) -> list[Term]:
    """What stays from step to step, and the weights that are gathered while a block runs."""
    found, shards = parameters(job.config), degrees.fsdp
    linear = found.running + found.context
    (device, _, _), held = job.frozen(), shards if job.splits else 1
    gathered = job.width if job.precision != "autocast" else 4
    whole = 4 * job.trained if job.held_gradients and job.accumulate > 1 and shards > 1 else 0
    window = 0
    if shards > 1 and job.lora:
        window = round(2 * device / job.blocks) if job.splits else 0
    elif shards > 1:  # a block that runs, one that arrives, gradients of one that are reduced in fp32; what is in no block stays gathered
        window = job.block_parameters * (2 * gathered + gathered + 4) + 4 * job.outside
    copies = 2 * linear if job.precision == "autocast" and not job.lora else 0
    return [
        Term("parameters", 4 * job.trained // shards, f"{job.trained:,} in fp32 over {shards}"),
        Term("base", device // held, f"frozen weights in {job.base} over {held}"),
        Term("gradients", 4 * job.trained // shards + whole, "fp32" + (", whole between the turns of a step" if whole else "")),
        Term("optimiser", round(job.moments / shards), job.optimiser),
        Term("ema", 4 * job.trained // shards if job.ema else 0, "averaged weights in fp32"),
        Term("window", window, "gathered weights of two blocks and what is in no block, gradients of one"),
        Term("copies", copies, "weights in bf16 that autocast caches"),
    ]


@dataclass(frozen=True)
class Blocks:
    """Bytes of activations on a GPU, of any policy.

    block, input: of one block that is kept, and of its input; head: of the layers behind the blocks
    work: what the backward of a block makes besides
    """

    block: float
    input: float
    head: float
    work: float

    def kept(self, policy: Sequence[Choice]) -> float:
        return sum(self._size(choice) for choice in policy)

    def backward(self, policy: Sequence[Choice]) -> float:
        """How much more there is at the worst moment: at the head, when all blocks are kept; or at a block, when those behind it are gone.

        A block that was dropped or moved is there again as a whole in its backward.
        """
        kept, most, before = self.kept(policy), 2 * self.head, 0.0
        for choice in policy:
            before += self._size(choice)
            most = max(most, before - kept + self.block - self._size(choice) + self.work)
        return most

    def moving(self, policy: Sequence[Choice]) -> float:
        """One block on its way."""
        return self.block if "offload" in policy else 0.0

    def total(self, policy: Sequence[Choice]) -> float:
        return self.kept(policy) + self.backward(policy) + self.moving(policy)

    def _size(self, choice: Choice) -> float:
        return {"keep": self.block, "offload": 0.0, "recompute": self.input}[choice]


def blocks_of(job: Job, degrees: Degrees, bucket: Bucket, gamma: float | None = None) -> Blocks:
    """Of a bucket; gamma: see `saved.kept`."""
    job = precise(job, degrees)
    shape, counts, split = shape_of(job, degrees, bucket), kept(job, gamma), degrees.ulysses > 1
    own = shape.own * job.config.dim
    staging = 4 * job.width * own if split else 0  # q, k, v and the result, on their way
    rings = (4 * job.width + 20) * own if degrees.ring > 1 else 0  # keys, values; their gradients twice and of the queries, fp32
    return Blocks(
        block_bytes(job, shape, counts, ulysses=split), boundary_bytes(job, shape, counts), head_bytes(job, shape),
        max(backward_bytes(job, shape, counts), staging + rings),
    )  # fmt: skip


def memory(job: Job, degrees: Degrees, policy: Policy, gamma: float | None = None) -> Memory:
    """Of the largest bucket; gamma: see `saved.kept`."""
    job = precise(job, degrees)
    shape, blocks = shape_of(job, degrees, job.largest), blocks_of(job, degrees, job.largest, gamma)
    _, swapped, _ = job.frozen()
    terms = [
        *states(job, degrees),
        Term("blocks", round(blocks.kept(policy)), _told(policy)),
        Term("backward", round(blocks.backward(policy)), "the head, or the block that runs: its activations and gradients"),
        Term("offload", round(blocks.moving(policy)), "one block on its way to or from the host"),
        Term("context", round(context_bytes(job, shape, kept(job, gamma))), "keys and values of the prompts, not split"),
        Term("around", round(around_bytes(job, shape)), "patches, rotations, times; whole samples"),
        Term("runtime", RUNTIME, "CUDA context, NCCL, cuBLAS (an estimate)"),
    ]
    return Memory(tuple(terms), round(policy.count("offload") * blocks.block) + swapped)


def _told(policy: Policy) -> str:
    counted = [f"{policy.count(choice)} {word}" for choice, word in NAMES.items() if choice in policy]
    return f"activations of {len(policy)} blocks: {', '.join(counted)}"

"""What is trained and how: everything that a plan depends on but the layout of the processes."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from wan_dit.config import DiTConfig
from wan_dit.plan import block_layers, parameters, tokens, weights

Precision = Literal["fp32", "bf16", "autocast"]
Optimiser = Literal["adamw", "adamw8bit", "muon"]
Base = Literal["fp32", "bf16", "fp8", "int8"]
PACKED = ("fp8", "int8")
MOMENTS = {"adamw": 8.0, "adamw8bit": 2.03125, "muon": 8.0}  # bytes a parameter; in 8 bits two numbers, and two fp32 scales for 256 of them


@dataclass(frozen=True)
class Bucket:
    """Clips of one size, (width, height) in pixels, and their share of all samples."""

    size: tuple[int, int]
    frames: int
    share: float = 1.0


@dataclass(frozen=True)
class Job:
    """One stage of training.

    micro_batch: samples that a context parallel group computes at a time; accumulate: such turns a step
    precision: `fp32`; `bf16`, weights gathered and computed with in bf16 (FSDP's mixed precision); `autocast` over fp32 weights
    ema: whether averaged weights are kept, in fp32
    lora: rank of the adapters on all linear layers of the blocks, 0 trains every weight
    base: type of the weights that are frozen under a LoRA; swapped: blocks of them that wait in the host's memory
    per_sample_time: a time for each sample or frame, not one for all; it is so of any batch of several
    held_gradients: gradients stay whole between the turns of a step, as where FSDP does not reduce them until the last
    """

    config: DiTConfig
    buckets: tuple[Bucket, ...]
    micro_batch: int = 1
    accumulate: int = 1
    precision: Precision = "bf16"
    optimiser: Optimiser = "adamw"
    ema: bool = False
    lora: int = 0
    base: Base = "bf16"
    swapped: int = 0
    per_sample_time: bool = False
    held_gradients: bool = False

    def __post_init__(self) -> None:
        for name, least in (("micro_batch", 1), ("accumulate", 1), ("lora", 0), ("swapped", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} is {getattr(self, name)}, expected {least} or more")
        if not self.buckets or min(bucket.share for bucket in self.buckets) <= 0:
            raise ValueError("there must be a bucket of clips, and each needs a share above 0")
        if not self.lora and (self.swapped or self.base in PACKED):
            raise ValueError("8-bit weights and block swap are of a frozen base: give a LoRA rank too, such as --lora 32")
        if self.swapped > self.blocks:
            raise ValueError(f"block swap of {self.swapped}: the model has {self.blocks} blocks")

    @property
    def blocks(self) -> int:
        return self.config.num_layers + len(self.config.vace_layers)

    def count(self, bucket: Bucket) -> int:
        """Tokens of a sample."""
        return tokens(self.config, bucket.size, bucket.frames)

    @property
    def largest(self) -> Bucket:
        """The bucket with the most tokens: memory is its."""
        return max(self.buckets, key=self.count)

    @property
    def times(self) -> bool:
        return self.per_sample_time or self.micro_batch > 1

    @property
    def width(self) -> int:
        """Bytes of a number that products are computed with."""
        return 4 if self.precision == "fp32" else 2

    @property
    def adapters(self) -> int:
        """Parameters of the LoRA: rank x (rows + columns) a linear layer."""
        image = self.config.image_dim is not None
        layers = [shape for part in block_layers(self.config, image=image) for shape in part]
        return self.lora * sum(rows + columns for rows, columns in layers) * self.blocks

    @property
    def trained(self) -> int:
        """Parameters that have gradients."""
        return self.adapters if self.lora else parameters(self.config).total

    @property
    def moments(self) -> float:
        """Bytes of the optimiser's moments; Muon has one of each matrix of the blocks."""
        found = parameters(self.config)
        matrices = 0 if self.lora else found.running + found.context
        return MOMENTS[self.optimiser] * self.trained - (4 * matrices if self.optimiser == "muon" else 0)

    @property
    def block_parameters(self) -> int:
        """Of one block, all of its layers."""
        found = parameters(self.config)
        return (found.running + found.context) // self.blocks + self.small

    @property
    def small(self) -> int:
        """Of one block: biases, norms and modulation."""
        config = self.config
        norms = 4 * config.qk_norm + 2 * config.cross_attn_norm + (2 + config.qk_norm) * (config.image_dim is not None)
        return (9 + 6 + norms) * config.dim + config.ffn_dim

    @property
    def outside(self) -> int:
        """Parameters in no block."""
        return parameters(self.config).total - self.blocks * self.block_parameters

    @property
    def splits(self) -> bool:
        """Whether shards of the weights are of the frozen base too: those in 8 bits and those that wait are whole on every process."""
        return self.base not in PACKED and not self.swapped

    def frozen(self) -> tuple[int, int, int]:
        """Bytes of the frozen base: on the device, in the host's memory, brought to the device for each forward or recomputation.

        As `wan_train.frozen` holds it: beside the blocks that stay, one that runs and one that arrives. The layers that make keys and
        values of the prompt come and go by themselves, of all blocks.
        """
        if not self.lora:
            return 0, 0, 0
        quantise, dtype = (self.base, "bf16") if self.base in PACKED else (None, self.base)
        whole = weights(self.config, dtype, quantise=quantise)
        if not self.swapped:
            return whole.device, 0, 0
        swapped, found = weights(self.config, dtype, offload="blocks", quantise=quantise), parameters(self.config)
        context = swapped.host * found.context / (found.context + found.running)
        share = self.swapped / self.blocks
        away = context + (swapped.host - context) * share
        arriving = swapped.device - (whole.device - swapped.host)
        return round(whole.device - away + arriving), round(away), round(swapped.brought * share)

    def changed(self, **fields: object) -> Job:
        return replace(self, **fields)  # type: ignore[arg-type]

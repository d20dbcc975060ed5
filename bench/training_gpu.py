"""What `benchmarks.py` measures of wan-train on a GPU: a step against diffusers' model, and MFU and peak memory against the plan.

Yields nothing where there is no GPU.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from timing import Comparison, compare, duration
from torch import nn
from training import architecture, changed, clips, first_step, recipe, training_pair
from wan_train.config import TrainConfig
from wan_train.planning.degrees import Degrees
from wan_train.planning.gpus import Gpu, gpu_named
from wan_train.planning.job import Job
from wan_train.planning.plan import Plan
from wan_train.planning.policy import Wanted
from wan_train.planning.recipe import read
from wan_train.planning.timing import default_rates
from wan_train.planning.work import flops
from wan_train.trainer import Trainer

SIZE, LENGTHS = (480, 832), (1, 17, 81)  # height and width; frames: 1,560, 7,800 and 32,760 tokens
SIX, WHOLE = architecture(1536, 6, 8960, 12), architecture(1536, 30, 8960, 12)  # of the 1.3B model: six blocks, all
DEVICE = ["device=cuda", "precision=bf16"]
PAIRS, STEPS = 5, 5
PEAK = gpu_named("h100").peak
NAME = torch.cuda.get_device_name() if torch.cuda.is_available() else "GPU"


def clock() -> float:
    """Seconds at which the GPU is done with what it was given."""
    torch.cuda.synchronize()
    return time.perf_counter()


@torch.enable_grad()
def steps() -> Iterator[Comparison]:
    """Both eager, then both with compiled blocks."""
    for frames in LENGTHS if torch.cuda.is_available() else ():
        with tempfile.TemporaryDirectory() as folder:
            trainer, loop = training_pair(SIX, Path(folder), [*clips(frames, SIZE), *DEVICE])
            apart = first_step(trainer, loop, SIX)
            objective: Any = trainer.objective
            for kind in ("eager", "compiled"):
                if kind == "compiled":
                    compile_each(objective.backbone.trunk.blocks)
                    compile_each(loop.model.blocks)
                name = f"{tokens_of(read(trainer.config, 1).job)}, {kind}"
                yield compare(name, trainer._train_step, loop.step, PAIRS, difference=apart, clock=clock)
        del trainer, loop, objective
        torch.cuda.empty_cache()


def tokens_of(job: Job) -> str:
    return f"{job.count(job.largest):,} tokens"


def compile_each(blocks: Iterable[nn.Module]) -> None:
    for block in blocks:
        block.compile()


@torch.enable_grad()
def utilisation() -> Iterator[list[str]]:
    """Rows of the whole model under the policy that the plan chooses for this GPU."""
    if not torch.cuda.is_available():
        return
    with tempfile.TemporaryDirectory() as folder:
        given = [*clips(LENGTHS[-1], SIZE), changed(WHOLE), *DEVICE]
        path = recipe(Path(folder))
        plan = planned(TrainConfig.from_toml(path, given), this_gpu())
        choices = ", ".join(f'"{choice}"' for choice in plan.policy)
        trainer = Trainer(TrainConfig.from_toml(path, [*given, f"memory.policy=[{choices}]"]))
        trainer._prepare()
        objective: Any = trainer.objective
        expected = plan.memory.total - plan.memory.size("runtime")
        again = f"{plan.policy.count('recompute')} of {len(plan.policy)} blocks recomputed, {plan.policy.count('offload')} offloaded"
        for kind in ("eager", "compiled"):
            if kind == "compiled":
                compile_each(objective.backbone.trunk.blocks)
            seconds, peak = measured(trainer)
            model = flops(plan.job, plan.job.largest).model
            shares = [model / each / PEAK for each in seconds]
            mfu = f"**{statistics.median(shares):.1%}** ({min(shares):.1%} .. {max(shares):.1%})"
            told = f"{peak / 1e9:.2f} GB", f"{expected / 1e9:.2f} GB ({peak / expected:.2f} of it used)"
            yield [f"{tokens_of(plan.job)}, {kind}; {again}", duration(statistics.median(seconds)), mfu, *told]


def this_gpu() -> Gpu:
    """The one here, with the rates of an H100."""
    return replace(gpu_named("h100"), memory=torch.cuda.get_device_properties(0).total_memory)


def planned(config: TrainConfig, gpu: Gpu) -> Plan:
    """What `wan-train plan` says of the recipe, with the policy left to it."""
    job = read(config, 1).job
    return Plan(job, Degrees(), gpu, default_rates(gpu, job.precision), Wanted())


def measured(trainer: Trainer) -> tuple[list[float], int]:
    """Seconds of each step after the first, and bytes at the peak of these."""
    trainer._train_step()
    torch.cuda.reset_peak_memory_stats()
    seconds = []
    for _ in range(STEPS):
        start = clock()
        trainer._train_step()
        seconds.append(clock() - start)
    return seconds, torch.cuda.max_memory_allocated()

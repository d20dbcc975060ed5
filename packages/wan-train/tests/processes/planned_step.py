"""Run by test_train_plan_measured: bytes at the peak of a training step of rank 0, on fake process groups, for each case on stdin."""

from __future__ import annotations

import json
import sys
from typing import Any

import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore
from wan_dit.config import DiTConfig
from wan_dit.model import WanDiT
from wan_dit.rope import rope_table
from wan_train.config import MemoryConfig, ParallelConfig
from wan_train.copies import local
from wan_train.layout import Layout
from wan_train.memory import apply_policy
from wan_vae.footprint import Meter


def measure(case: dict[str, Any]) -> dict[str, int]:
    """`peak`: the most there was besides weights and inputs; `parameters`, `gradients`, `moments`: what is there after a step of Adam."""
    if case["gpus"] > 1:
        dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=case["gpus"])
    config = DiTConfig(**case["config"])
    model = WanDiT(config)
    model.init_weights()
    apply_policy(model, MemoryConfig(policy=tuple(case["policy"])))
    Layout(ParallelConfig(**case["parallel"])).apply({"backbone": model}, torch.bfloat16 if case["precision"] == "bf16" else None)
    frames, height, width = case["grid"]
    count = case["samples"]
    latents, times = torch.randn(count, config.in_dim, frames, 2 * height, 2 * width), 1000 * torch.rand(count)
    text = [torch.randn(config.text_len, config.text_dim) for _ in range(count)]
    rope_table.cache_clear()
    with Meter([*(local(each.detach()) for each in model.parameters()), latents, times, *text]) as meter:
        with torch.autocast("cpu", torch.bfloat16, enabled=case["precision"] != "fp32"):
            velocity = model(latents, times, model.encode_context(text))
        velocity.square().mean().backward()
        del velocity
    optimiser = torch.optim.AdamW(model.parameters(), foreach=False)
    optimiser.step()
    moments = (local(value) for state in optimiser.state.values() for name, value in state.items() if name != "step")
    found = {
        "peak": meter.peak,
        "parameters": sum(local(each.detach()).nbytes for each in model.parameters()),
        "gradients": sum(local(each.grad).nbytes for each in model.parameters() if each.grad is not None),
        "moments": sum(value.nbytes for value in moments),
    }
    if case["gpus"] > 1:
        dist.destroy_process_group()
    return found


if __name__ == "__main__":
    torch.manual_seed(0)
    torch.set_num_threads(1)
    print(json.dumps([measure(case) for case in json.load(sys.stdin)]))

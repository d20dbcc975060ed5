"""The layout built for real on a fake process group, with parameters that have no numbers, in a process of its own.

Run as `python -m wan_train.planning.verify` with the configuration and the degrees as JSON on stdin; writes bytes as JSON to stdout.
"""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

from .plan import Plan


def verify(plan: Plan) -> dict[str, Any]:
    """Bytes of parameters that rank 0 holds and those planned, and their ratio.

    ValueError for a LoRA, whose base a layout does not build, or where the layout could not be built.
    """
    if plan.job.lora:
        raise ValueError("verify builds the layout of a model whose weights are all trained: leave out --lora or --verify")
    degrees = plan.degrees
    asked = {
        "config": plan.job.config.model_dump(mode="json"), "gpus": degrees.gpus,
        "parallel": {"ulysses": degrees.ulysses, "ring": degrees.ring, "fsdp": degrees.fsdp},
    }  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-m", "wan_train.planning.verify"], input=json.dumps(asked), capture_output=True, text=True, check=False
    )
    if done.returncode:
        told = (done.stderr.strip().splitlines() or ["nothing was said"])[-1]
        raise ValueError(f"the layout could not be built on {degrees.gpus} fake processes: {told}")
    local = json.loads(done.stdout.strip().splitlines()[-1])["local"]
    planned = plan.memory.size("parameters")
    return {"gpus": degrees.gpus, "local": local, "planned": planned, "ratio": local / planned}


def build(asked: dict[str, Any]) -> int:
    """Bytes of the parameters of rank 0, as the trainer lays them out."""
    import torch
    import torch.distributed as dist
    from torch.testing._internal.distributed.fake_pg import FakeStore
    from wan_dit.config import DiTConfig
    from wan_dit.model import WanDiT

    from ..config import ParallelConfig
    from ..copies import local
    from ..layout import Layout

    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=asked["gpus"])
    with torch.device("meta"):
        model = WanDiT(DiTConfig(**asked["config"]))
    Layout(ParallelConfig(**asked["parallel"])).apply({"backbone": model})
    return sum(local(parameter.detach()).nbytes for parameter in model.parameters())


if __name__ == "__main__":
    print(json.dumps({"local": build(json.load(sys.stdin))}))

"""From one command to several processes, by torchrun, and the group that they form."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta

PATIENCE = timedelta(minutes=30)  # of a process for the others: some encode, or measure previews, while the rest wait


def launch(processes: int, words: Sequence[str]) -> int:
    """Run `wan-train` with these words in so many processes of this machine; returns the exit code.

    For several machines start torchrun on each: `torchrun --nnodes N --nproc-per-node M --rdzv-endpoint HOST:PORT -m wan_train run ...`.
    """
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes), "-m", "wan_train", *words]
    threads = {"OMP_NUM_THREADS": "1"} if "OMP_NUM_THREADS" not in os.environ else {}  # as torchrun sets it, without its warning
    return subprocess.run(command, env={**os.environ, **threads}, check=False).returncode


@contextmanager
def joined(device: str) -> Iterator[None]:
    """The group of the processes that torchrun has started, for the time of the context; nothing for one process alone."""
    import torch
    import torch.distributed as dist

    if int(os.environ.get("WORLD_SIZE", 1)) == 1 or dist.is_initialized():
        yield
        return
    kind = torch.device(device).type
    torch.get_device_module(kind).set_device(int(os.environ.get("LOCAL_RANK", 0)))
    dist.init_process_group(dist.get_default_backend_for_device(kind), timeout=PATIENCE)
    try:
        yield
        dist.barrier()  # gloo aborts a process whose peers are gone before it has closed its groups
    finally:
        dist.destroy_process_group()

"""What the processes of the store's tests run: a training of seconds that is killed, taken up and resharded.

Every draw is keyed by the step, so that the weights at a step do not depend on how often the run was killed.
"""

from __future__ import annotations

import json
import os
import time
import traceback
import warnings
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from wan_dit.config import DiTConfig
from wan_dit.model import WanDiT
from wan_dit.parallel import shard
from wan_train.store import Store, restore, training_state
from wan_train.store.averages import Averages
from wan_train.store.guard import Guard
from wan_train.store.ranks import Ranks
from wan_train.store.signals import Signals
from wan_train.store.stragglers import StepTimes

DIT = DiTConfig(dim=24, ffn_dim=40, freq_dim=16, text_dim=10, text_len=8, num_heads=2, num_layers=2, in_dim=4, out_dim=4)


def run(task: Callable[..., Any], rank: int, size: int, rendezvous: str, given: tuple[Any, ...], out: Any) -> None:
    """Form a group, do the task, put its answer or its traceback into the queue; nobody waits longer than a minute."""
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    try:
        if size > 1:
            dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=size, timeout=timedelta(seconds=60))
        answer = task(*given)
        if size > 1:
            dist.barrier()
        out.put((rank, answer))
    except BaseException:
        out.put((rank, traceback.format_exc()))
    with suppress(Exception):
        dist.destroy_process_group()


class Training:
    """A model that is sharded over all processes there are, AdamW, averages and a schedule."""

    def __init__(self, kind: str, seed: int = 0) -> None:
        self.rank, self.size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        torch.manual_seed(seed)
        sizes = (2, self.size // 2) if kind == "copies of shards" and self.size == 4 else (self.size,)
        mesh = init_device_mesh("cpu", sizes, mesh_dim_names=("replicate", "shard")[-len(sizes) :]) if self.size > 1 else None
        self.kind = kind
        if kind == "dit":
            self.model: Any = WanDiT(DIT).train()
            for weight in self.model.parameters():
                nn.init.normal_(weight, std=0.2)
            if mesh is not None:
                shard(self.model, mesh)
        else:
            self.model = nn.Sequential(nn.Linear(6, 33), nn.Tanh(), nn.Linear(33, 5))  # 33 rows: no number of processes divides them
            for layer in (*self.model, self.model) if mesh is not None else ():
                if not isinstance(layer, nn.Tanh):
                    fully_shard(layer, mesh=mesh)
        self.modules = {"model": self.model}
        self.optimiser = torch.optim.AdamW(self.model.parameters(), 1e-2)
        self.schedule = torch.optim.lr_scheduler.CosineAnnealingLR(self.optimiser, 1000)
        self.ema = {"model": {name: value.detach().clone() for name, value in self.model.named_parameters()}}
        self.done = 0

    def step(self) -> float:
        """One step on 12 samples, which the processes share."""
        generator = torch.Generator().manual_seed(self.done)
        own = slice(self.rank * 12 // self.size, (self.rank + 1) * 12 // self.size)
        if self.kind == "dit":
            latents, text = torch.randn(12, 4, 2, 4, 4, generator=generator)[own], torch.randn(3, 10, generator=generator)
            context = self.model.encode_context([text] * len(latents))
            made = self.model(latents, torch.linspace(100, 900, 12)[own], context)
        else:
            made = self.model(torch.randn(12, 6, generator=generator)[own])
        loss = (made - 1).square().mean(tuple(range(1, made.ndim))).sum() * self.size / 12  # gradients are averaged over processes
        loss.backward()
        self.optimiser.step()
        self.optimiser.zero_grad()
        self.schedule.step()
        for average, live in zip(self.ema["model"].values(), self.model.parameters(), strict=True):
            average.lerp_(live.detach(), 0.1)
        self.done += 1
        total = loss.detach().double() / self.size
        if self.size > 1:
            dist.all_reduce(total)
        return float(total)

    def state(self) -> dict[str, Any]:
        schedule = {key: value for key, value in self.schedule.state_dict().items() if key != "_last_lr"}
        values = {"step": self.done, "schedule": schedule, "position": {"epoch": self.done // 10, "index": self.done % 10}}
        return training_state(self.modules, [self.optimiser], ema=self.ema, values=values)

    def resume(self, store: Store) -> int | None:
        """The step that was found, if any."""
        if (step := store.latest()) is None:
            return None
        store.load(step, state := self.state())
        values = restore(state, [self.optimiser])
        assert values["step"] == step
        assert values["position"] == {"epoch": step // 10, "index": step % 10}
        self.schedule.load_state_dict(values["schedule"])
        self.done = step
        return step

    def whole(self) -> dict[str, Any]:
        """Weights, averages, moments and the rate, as arrays that a queue carries."""
        found = {f"model {name}": value for name, value in self.model.named_parameters()}
        found |= {f"ema {name}": value for name, value in self.ema["model"].items()}
        for name, parameter in self.model.named_parameters():
            found |= {f"{key} {name}": value for key, value in self.optimiser.state[parameter].items()}
        arrays: dict[str, Any] = {key: full(value).detach().numpy().copy() for key, value in found.items()}
        return {**arrays, "rate": self.optimiser.param_groups[0]["lr"]}


def full(value: Tensor) -> Tensor:
    return value.full_tensor() if isinstance(value, DTensor) else value


def stretch(kind: str, folder: str, steps: int, seed: int = 0) -> dict[str, Any]:
    """Take up what is in the folder, if anything, train for so many steps and save; what was loaded, the losses, what there is."""
    training = Training(kind, seed)
    with Store(folder) as store:
        resumed = training.resume(store)
        loaded = training.whole() if resumed is not None else None
        losses = [training.step() for _ in range(steps)]
        if steps:
            store.save(training.done, training.state())
            assert store.wait()
    return {"resumed": resumed, "loaded": loaded, "losses": losses, "end": training.whole()}


def overtaken(folder: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """The state when a save was called, while which training went on; and what the checkpoint holds."""
    training = Training("mlp")
    training.step()
    with Store(folder) as store:
        at_save = training.whole()
        store.save(1, training.state())
        for _ in range(5):
            training.step()
        store.save(6, training.state())
        again = Training("mlp", seed=1)
        store.load(1, state := again.state())
        restore(state, [again.optimiser])
    return at_save, again.whole()


def refused(folder: str) -> list[str]:
    """What a second store on the folder of a first says, on every process."""
    with Store(folder):
        try:
            Store(folder)
        except ValueError as error:
            return [str(error)]
    return []


def damaged(folder: str) -> tuple[int | None, list[str]]:
    """What is taken of a folder, and what is told."""
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        with Store(folder) as store:
            found = store.latest()
    return found, [str(warning.message) for warning in told if "checkpoint" in str(warning.message)]


def full_disk(folder: str, failing: int) -> tuple[list[bool], list[str], list[str]]:
    """Three saves, during the second of which one process may write no file of more than a few bytes."""
    import resource

    training, outcomes = Training("mlp"), []
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        with Store(folder) as store:
            for index in range(3):
                training.step()
                limit = 1000 if index == 1 and training.rank == failing else resource.RLIM_INFINITY
                resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
                store.save(training.done, {**training.state(), "larger than a buffer": torch.zeros(50_000)})
                outcomes.append(store.wait())
    return outcomes, [str(warning.message) for warning in told], sorted(path.name for path in Path(folder).iterdir())


def write_until_killed(folder: str, failpoint: str) -> None:
    """Three saves of what tells its step."""
    os.environ["WAN_TRAIN_FAILPOINT"] = failpoint
    with Store(folder) as store:
        for step in (1, 2, 3):
            store.save(step, {"weight": torch.full((64, 64), float(step))})


def health(losses: list[float]) -> dict[str, Any]:
    """Verdicts where only the last process sees the bad figures, and figures over all processes."""
    rank, ranks, guard = dist.get_rank(), Ranks(), Guard()
    last = rank == ranks.size - 1
    verdicts = [int(guard.decide(loss if last else 1.0, 1.0, dist.group.WORLD)) for loss in losses]
    times, averages = StepTimes(), Averages()
    for second in range(3):
        times.add(0.1 * (rank + 1) + 0.01 * second)
    averages.add(["a", "b", "a"][: rank + 1], [float(rank), 10.0, 3.0][: rank + 1])
    return {"verdicts": verdicts, "times": times.figures(ranks), "means": averages.reduced(ranks), "empty": averages.reduced(ranks)}


def until_asked(folder: str, report: str) -> tuple[int, int]:
    """Train until a signal comes to any process, save, and answer with the exit code and the step."""
    training = Training("mlp")
    with Signals() as signals, Store(folder) as store:
        while not (code := signals.exit_code(dist.group.WORLD)):
            training.step()
            time.sleep(0.005)
            Path(report).with_suffix(f".{training.rank}").write_text(str(os.getpid()))
        store.save(training.done, training.state(), wait=True)
    return code, training.done


def killable(folder: str, report: str, every: int, last: int, failpoints: dict[int, str]) -> dict[str, Any]:
    """Train up to `last`, save every so many steps in the background, and write down each event where a killed process leaves it."""
    training = Training("mlp", seed=1)
    if point := failpoints.get(training.rank):
        os.environ["WAN_TRAIN_FAILPOINT"] = point

    def tell(event: str, step: int | None) -> None:
        if training.rank == 0:
            with Path(report).open("a") as log:
                log.write(json.dumps([event, step]) + "\n")

    with Store(folder, keep=2) as store:
        tell("resumed", found := training.resume(store))
        if found is None:
            training = Training("mlp")
        while training.done < last:
            training.step()
            time.sleep(0.002)
            tell("done", training.done)
            if training.done % every == 0:
                store.wait()
                tell("whole", store.saved)
                tell("save", training.done)
                store.save(training.done, training.state())
    return training.whole()

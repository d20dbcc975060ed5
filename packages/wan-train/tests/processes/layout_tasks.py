"""What the processes of the layout tests do: train a few steps in a layout, and tell losses and gradients."""

from __future__ import annotations

import traceback
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor
from wan_train.config import TrainConfig
from wan_train.copies import whole
from wan_train.layout import Layout
from wan_train.trainer import Trainer


def run(task: Any, rank: int, world: int, store: str, given: tuple[Any, ...], out: Any) -> None:
    """Join a group, do the task, and put its answer; a failure is answered as text."""
    torch.set_num_threads(1)
    try:
        dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
        out.put((rank, task(*given)))
        dist.barrier()
    except BaseException:
        out.put((rank, traceback.format_exc()))
    with suppress(Exception):
        dist.destroy_process_group()


def train(recipe: str, overrides: list[str], steps: int, plant: str = "") -> dict[str, Any]:
    """Losses of every step, and the gradients of the first and of the last, whole and by name."""
    with planted(plant):
        trainer = Trainer(TrainConfig.from_toml(Path(recipe), [*overrides, f"steps={steps}"]))
        trainer._prepare()
        losses, grads = [], {}
        for step in range(steps):
            if step in (0, steps - 1):
                kept: dict[str, Tensor] = {}
                original = trainer.optimiser.step

                def watched(at: int, norm: float, share: float, original: Any = original, kept: dict[str, Tensor] = kept) -> None:
                    kept |= gradients(trainer)
                    original(at, norm, share)

                with patch.object(trainer.optimiser, "step", watched):
                    losses.append(trainer._train_step()["loss"])
                grads[step] = kept
            else:
                losses.append(trainer._train_step()["loss"])
        weights = {f"{name}.{key}": value for name, state in trainer.ema.live.items() for key, value in whole(state).items()}
    return {"losses": losses, "gradients": {step: {name: value.numpy() for name, value in found.items()} for step, found in grads.items()},
            "weights": {name: value.detach().numpy() for name, value in weights.items()}}  # fmt: skip


def types(recipe: str, overrides: list[str]) -> dict[str, set[str]]:
    """What the weights of a block are computed with in a step, and what gradients and weights are afterwards."""
    trainer = Trainer(TrainConfig.from_toml(Path(recipe), overrides))
    trainer._prepare()
    block, computed = {**trainer.frozen, **trainer.objective.modules}["backbone"].trunk.blocks[0], set()
    block.register_forward_pre_hook(lambda block, _: computed.update(str(each.dtype) for each in (block.modulation, block.ffn[0].weight)))
    gradients, step = set(), trainer.optimiser.step

    def watched(*given: Any) -> None:
        gradients.update(str(each.grad.dtype) for each in trainer.optimiser.params if each.grad is not None)
        step(*given)

    with patch.object(trainer.optimiser, "step", watched):
        trainer._train_step()
    return {
        "computed": computed,
        "gradients": gradients,
        "weights": {str(each.dtype) for each in trainer.optimiser.params},
    }


def encoded(recipe: str, overrides: list[str]) -> tuple[list[int], list[str]]:
    """The samples whose latents and contexts this process made for a step, and those of all batches that it computed on."""
    trainer = Trainer(TrainConfig.from_toml(Path(recipe), overrides))
    trainer._prepare()
    made: list[int] = []
    computed: list[str] = []
    objective: Any = trainer.objective
    batch, losses = objective.batch, objective.losses

    def making(samples: Any, *given: Any) -> Any:
        made.extend(samples)
        found = batch(samples, *given)
        assert found.context is not None
        return found

    objective.batch = making
    objective.losses = lambda given: computed.extend(given.prompts) or losses(given)
    trainer._train_step()
    return made, computed


def preview(recipe: str, overrides: list[str], steps: int) -> Any:
    """Run to the end, and sample clips with the trained weights, the same ones on every process."""
    trainer = Trainer(TrainConfig.from_toml(Path(recipe), [*overrides, f"steps={steps}"]))
    trainer.run()
    return trainer.objective.preview(trainer.averaged(), range(trainer.objective.previews)).numpy()


def gradients(trainer: Trainer) -> dict[str, Tensor]:
    found = {}
    for module, live in trainer.ema.live.items():
        named = {key: value.grad for key, value in live.items() if value.grad is not None}
        found |= {f"{module}.{key}": value.detach().clone() for key, value in whole(named).items()}
    return found


def planted(name: str) -> Any:
    """A known bug, which the comparison has to find."""
    from wan_dit.parallel import ring, sequence

    if name == "no all-reduce":
        return patch.object(Layout, "average", lambda self, parameters: None)
    if name == "wrong merge":
        return patch.object(ring, "merge", lambda out, lse, part, part_lse: ((out + part) / 2, torch.logaddexp(lse, part_lse)))
    if name == "rank order":
        original = sequence._Split.part

        def turned(self: Any, whole: Tensor, axis: int) -> Tensor:
            rank, self.rank = self.rank, self.size - 1 - self.rank
            try:
                return original(self, whole, axis)
            finally:
                self.rank = rank

        return patch.object(sequence._Split, "part", turned)
    if name == "samples by rank":

        class Mixed(Layout):
            """Processes of one context parallel group compute different samples."""

            def __init__(self, *given: Any) -> None:
                super().__init__(*given)
                self.data_rank = self.rank % self.data_ranks

        return patch("wan_train.trainer.Layout", Mixed)
    return nullcontext()

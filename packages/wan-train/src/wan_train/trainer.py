"""The training loop: draw, loss, step, average, log, preview, save; every step is the same in any layout and after a resume."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from tqdm import tqdm
from wan_dit._shared.weights import usable_device

from . import checkpoint
from .config import TrainConfig
from .copies import Template, fill, named, whole
from .layout import Layout
from .memory import apply_policy
from .optim import EMA, Optimiser, require_finite
from .order import Order
from .plugins import find, plugin_manager
from .randomness import generator
from .tracker import Silent, Tracker

if TYPE_CHECKING:
    import pluggy

    from .contracts import Draw, Objective


class Trainer:
    """Runs one recipe; started by torchrun, together with the other processes.

    Example: `Trainer(TrainConfig.from_toml("tiny-vae")).run()`. The output folder gets `log.jsonl`, TensorBoard events,
    `previews/*.png`, `checkpoint.pt` and, at the end, `export/`.
    """

    def __init__(self, config: TrainConfig, pm: pluggy.PluginManager | None = None) -> None:
        pm = pm or plugin_manager()
        self.config = config
        if config.threads:
            torch.set_num_threads(config.threads)
        torch.manual_seed(config.seed)
        usable_device(config.device)
        self.layout = Layout(config.parallel, config.device)
        dataset = _dataset(config, pm)
        objective = find("wan_objectives", config.objective.name, pm).resolve()
        self.objective: Objective = objective(config.objective.settings, dataset, config.output, config.device, pm)
        modules = self.objective.modules
        self.templates = {name: Template(module) for name, module in modules.items()}
        for module in modules.values():
            apply_policy(module, config.memory)
        self.layout.apply(modules)
        self.optimiser = Optimiser(config.optimiser, self.objective.parameter_groups(), config.steps)
        self.ema = EMA(modules, config.ema)
        self.order = Order(self.objective.samples, config.seed)
        self.step = self.taken = 0  # steps, and the samples that they took

    def run(self, *, resume: bool = False, overwrite: bool = False, progress: bool = False, until: int | None = None) -> Path:
        """Train to `config.steps` (or stop after `until`) and return the folder of the exported parts.

        resume: take up the run in the output folder; overwrite: begin anew over it
        Raises ValueError where the folder holds a run and neither is asked for.
        """
        config, last = self.config, min(until or self.config.steps, self.config.steps)
        path = config.output / "checkpoint.pt"
        if resume:
            self.load(path)
        elif path.exists() and not overwrite:
            raise ValueError(f"'{config.output}' holds a run: give --resume to take it up, --overwrite to begin anew, or another output=")
        self.layout.barrier()  # all have looked before one writes
        _make_folder(config.output)
        self._prepare()
        with (
            (Tracker if self.layout.is_main else Silent)(config.output, config.model_dump(mode="json"), self.step) as tracker,
            tqdm(total=last, initial=self.step, disable=not (progress and self.layout.is_main)) as bar,
        ):
            while self.step < last:
                figures = self._train_step()
                self.step += 1
                bar.update()
                if _due(self.step, config.log_every, last):
                    bar.set_postfix(loss=f"{figures['loss']:.4f}")
                    tracker.log(self.step, figures)
                if _due(self.step, config.preview_every, config.steps):
                    self._preview(tracker)
                if _due(self.step, config.save_every, last):
                    self.save(path)
        if self.step == config.steps:
            modules = self.averaged()
            if self.layout.is_main:
                self.objective.export(modules, str(config.output / "export"))
        self.layout.barrier()
        return config.output / "export"

    def averaged(self) -> dict[str, Any]:
        """Whole copies of the modules with the averaged weights; all processes have to ask for them."""
        return {name: template.filled(whole(self.ema.state[name])) for name, template in self.templates.items()}

    def _prepare(self) -> None:
        """The first process encodes what is encoded once, and the others read it."""
        if self.layout.is_main:
            self.objective.prepare()
        self.layout.barrier()
        if not self.layout.is_main:
            self.objective.prepare()

    def _preview(self, tracker: Tracker) -> None:
        modules = self.averaged()
        if self.layout.is_main:
            clips, measured = self.objective.preview(modules)
            tracker.log(self.step, measured)
            tracker.grid(self.step, clips)
        self.layout.barrier()

    def _train_step(self) -> dict[str, float]:
        start, config = time.perf_counter(), self.config
        progress = self.step / config.steps
        count = self.objective.batch_size(config.batch_size, progress)
        samples = self.order.take(self.taken, count)
        draw = partial(_draw, config.seed, self.step)
        total, sums = torch.zeros((), dtype=torch.float64), dict[str, Tensor]()
        turns = self._batches(samples, draw, progress)
        for i, (batch, weight) in enumerate(turns):
            with (
                self.layout.accumulating(self.objective.modules.values(), last=i == len(turns) - 1),
                torch.autocast(torch.device(config.device).type, torch.bfloat16, enabled=config.precision == "bf16"),
            ):
                losses, facts = self.objective.losses(batch)
            (losses.sum() * (weight * self.layout.data_ranks / count)).backward()
            total += weight * losses.detach().double().sum().cpu()
            for name, values in facts.items():
                sums[name] = sums.get(name, torch.zeros((), dtype=torch.float64)) + weight * values.detach().double().sum().cpu()
        self.layout.average(self.optimiser.params)
        figures = {name: float(self.layout.total(value)) / count for name, value in {"loss": total, **sums}.items()}
        require_finite("loss", torch.tensor(figures["loss"]), self.step)
        norm = self.optimiser.step(self.step)
        self.ema.update(self.step)
        self.taken += count
        rate = self.optimiser.rate(self.step)
        return {**figures, "grad_norm": norm, "lr_share": rate, "seconds": time.perf_counter() - start}

    def _batches(self, samples: Sequence[int], draw: Draw, progress: float) -> list[tuple[Any, float]]:
        """The batches of this data rank, as many as of any other, with weight 0 where there is nothing left for it.

        A context parallel group encodes as many batches at a time as it has processes, one each, and all compute on all of them.
        """
        layout = self.layout
        share = -(-len(samples) // layout.data_ranks)
        size = min(self.config.micro_batch or share, share)
        shares = [samples[i * share : (i + 1) * share] for i in range(layout.data_ranks)]
        micros = [shares[layout.data_rank][i : i + size] for i in range(0, share, size)]
        micros += [()] * (-len(micros) % layout.context)
        made: list[tuple[Any, float]] = []
        for i in range(0, len(micros), layout.context):
            own = micros[i + layout.context_rank]
            batch = self.objective.batch(own or samples[:1], draw, progress)
            made += layout.exchanged([(batch, float(bool(own)))])
        return made[: -(-share // size)]

    def save(self, path: Path) -> None:
        """Write everything a resume needs: weights, averaged weights, optimiser, random state, step."""
        state: dict[str, Any] = {
            "step": self.step,
            "taken": self.taken,
            "modules": {name: whole(named(module)) for name, module in self.objective.modules.items()},
            "ema": {name: whole(state) for name, state in self.ema.state.items()},
            "optimiser": self.optimiser.state_dict(),
            "rng": torch.get_rng_state(),
        }
        if self.layout.is_main:
            checkpoint.save(path, state)
        self.layout.barrier()

    def load(self, path: Path) -> None:
        """Take up where `save` left; ValueError where the checkpoint is of another recipe."""
        state = checkpoint.load(path)
        if state["step"] > self.config.steps:
            raise ValueError(f"'{path}' is at step {state['step']}, past the {self.config.steps} steps of this recipe")
        try:
            for name, module in self.objective.modules.items():
                fill(named(module), state["modules"][name])
            self.ema.load_state_dict(state["ema"])
            self.optimiser.load_state_dict(state["optimiser"])
        except (RuntimeError, KeyError, ValueError) as error:
            raise ValueError(
                f"'{path}' is of other parts or of another optimiser: resume it with the settings it was started with"
            ) from error
        torch.set_rng_state(state["rng"])
        self.step, self.taken = state["step"], state["taken"]


def _draw(seed: int, step: int, sample: int, stream: str) -> torch.Generator:
    return generator(seed, step, sample, stream)


def _dataset(config: TrainConfig, pm: pluggy.PluginManager) -> Any:
    build = find("wan_datasets", config.data.name, pm).resolve()
    try:
        return build(**config.data.settings)
    except TypeError as error:  # a setting that it does not have, or one of the wrong type
        raise ValueError(f"data.settings of '{config.data.name}': {error}") from error


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise OSError(f"cannot write to output '{folder}': {error.strerror or error}") from error


def _due(step: int, every: int, last: int) -> bool:
    return bool(every) and (step % every == 0 or step == last)

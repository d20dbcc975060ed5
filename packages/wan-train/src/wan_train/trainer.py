"""The training loop: draw, loss, step, average, log, preview, save; every step is the same in any layout and after a resume."""

from __future__ import annotations

import shutil
import tempfile
import time
import warnings
from collections.abc import Sequence
from functools import partial
from inspect import signature
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from tqdm import tqdm
from wan_dit._shared.weights import usable_device

from .config import PartConfig, TrainConfig
from .copies import State, Template, named, on_host, whole
from .curriculum import Curriculum
from .data.buckets import GRID
from .data.mix import Mix
from .data.sampler import Micro, share
from .float8 import check_float8, compute_in_float8
from .layout import Layout
from .memory import apply_policy
from .optim import EMA, Optimiser, gradient_norm
from .plugins import find, plugin_manager
from .previews import previewed
from .randomness import generator
from .store import Guard, Signals, Store, Verdict, restore, training_state
from .store.averages import Averages, timestep_key
from .store.guard import Limits
from .store.manifest import steps
from .store.ranks import Ranks
from .store.stragglers import StepTimes
from .tracker import Silent, Tracker

if TYPE_CHECKING:
    import pluggy

    from .contracts import Draw, Objective


class Trainer:
    """Runs one recipe; started by torchrun, together with the other processes.

    Example: `Trainer(TrainConfig.from_toml("tiny-vae")).run()`. The output folder gets `log.jsonl`, TensorBoard events,
    `previews/*.png`, `checkpoints/` and, at the end, `export/`.
    """

    def __init__(self, config: TrainConfig, pm: pluggy.PluginManager | None = None) -> None:
        pm = pm or plugin_manager()
        self.config = config
        if config.threads:
            torch.set_num_threads(config.threads)
        torch.manual_seed(config.seed)
        usable_device(config.device)
        if config.precision == "fp8":
            check_float8(config.device)
        self.layout = Layout(config.parallel, config.device)
        dataset = _dataset(config, pm)
        objective = find("wan_objectives", config.objective.name, pm).resolve()
        self.objective: Objective = objective(config.objective.settings, dataset, config.output, config.device, pm)
        if any(stage.shift for stage in config.stages) and "shift" not in signature(self.objective.batch).parameters:
            raise ValueError(f"stages.shift: objective '{config.objective.name}' takes none for its batches: leave it out")
        modules = self.objective.modules
        self.frozen: dict[str, Any] = getattr(self.objective, "frozen", {})
        split = config.parallel.fsdp * config.parallel.ulysses * config.parallel.ring > 1
        self.templates = {name: Template(module) for name, module in {**(self.frozen if split else {}), **modules}.items()}
        if config.precision == "fp8":
            compute_in_float8(modules, emulate=torch.device(config.device).type == "cpu")
        for module in (*modules.values(), *self.frozen.values()):
            apply_policy(module, config.memory)
        self.layout.apply({**self.frozen, **modules}, torch.bfloat16 if config.precision == "bf16" else None)
        self.optimiser = Optimiser(config.optimiser, self.objective.parameter_groups(), config.steps)
        self.ema = EMA(modules, config.ema)
        self.curriculum = Curriculum(config, dataset, self.objective.samples, getattr(self.objective, "grid", GRID))
        self.guard = Guard(Limits(**config.guard.model_dump()))
        self.ranks, self.by_level, self.times = Ranks(), Averages(), StepTimes()
        self.step = 0

    def run(self, *, resume: bool = False, overwrite: bool = False, progress: bool = False, until: int | None = None) -> Path:
        """Train to `config.steps` (or stop after `until`) and return the folder of the exported parts.

        resume: take up the run in the output folder; overwrite: begin anew over it
        Raises ValueError where the folder holds a run and neither is asked for, and SystemExit where a signal ends it, saved.
        """
        config, last = self.config, min(until or self.config.steps, self.config.steps)
        folder = config.output / "checkpoints"
        self._check_folder(folder, resume, overwrite)
        with Store(folder, config.keep, config.keep_every or None, layout=config.parallel.model_dump()) as store, Signals() as signals:
            if resume:
                self._take_up(store)
            self._prepare()
            with (
                (Tracker if self.layout.is_main else Silent)(config.output, config.model_dump(mode="json"), self.step) as tracker,
                tqdm(total=last, initial=self.step, disable=not (progress and self.layout.is_main)) as bar,
            ):
                while self.step < last:
                    figures = self._train_step(store)
                    bar.update(self.step - bar.n)
                    if _due(self.step, config.log_every, last):
                        bar.set_postfix(loss=f"{figures['loss']:.4f}")
                        tracker.log(self.step, {**figures, **self._since_last()})
                    if _due(self.step, config.preview_every, config.steps):
                        self._preview(tracker)
                    code = signals.exit_code(self.layout.mesh)
                    if code or _due(self.step, config.save_every, last):
                        store.save(self.step, self._state(), wait=bool(code))
                    if code:
                        raise SystemExit(code)
        if self.step == config.steps:
            self._export()
        self.layout.barrier()
        return config.output / "export"

    def averaged(self) -> dict[str, Any]:
        """Whole copies of the modules with the averaged weights, and of frozen ones that are split; all processes have to ask for them."""
        return self._copies(self._averages())

    def _export(self) -> None:
        """Write the trained parts, on the first process; a GPU never holds more than its share and one whole tensor."""
        main, trained = self.layout.is_main, self.objective.modules
        states = {name: on_host(self.ema.state[name], main) for name in trained}
        if main:
            modules = {name: self.templates[name].filled(state) for name, state in states.items()}
            self.objective.export(modules, str(self.config.output / "export"))

    def _averages(self) -> dict[str, State]:
        """The whole tensors of these modules; all processes have to ask for them."""
        states = {**{name: named(module) for name, module in self.frozen.items()}, **self.ema.state}
        return {name: whole(states[name]) for name in self.templates}

    def _copies(self, states: dict[str, State]) -> dict[str, Any]:
        """Modules with these tensors, which are taken out of `states`: a gathered one is not held twice."""
        return {name: template.filled(states.pop(name)) for name, template in self.templates.items()}

    def _prepare(self) -> None:
        """The first process encodes what is encoded once, and the others read it."""
        if self.layout.is_main:
            self.objective.prepare()
        self.layout.barrier()
        if not self.layout.is_main:
            self.objective.prepare()

    def _since_last(self) -> dict[str, float]:
        """Figures of the steps since they were last asked for: the loss by noise level and, of several processes, who is slow."""
        by_level = self.by_level.reduced(self.ranks)
        return by_level if self.layout.world == 1 else {**by_level, **self.times.figures(self.ranks)}

    def _preview(self, tracker: Tracker) -> None:
        """Sample with the averaged weights; the figures reach every process, since the rate may depend on them."""
        objective, states = self.objective, self._averages()

        def show(clips: Tensor) -> dict[str, float]:
            shown, measured = objective.measure(clips)
            if measured:  # a data set may have nothing to measure
                tracker.log(self.step, measured)
            tracker.grid(self.step, shown)
            return measured

        measured = previewed(objective.previews, lambda indices: objective.preview(self._copies(states), indices), show, self.ranks)
        if self.optimiser.plateau is not None:
            self.optimiser.plateau.see(measured)

    def _train_step(self, store: Store | None = None) -> dict[str, float]:
        """One step; where it went wrong it is left out, or taken back to the last checkpoint of the store, or ends the run."""
        start, config = time.perf_counter(), self.config
        progress, plateau = self.step / config.steps, self.optimiser.plateau
        stage = self.curriculum.advance(self.step, spent=plateau is not None and plateau.spent)
        if self._enter(progress) or stage:
            self.guard.reset()  # another loss
            self.optimiser.renew()
        micros = self.curriculum.take(self.objective.batch_size(config.batch_size, progress))
        figures = self._gradients(micros, progress)
        if gather := getattr(self.objective, "gather", None):
            gather()
        norm = float(gradient_norm(self.optimiser.params))
        rate = self.optimiser.rate(self.step) * self.curriculum.rate
        verdict = self.guard.decide(figures["loss"], norm, self.layout.mesh)
        if verdict is Verdict.GO:
            self.optimiser.step(self.step, norm, self.curriculum.rate)
            self.ema.update(self.step)
            self.step += 1
        else:
            self.optimiser.clear()
            self._recover(verdict, store)
        return {**figures, "grad_norm": norm, "lr_share": rate, "seconds": time.perf_counter() - start}

    def _enter(self, progress: float) -> bool:
        """Let the objective make its modules ready for a step; says whether another loss begins."""
        enter = getattr(self.objective, "enter", None)
        return enter is not None and enter(progress, (self.step - 1) / self.config.steps, self.ema.state)

    def _gradients(self, micros: Sequence[Micro], progress: float) -> dict[str, float]:
        """Leave the gradient of the mean loss of all samples; returns the loss and the mean figures."""
        config, count, start = self.config, sum(len(micro.samples) for micro in micros), time.perf_counter()
        sums: dict[str, Tensor] = {"loss": torch.zeros((), dtype=torch.float64)}
        turns = self._batches(micros, partial(generator, config.seed, self.step), progress)
        for i, (batch, weight) in enumerate(turns):
            with (
                self.layout.accumulating(self.objective.modules.values(), last=i == len(turns) - 1),
                torch.autocast(torch.device(config.device).type, torch.bfloat16, enabled=config.precision != "fp32"),
            ):
                losses, facts = self.objective.losses(batch)
            (losses.sum() * (weight * self.layout.data_ranks / count)).backward()
            levels = facts.pop("sigma", None)
            if weight and levels is not None:
                self.by_level.add([timestep_key(level) for level in levels.tolist()], losses.detach().tolist())
            for name, values in {"loss": losses.detach(), **facts}.items():
                sums[name] = sums.get(name, torch.zeros((), dtype=torch.float64)) + weight * values.double().sum().cpu()
        self.times.add(time.perf_counter() - start)
        self.layout.average([param for param in self.optimiser.params if param.requires_grad])
        return {name: float(self.layout.total(value)) / count for name, value in sums.items()}

    def _recover(self, verdict: Verdict, store: Store | None) -> None:
        """What follows a step that went wrong: it is left out, or the last checkpoint is taken up with the samples that come next."""
        told = f"{self.guard.reason} at step {self.step + 1}"
        if verdict is Verdict.SKIP:
            warnings.warn(f"{told}: left out", stacklevel=2)
            self.step += 1
            return
        if verdict is Verdict.STOP or store is None or store.latest() is None:
            raise ValueError(f"{told}: lower optimiser.lr or optimiser.clip, and take up the last checkpoint with --resume")
        curriculum, guard = self.curriculum.state(), self.guard.state()
        self._take_up(store)
        self.curriculum.load(curriculum)
        self.guard.load(guard)
        warnings.warn(f"{told}: taken back to step {self.step}", stacklevel=2)

    def _batches(self, micros: Sequence[Micro], draw: Draw, progress: float) -> list[tuple[Any, float]]:
        """The batches of this data rank, as many as of any other, with weight 0 where there is nothing left for it.

        A context parallel group encodes as many batches at a time as it has processes, one each, and all compute on all of them.
        """
        layout = self.layout
        shares = [self._bounded(each) for each in _shares(micros, layout.data_ranks)]
        turns = max(map(len, shares))
        own = [(micro, 1.0) for micro in shares[layout.data_rank]]
        own += [(Micro(micros[0].bucket, micros[0].samples[:1]), 0.0)] * (-(-turns // layout.context) * layout.context - len(own))
        made: list[tuple[Any, float]] = []
        given = {} if (shift := self.curriculum.shift) is None else {"shift": shift}
        for i in range(0, len(own), layout.context):
            micro, weight = own[i + layout.context_rank]
            shape = () if micro.bucket is None else (micro.bucket,)
            made += layout.exchanged([(self.objective.batch(micro.samples, draw, progress, *shape, **given), weight)])
        return made[:turns]

    def _bounded(self, micros: Sequence[Micro]) -> list[Micro]:
        """Micro-batches of at most so many samples as the recipe allows."""
        size = self.config.micro_batch or max((len(micro.samples) for micro in micros), default=1)
        return [Micro(bucket, samples[i : i + size]) for bucket, samples in micros for i in range(0, len(samples), size)]

    def _state(self) -> dict[str, Any]:
        """Everything a resume needs, as tensors that the store fills in place, and plain values."""
        return training_state(
            self.objective.modules, [optimiser for optimiser, _ in self.optimiser.parts], ema=self.ema.state if self.config.ema else {},
            views=self.optimiser.matrices, values=self._values(),
        )  # fmt: skip

    def _values(self) -> dict[str, Any]:
        plateau = self.optimiser.plateau
        return {
            "step": self.step, "curriculum": self.curriculum.state(), "guard": self.guard.state(),
            "plateau": plateau.state() if plateau else {},
        }  # fmt: skip

    def _take_up(self, store: Store) -> None:
        """Go on where the newest checkpoint left; ValueError where there is none, or it is of another recipe."""
        if (step := store.latest()) is None:
            raise FileNotFoundError(f"no checkpoint in '{store.folder}': start the run without --resume")
        if step > self.config.steps:
            raise ValueError(f"'{store.folder}' is at step {step}, past the {self.config.steps} steps of this recipe")
        state = self._state()
        try:
            store.load(step, state)
        except (ValueError, KeyError, RuntimeError) as error:
            raise ValueError(f"{error}: resume a run with the settings it was started with") from error
        values = restore(state, [optimiser for optimiser, _ in self.optimiser.parts])
        store.restore_rng(step)
        self.guard.load(values["guard"])
        if self.optimiser.plateau is not None:
            self.optimiser.plateau.load(values["plateau"])
        self.curriculum.load(values["curriculum"])
        self.step = values["step"]

    def _check_folder(self, folder: Path, resume: bool, overwrite: bool) -> None:
        held = bool(steps(folder)) if folder.exists() else False
        if resume and not held:
            raise FileNotFoundError(f"no checkpoint in '{folder}': start the run without --resume")
        if held and not (resume or overwrite):
            output = self.config.output
            raise ValueError(f"'{output}' holds a run: give --resume to take it up, --overwrite to begin anew, or another output=")
        self.layout.barrier()  # all have looked before one writes
        _make_folder(self.config.output)
        if overwrite and self.layout.is_main:
            shutil.rmtree(folder, ignore_errors=True)
        self.layout.barrier()


def _shares(micros: Sequence[Micro], ranks: int) -> list[list[Micro]]:
    """The micro-batches of every data rank."""
    if micros[0].bucket is None:  # one shape: consecutive samples
        (samples,) = (micro.samples for micro in micros)
        size = -(-len(samples) // ranks)
        return [[Micro(micros[0].bucket, part)] if (part := samples[i * size : (i + 1) * size]) else [] for i in range(ranks)]
    return [share(micros, rank, ranks) for rank in range(ranks)]


def _dataset(config: TrainConfig, pm: pluggy.PluginManager) -> Any:
    """The data set of a recipe, or a mix of several."""
    own = _built("data", config.data, pm)
    if not config.more_data:
        return own
    return Mix({"data": own, **{name: _built(f"more_data.{name}", part, pm) for name, part in config.more_data.items()}})


def _built(field: str, part: PartConfig, pm: pluggy.PluginManager) -> Any:
    build = find("wan_datasets", part.name, pm).resolve()
    try:
        return build(**part.settings)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{field}.settings of '{part.name}': {error}") from error
    except TypeError as error:  # a setting that it does not have, or one of the wrong type
        raise ValueError(f"{field}.settings of '{part.name}': {error}") from error


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise OSError(f"cannot write to output '{folder}': {error.strerror or error}") from error


def _due(step: int, every: int, last: int) -> bool:
    return bool(every) and (step % every == 0 or step == last)

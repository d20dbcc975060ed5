"""The training loop: draw, loss, step, average, log, preview, save; every step is the same after a resume."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from tqdm import tqdm
from wan_dit._shared.weights import usable_device

from . import checkpoint
from .config import TrainConfig
from .optim import EMA, Optimiser, require_finite
from .plugins import find, plugin_manager
from .tracker import Tracker

if TYPE_CHECKING:
    import pluggy

    from .contracts import Objective


class Trainer:
    """Runs one recipe.

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
        dataset = _dataset(config, pm)
        objective = find("wan_objectives", config.objective.name, pm).resolve()
        self.objective: Objective = objective(config.objective.settings, dataset, config.output, config.device, pm)
        self.optimiser = Optimiser(config.optimiser, self.objective.parameter_groups(), config.steps)
        self.ema = EMA(self.objective.modules, config.ema)
        self.step = 0

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
        _make_folder(config.output)
        self.objective.prepare()
        with (
            Tracker(config.output, config.model_dump(mode="json"), self.step) as tracker,
            tqdm(total=last, initial=self.step, disable=not progress) as bar,
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
            self.objective.export(self.ema.modules, str(config.output / "export"))
        return config.output / "export"

    def _preview(self, tracker: Tracker) -> None:
        modules = self.ema.modules.values()
        training = [module.training for module in modules]
        for module in modules:
            module.eval()
        clips, measured = self.objective.preview(self.ema.modules)
        for module, mode in zip(modules, training, strict=True):
            module.train(mode)
        tracker.log(self.step, measured)
        tracker.grid(self.step, clips)

    def _train_step(self) -> dict[str, float]:
        start = time.perf_counter()
        generator = torch.Generator().manual_seed(self.config.seed * 1_000_003 + self.step)  # counter-based: resumes to the same draw
        with torch.autocast(torch.device(self.config.device).type, torch.bfloat16, enabled=self.config.precision == "bf16"):
            loss, figures = self.objective.loss(self.config.batch_size, generator, self.step / self.config.steps)
        require_finite("loss", loss, self.step)
        loss.backward()
        norm = self.optimiser.step(self.step)
        self.ema.update(self.step)
        rate = self.optimiser.rate(self.step)
        return {"loss": loss.item(), **figures, "grad_norm": norm, "lr_share": rate, "seconds": time.perf_counter() - start}

    def save(self, path: Path) -> None:
        """Write everything a resume needs: weights, averaged weights, optimiser, random state, step."""
        state: dict[str, Any] = {
            "step": self.step,
            "modules": {name: module.state_dict() for name, module in self.objective.modules.items()},
            "ema": {name: module.state_dict() for name, module in self.ema.modules.items()},
            "optimiser": self.optimiser.state_dict(),
            "rng": torch.get_rng_state(),
        }
        checkpoint.save(path, state)

    def load(self, path: Path) -> None:
        """Take up where `save` left; ValueError where the checkpoint is of another recipe."""
        state = checkpoint.load(path)
        if state["step"] > self.config.steps:
            raise ValueError(f"'{path}' is at step {state['step']}, past the {self.config.steps} steps of this recipe")
        try:
            for name, module in self.objective.modules.items():
                module.load_state_dict(state["modules"][name])
                self.ema.modules[name].load_state_dict(state["ema"][name])
            self.optimiser.load_state_dict(state["optimiser"])
        except (RuntimeError, KeyError, ValueError) as error:
            raise ValueError(
                f"'{path}' is of other parts or of another optimiser: resume it with the settings it was started with"
            ) from error
        torch.set_rng_state(state["rng"])
        self.step = state["step"]


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

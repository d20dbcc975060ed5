"""The training loop: draw, loss, step, average, log, preview, save; every step is the same after a resume."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from tqdm import tqdm

from . import checkpoint
from .config import TrainConfig
from .optim import EMA, Optimiser
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
        dataset = find("wan_datasets", config.data.name, pm).resolve()(**config.data.settings)
        objective = find("wan_objectives", config.objective.name, pm).resolve()
        self.objective: Objective = objective(config.objective.settings, dataset, config.output, config.device, pm)
        self.optimiser = Optimiser(config.optimiser, self.objective.parameter_groups(), config.steps)
        self.ema = EMA(self.objective.modules, config.ema)
        self.step = 0

    def run(self, *, resume: bool = False, progress: bool = False, until: int | None = None) -> Path:
        """Train to `config.steps` (or stop after `until`) and return the folder of the exported parts."""
        config, last = self.config, min(until or self.config.steps, self.config.steps)
        config.output.mkdir(parents=True, exist_ok=True)
        if resume:
            self.load(config.output / "checkpoint.pt")
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
                    clips, measured = self.objective.preview(self.ema.modules)
                    tracker.log(self.step, measured)
                    tracker.grid(self.step, clips)
                if _due(self.step, config.save_every, last):
                    self.save(config.output / "checkpoint.pt")
        if self.step == config.steps:
            self.objective.export(self.ema.modules, str(config.output / "export"))
        return config.output / "export"

    def _train_step(self) -> dict[str, float]:
        start = time.perf_counter()
        generator = torch.Generator().manual_seed(self.config.seed * 1_000_003 + self.step)  # counter-based: resumes to the same draw
        with torch.autocast(torch.device(self.config.device).type, torch.bfloat16, enabled=self.config.precision == "bf16"):
            loss, figures = self.objective.loss(self.config.batch_size, generator, self.step / self.config.steps)
        loss.backward()
        norm = self.optimiser.step(self.step)
        self.ema.update(self.step)
        if not torch.isfinite(loss):
            raise ArithmeticError(f"the loss is {loss.item()} at step {self.step}: lower optimiser.lr or optimiser.clip")
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
        """Take up where `save` left."""
        state = checkpoint.load(path)
        for name, module in self.objective.modules.items():
            module.load_state_dict(state["modules"][name])
            self.ema.modules[name].load_state_dict(state["ema"][name])
        self.optimiser.load_state_dict(state["optimiser"])
        torch.set_rng_state(state["rng"])
        self.step = state["step"]


def _due(step: int, every: int, last: int) -> bool:
    return bool(every) and (step % every == 0 or step == last)

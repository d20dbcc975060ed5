"""What `benchmarks.py` measures of wan-train: a step against diffusers' model in a plain loop, and tokens a second by layout."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from references import backbone_pair, padded
from timing import Comparison, compare
from torch import Tensor, nn
from wan_dit.caching import relative_error
from wan_dit.config import TINY, DiTConfig
from wan_dit.layouts import names
from wan_train.config import TrainConfig
from wan_train.optim import gradient_norm
from wan_train.randomness import generator
from wan_train.trainer import Trainer

RECIPE = """
name = "bench"
output = "run"
steps = 1000000
batch_size = 1
threads = 1
log_every = 1
preview_every = 0
save_every = 0

[objective]
name = "rectified-flow"
settings.clips = 4

[data]
name = "shapes"
"""
FRAMES, SIZES = 9, {300: (160, 160), 1560: (320, 416)}  # tokens: height and width
LAYOUTS = {  # name -> processes, and what is changed in the recipe
    "one process": (1, []),
    "DP 2": (2, []),
    "FSDP 2": (2, ["parallel.fsdp=2"]),
    "Ulysses 2": (2, ["parallel.ulysses=2"]),
    "Ring 2": (2, ["parallel.ring=2"]),
}
TOKENS, SAMPLES = 300, 2  # of a step of a layout: tokens of a sample, samples
STEPS, ROUNDS = 3, 2  # of a layout: steps, the first of which does not count, and runs


@dataclass(frozen=True)
class Case:
    """Clips of FRAMES frames, and the rows that the reference pads a prompt to."""

    tokens: int
    samples: int
    text_len: int
    pairs: int

    @property
    def name(self) -> str:
        samples = "one sample" if self.samples == 1 else f"{self.samples} samples"
        return f"{self.tokens:,} tokens, {samples}, prompts padded to {self.text_len}"


CASES = (Case(300, 1, 512, 5), Case(300, 1, 32, 5), Case(300, 2, 512, 3), Case(1560, 1, 512, 2), Case(1560, 1, 32, 3))


def architecture(dim: int = 512, layers: int = 6, ffn_dim: int = 2048, heads: int = 8, text_len: int = 512) -> DiTConfig:
    """A backbone of this size in the latent and the embedding space of the built-in parts."""
    sizes = {"dim": dim, "num_layers": layers, "ffn_dim": ffn_dim, "num_heads": heads, "text_len": text_len, "freq_dim": 256}
    return TINY.model_copy(update=sizes)


def changed(config: DiTConfig) -> str:
    """The recipe's field for a backbone of this config, with the weights that training starts from."""
    fields = config.model_dump(include={"dim", "num_layers", "ffn_dim", "num_heads", "text_len", "freq_dim"})
    return f"objective.settings.architecture={{{', '.join(f'{name} = {value}' for name, value in fields.items())}}}"


def clips(frames: int, size: tuple[int, int]) -> list[str]:
    return [f"data.settings={{frames = {frames}, size = {list(size)}}}"]


class PlainLoop:
    """A training loop as one writes it around diffusers' model, over the latents and the embeddings that ours has cached.

    model: WanTransformer3DModel; latents: `[N, C, T', H', W']`; rows: a prompt of each, padded, `[N, text_len, D]`
    """

    def __init__(self, model: Any, latents: Tensor, rows: Tensor, config: TrainConfig) -> None:
        self.model, self.latents, self.rows, self.config = model.to(config.device).train(), latents, rows, config
        given = config.optimiser
        self.optimiser = torch.optim.AdamW(self.model.parameters(), given.lr, given.betas, weight_decay=given.weight_decay)

    def loss(self, clean: Tensor, noise: Tensor, sigma: Tensor, rows: Tensor) -> Tensor:
        clean, noise, sigma, rows = (value.to(self.config.device) for value in (clean, noise, sigma, rows))
        share = sigma.view(-1, 1, 1, 1, 1)
        with torch.autocast(torch.device(self.config.device).type, torch.bfloat16, enabled=self.config.precision == "bf16"):
            mixed = (1 - share) * clean + share * noise
            velocity = self.model(hidden_states=mixed, timestep=1000 * sigma, encoder_hidden_states=rows, return_dict=False)[0]
        return nn.functional.mse_loss(velocity.float(), noise - clean)

    def step(self) -> float:
        picked = torch.randint(len(self.latents), (self.config.batch_size,))
        clean, u = self.latents[picked], torch.randn(len(picked)).sigmoid()
        loss = self.loss(clean, torch.randn_like(clean), 3 * u / (1 + 2 * u), self.rows[picked])
        loss.backward()
        self.update()
        return loss.item()

    def update(self) -> None:
        nn.utils.clip_grad_norm_(self.model.parameters(), self.config.optimiser.clip)
        self.optimiser.step()
        self.optimiser.zero_grad()


def training_pair(config: DiTConfig, folder: Path, overrides: list[str]) -> tuple[Trainer, PlainLoop]:
    """Our trainer and the loop, from the same random weights, with everything encoded before the first step."""
    ours, theirs = backbone_pair(config)
    ours.save_pretrained(folder / "backbone")
    start = ["objective.settings.init=pretrained", f"objective.settings.backbone={folder / 'backbone'}"]
    trainer = Trainer(TrainConfig.from_toml(recipe(folder), [*start, *overrides]))
    trainer._prepare()
    objective: Any = trainer.objective
    captions = [objective.dataset.captions(i) for i in range(objective.samples)]
    for prompt in ("", *(caption for of_clip in captions for caption in of_clip)):
        objective.cache.context(prompt)
    rows = torch.cat([padded(objective.cache.context(of_clip[0]), config.text_len) for of_clip in captions])
    return trainer, PlainLoop(theirs, objective.latents, rows, trainer.config)


def recipe(folder: Path) -> Path:
    """The recipe, whose runs lie in this folder."""
    path = folder / "recipe.toml"
    path.write_text(RECIPE.replace('"run"', f'"{folder / "run"}"'))
    return path


def first_step(trainer: Trainer, loop: PlainLoop, config: DiTConfig) -> float:
    """A step of both on one batch, which warms them up; relative L2 between their gradients."""
    objective: Any = trainer.objective
    batch = objective.batch(list(range(trainer.config.batch_size)), partial(generator, 0, 0), 0.0)
    rows = torch.cat([padded(tokens, config.text_len) for tokens in batch.context])
    with torch.autocast(torch.device(trainer.config.device).type, torch.bfloat16, enabled=trainer.config.precision == "bf16"):
        losses, _ = objective.losses(batch)
    losses.mean().backward()
    loop.loss(batch.clean, batch.noise, batch.sigma, rows).backward()
    table = names(config, "diffusers")
    ours = {table[name]: value.grad for name, value in objective.backbone.named_parameters()}
    theirs = {name: value.grad for name, value in loop.model.named_parameters()}
    apart = relative_error(_flat(ours, ours), _flat(theirs, ours))
    trainer.optimiser.step(0, float(gradient_norm(trainer.optimiser.params)))
    loop.update()
    return apart


def _flat(values: Mapping[str, Any], order: Mapping[str, Any]) -> Tensor:
    return torch.cat([values[name].flatten() for name in order])


@torch.enable_grad()
def steps() -> Iterator[Comparison]:
    """Forward, backward, clipping and AdamW."""
    for case in CASES:
        config = architecture(text_len=case.text_len)
        with tempfile.TemporaryDirectory() as folder:
            overrides = [*clips(FRAMES, SIZES[case.tokens]), f"batch_size={case.samples}"]
            trainer, loop = training_pair(config, Path(folder), overrides)
            apart = first_step(trainer, loop, config)
            yield compare(case.name, trainer._train_step, loop.step, case.pairs, difference=apart, warm=False)


def layouts() -> Iterator[list[str]]:
    """Rows of tokens a second: of the command, in fresh processes, one layout after the other, and again."""
    rates: dict[str, list[float]] = {name: [] for name in LAYOUTS}
    with tempfile.TemporaryDirectory() as folder:
        given = [*clips(FRAMES, SIZES[TOKENS]), changed(architecture()), f"batch_size={SAMPLES}", f"steps={STEPS}"]
        for _ in range(ROUNDS):
            for name, (processes, overrides) in LAYOUTS.items():
                seconds = _run(Path(folder), [*given, *overrides], processes)
                rates[name].append(SAMPLES * TOKENS / statistics.median(seconds[1:]))
    single = rates["one process"]
    for name, found in rates.items():
        shares = [rate / one for rate, one in zip(found, single, strict=True)]
        spread = f"**{statistics.median(shares):.2f}** ({min(shares):.2f} .. {max(shares):.2f})"
        yield [name, f"{statistics.median(found):,.0f}", spread, str(ROUNDS)]


def _run(folder: Path, overrides: list[str], processes: int) -> list[float]:
    """Seconds of each step of `wan-train run`."""
    words = ["run", str(recipe(folder)), *overrides, "--overwrite", "--nproc", str(processes)]
    command = [sys.executable, "-m", "wan_train", *words]
    subprocess.run(command, check=True, capture_output=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    return [json.loads(line)["seconds"] for line in (folder / "run" / "log.jsonl").read_text().splitlines()]

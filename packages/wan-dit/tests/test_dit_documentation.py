"""The pages on models and tasks: every example runs, with small random models in place of the large ones."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from documentation import ROOT, Block, blocks, run, shell_lines, write_film
from PIL import Image
from wan_dit.cli import main
from wan_dit.config import TINY
from wan_dit.model import WanDiT
from wan_dit.plugin import wan_models

PAGE = ROOT / "docs" / "wan-dit-tasks.md"
NAMES = [model.name for model in wan_models() if model.name != "tiny"]
EXAMPLES = [block for block in blocks(PAGE) if block.title.endswith(".py")]
COMMANDS = [words for block in blocks(PAGE) for words in shell_lines(block) if words[1] == "generate"]
BACKBONES = {"i2v": {"in_dim": 36}, "flf2v": {"in_dim": 36}, "vace": {"vace_layers": (0,)}, "ti2v": {}}
PLUGIN = """
from dataclasses import replace
from wan_dit.checkpoint import describe
from wan_dit.plugin import wan_models as official
from wan_dit.plugins import hookimpl

def backbone(model):
    return "wan-dit:tiny" if model.task in ("t2v", "t2i") else "wan-small:small-" + model.task

@hookimpl
def wan_backbones():
    return [replace(describe(f"{folder}/{{task}}"), name=f"small-{{task}}", weights=f"{folder}/{{task}}") for task in {tasks}]

@hookimpl
def wan_models():
    shared = dict(vae="wan-vae:tiny", text_encoder="wan-text:tiny", image_encoder=None, negative_prompt="", steps=2, size=(64, 64), fps=8)
    for model in official():
        low = backbone(model) if model.low_noise_backbone else None
        frames = min(model.frames, 13)
        yield replace(model, name="small-" + model.name, backbone=backbone(model), low_noise_backbone=low, frames=frames, **shared)
"""


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random backbone of every way to take what is given besides text."""
    folder = tmp_path_factory.mktemp("backbones")
    for seed, (task, architecture) in enumerate(BACKBONES.items()):
        model = WanDiT(TINY.model_copy(update={"dim": 32, "ffn_dim": 64, "num_heads": 2, "num_layers": 2, **architecture}))
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
        model.save_pretrained(folder / task)
    return folder


@pytest.fixture
def inputs(weights: Path, install: Callable[..., None], here: Path) -> None:
    """What the page names: pictures, films, prompts, and models `small-NAME` that are used as NAME is."""
    install("wan-small", PLUGIN.format(folder=weights, tasks=list(BACKBONES)))
    for seed, name in enumerate(("cat", "noon", "evening", "mask", "bag", "face")):
        Image.fromarray(np.random.default_rng(seed).integers(0, 256, (48, 64, 3), dtype=np.uint8)).save(here / f"{name}.png")
    for name in ("depth", "street"):
        write_film(here / f"{name}.mp4", frames=17, size=(48, 64))
    (lines,) = [block.text for block in blocks(PAGE) if block.title == "prompts.jsonl"]
    (here / "prompts.jsonl").write_text(lines)


def in_small(text: str) -> str:
    return re.sub("|".join(map(re.escape, NAMES)), lambda name: f"small-{name[0]}", text).replace('"cuda"', '"cpu"')


@pytest.mark.parametrize("block", EXAMPLES, ids=lambda block: block.title)
@pytest.mark.filterwarnings("ignore::UserWarning")  # words that the built-in models do not know
def test_an_example_in_python_runs(inputs: None, here: Path, block: Block) -> None:
    before, text = set(here.iterdir()), block.text
    exec(compile(in_small(text), PAGE.name, "exec"), {"__name__": "__main__"})
    written = set(re.findall(r'\.save\("([^"]+)"\)', text))
    assert written
    assert written <= {path.name for path in set(here.iterdir()) - before}


@pytest.mark.parametrize("words", COMMANDS, ids=lambda words: " ".join(words[2:])[:100])
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_command_runs(inputs: None, here: Path, words: list[str]) -> None:
    assert run([in_small(word) for word in words] + ["--device", "cpu"]) == 0
    output = Path(words[words.index("--output") + 1])
    assert (here / output).exists() or list(here.glob(f"{output.parent}/0*.png"))


def test_every_task_has_a_command_and_an_example() -> None:
    shown = {name for words in COMMANDS for name in NAMES if name in words}
    tasks = {model.task for model in wan_models()}
    for given in (shown, {name for name in NAMES for block in EXAMPLES if name in block.text}):
        assert {model.task for model in wan_models() if model.name in given} == tasks


def test_the_table_of_models_is_what_the_command_prints(capsys: pytest.CaptureFixture[str]) -> None:
    (table,) = [block.text for block in blocks(ROOT / "docs" / "wan-dit-models.md") if block.title == "wan-dit models"]
    assert main(["models"]) == 0
    assert table == capsys.readouterr().out

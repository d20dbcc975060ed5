"""The recipes of the published models: planned for the GPUs that they name, and run at tiny width; fresh weights without published ones."""

from __future__ import annotations

import json
import math
import re
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from wan_dit.config import DiTConfig
from wan_dit.model import WanDiT
from wan_dit.parameters import count_parameters
from wan_dit.plugin import wan_backbones
from wan_train.cli import main
from wan_train.config import TrainConfig
from wan_train.data.tensor_files import TensorFiles
from wan_train.parts import fresh
from wan_train.planning.gpus import GPUS
from wan_train.planning.plan import Plan
from wan_train.planning.recipe import architecture, degrees, read
from wan_train.planning.timing import default_rates
from wan_train.plugins import find
from wan_train.published import published
from wan_train.trainer import Trainer
from wan_vae.config import PRESETS, VAEConfig
from wan_vae.model import WanVAE
from wan_vae.video import VideoWriter

FOLDER = Path(str(files("wan_train") / "recipes"))
RECIPES = [file.stem for file in sorted(FOLDER.glob("wan2*.toml")) if TrainConfig.from_toml(file.stem).objective.name == "rectified-flow"]
UMT5 = 2 * 5_680_910_336  # bytes of the text encoder in bf16, which every GPU holds beside what a plan counts
SMALL = {
    "dim": 32, "ffn_dim": 32, "freq_dim": 16, "num_heads": 2, "num_layers": 1, "text_dim": 96, "text_len": 32, "embedding_space": "tiny-2",
}  # fmt: skip
START = re.compile(
    r"^#(?: Start on .*:)? +(?:torchrun --nnodes (\d+) --nproc-per-node (\d+) .*-m wan_train|wan-train) run (\S+)(?: --nproc (\d+))?$", re.M
)


def gpus(name: str) -> int:
    """Those of the command in a recipe's head."""
    found = START.search((FOLDER / f"{name}.toml").read_text())
    assert found, "the command that starts it"
    assert found[3] == name
    return math.prod(int(found[i] or 1) for i in (1, 2, 4))


def test_there_is_a_recipe_for_each_kind_of_training() -> None:
    wanted = {"wan2.1-t2v-1.3b", "wan2.1-t2v-14b", "wan2.2-a14b-high", "wan2.2-a14b-low", "wan2.2-ti2v-5b", "wan2.1-t2v-14b-lora"}
    assert wanted | {"wan2.2-i2v-a14b-high", "wan2.2-i2v-a14b-low", "wan2.1-flf2v-14b", "wan2.1-vace-14b"} <= set(RECIPES)
    assert (gpus("wan2.1-t2v-14b"), gpus("wan2.1-t2v-14b-lora"), gpus("wan2.1-t2v-1.3b-lora")) == (128, 8, 1)


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_fits_on_the_gpus_that_it_names(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    config, count = TrainConfig.from_toml(name), gpus(name)
    vae = find("wan_vaes", config.objective.settings["vae"])
    for stage in config.stages:
        asked = read(config.model_copy(update={"stages": (stage,)}), count)
        plan = Plan(asked.job, degrees(asked, 8), GPUS["h100"], default_rates(GPUS["h100"], asked.job.precision), asked.wanted)
        assert plan.degrees.gpus == count
        assert asked.job.accumulate == 1, "whole gradients would wait"
        assert plan.memory.total + UMT5 + 4 * vae.parameters <= plan.room, stage.name
    assert main(["plan", "--config", name, "--gpus", str(count)]) == 0
    assert "can be used: fits" in capsys.readouterr().out


def test_the_curriculum_is_that_of_the_report() -> None:
    for name in ("wan2.1-t2v-14b", "wan2.1-t2v-1.3b"):
        stages = TrainConfig.from_toml(name).stages
        assert [(stage.image or stage.video, stage.video) for stage in stages[:4]] == [
            ((256, 256), (256, 256)), ((256, 256), (192, 336)), ((480, 832), (480, 832)), ((720, 1280), (720, 1280)),
        ]  # fmt: skip
        assert stages[0].weights["video"] == 0
        assert {stage.video for stage in stages[4:]} == {(480, 832), (720, 1280)}
        assert all(stage.frames == (81,) for stage in stages)
    layout = TrainConfig.from_toml("wan2.1-t2v-14b").parallel
    assert (layout.ulysses, layout.ring, layout.fsdp) == (8, 2, 32)


@pytest.mark.parametrize("name", [name for name in RECIPES if "a14b" in name])
def test_an_expert_is_trained_on_its_side_of_the_models_boundary(name: str) -> None:
    settings = TrainConfig.from_toml(name).objective.settings
    kind, side = settings["backbone"].rsplit("-", 1)
    model = find("wan_models", kind)
    assert name.endswith(f"-{side}")
    assert (settings["expert"], settings["boundary"], settings["shift"]) == (side, model.boundary, model.shift)
    assert settings.get("task", "t2v") == model.task


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folders `videos` and `images`, with captions."""
    folder, rng = tmp_path_factory.mktemp("data"), np.random.default_rng(0)
    for kind in ("videos", "images"):
        (folder / kind).mkdir()
        for i in range(4):
            (folder / kind / f"{i}.txt").write_text(f"a red circle, number {i}")
    for i in range(4):
        Image.fromarray(rng.integers(0, 256, (64, 96, 3), np.uint8)).save(folder / "images" / f"{i}.png")
        with VideoWriter(folder / "videos" / f"{i}.mp4", fps=16, size=(96, 64)) as writer:
            for _ in range(9):
                writer.write(rng.integers(0, 256, (64, 96, 3), np.uint8))
    return folder


@pytest.fixture(scope="module")
def vaes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The published VAEs at a width of 4, untrained, each in the folder of its name."""
    folder = tmp_path_factory.mktemp("vaes")
    for name in ("wan2.1", "wan2.2"):
        torch.manual_seed(0)
        small = {**PRESETS[name].model_dump(), "base_dim": 4, "decoder_base_dim": 4, "num_res_blocks": 1}
        WanVAE(VAEConfig(**small)).save_pretrained(folder / name)
    return folder


def tiny(name: str, data: Path, vaes: Path, folder: Path) -> TrainConfig:
    """A recipe as it is but for widths, sizes, steps and the number of processes: a step a stage, and two of a single one."""
    values = TrainConfig.from_toml(name).model_dump()
    settings = values["objective"]["settings"]
    grid = 32 if settings["vae"] == "wan2.2" else 16
    steps = max(2, len(values["stages"]))
    values |= {"parallel": {}, "device": "cpu", "threads": 1, "log_every": 1, "output": folder / "run", "steps": steps}
    for until, stage in enumerate(values["stages"], 1 + steps - len(values["stages"])):
        stage |= {"until": until, "frames": [5], "tokens": 60, "samples": 2, "micro_batches": 2}
        stage |= {side: _reduced(stage[side], grid) for side in ("video", "image") if stage[side]}
    for part in (values["data"], *values["more_data"].values()):
        given = part["settings"]
        given["path"] = data / ("images" if "images" in given["path"] else "videos")
        given |= {"frames": 5} | ({"size": _reduced(given["size"], grid)} if "size" in given else {})
    small = {**SMALL, "vace_layers": [0]} if settings.get("task") == "vace" else SMALL
    if settings["init"] == "random":
        settings["architecture"] = small
    else:
        torch.manual_seed(0)
        backbone = WanDiT(architecture(settings["backbone"], small))
        for parameter in backbone.parameters():
            torch.nn.init.normal_(parameter, std=0.1)  # no zeros in the head, through which nothing else would learn
        backbone.save_pretrained(folder / "published")
        settings["backbone"] = str(folder / "published")
    settings |= {"vae": str(vaes / settings["vae"]), "text_encoder": "tiny", "preview_prompts": 1, "preview_steps": 1}
    return TrainConfig.model_validate(values)


def _reduced(size: Any, grid: int) -> list[int]:
    return [grid * max(1, round(side / 240)) for side in size]


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_runs_at_tiny_width(name: str, data: Path, vaes: Path, tmp_path: Path) -> None:
    config = tiny(name, data, vaes, tmp_path)
    trainer = Trainer(config)
    settings: Any = trainer.objective.settings  # type: ignore[attr-defined]
    start = {key: value.detach().clone() for key, value in next(iter(trainer.objective.modules.values())).state_dict().items()}
    exported = trainer.run()
    rows = [json.loads(line) for line in (config.output / "log.jsonl").read_text().splitlines()]
    losses = [row["loss"] for row in rows if "loss" in row]
    assert len(losses) == config.steps
    assert all(map(math.isfinite, losses))
    after = next(iter(trainer.objective.modules.values())).state_dict()
    assert any(not torch.equal(after[key], value) for key, value in start.items()), "nothing was trained"
    if settings.train == "lora":
        assert (exported / "lora.safetensors").is_file()
    else:
        assert WanDiT.from_pretrained(exported / "backbone").config == trainer.objective.backbone.config  # type: ignore[attr-defined]
    if settings.expert:
        sigma = trainer.objective.sigmas(1000, torch.Generator().manual_seed(0))  # type: ignore[attr-defined]
        assert bool((sigma >= settings.boundary).all() if settings.expert == "high" else (sigma < settings.boundary).all())


def test_folders_that_are_not_there_are_told_with_their_field(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"^data\.settings of 'folder': no folder or listing at path 'data/videos'$"):
        Trainer(TrainConfig.from_toml("wan2.1-t2v-1.3b-lora", ["device=cpu"]))
    (tmp_path / "data" / "videos").mkdir(parents=True)
    Image.new("RGB", (32, 32)).save(tmp_path / "data" / "videos" / "a.png")
    (tmp_path / "data" / "videos" / "a.txt").write_text("a picture")
    with pytest.raises(FileNotFoundError, match=r"^more_data\.images\.settings of 'folder': no folder or listing at path 'data/images'$"):
        Trainer(TrainConfig.from_toml("wan2.1-t2v-14b", ["device=cpu", "parallel={}"]))


def test_the_tiny_curriculum_is_that_of_the_report_in_small(tmp_path: Path) -> None:
    sizes = ["data.settings.length=4", "more_data.pictures.settings.length=4", "objective.settings.tokenizer=320"]
    config = TrainConfig.from_toml("tiny-t2v", [f"output={tmp_path}", "steps=6", "batch_size=2", "log_every=1", "preview_every=0", *sizes])
    images, joint, larger = config.stages
    assert images.weights == {"video": 0.0}
    assert images.image == joint.image == joint.video
    assert larger.video > joint.video
    assert all(stage.weights.get("image", 1) > 0 for stage in config.stages)
    stages = tuple(stage.model_copy(update={"until": 2 * i + 2}) for i, stage in enumerate(config.stages))
    Trainer(config.model_copy(update={"stages": stages})).run()
    rows = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "loss" in row] == [1, 2, 3, 4, 5, 6]
    files = TensorFiles(tmp_path / "cache")
    shapes = {tuple(files.facts(key)["bucket"]) for key in files.keys() if files.facts(key)["kind"] == "latents"}  # noqa: SIM118
    assert (1, 48, 48) in shapes
    assert shapes <= {(1, 48, 48), (17, 48, 48), (1, 64, 64), (17, 64, 64)}
    assert (tmp_path / "export" / "backbone").is_dir()


def test_a_plan_is_of_the_part_of_a_stage_that_takes_the_most_memory() -> None:
    config = TrainConfig.from_toml("wan2.1-t2v-14b")
    stages = [config.stages[2].model_copy(update={"samples": samples}) for samples in (12, 1)]
    jobs = [read(config.model_copy(update={"stages": (stage,)}), 128).job for stage in stages]
    assert [(job.buckets[0].frames, job.micro_batch) for job in jobs] == [(1, 12), (81, 1)], "the prompts of 12 pictures, or one video"


# fresh weights


@pytest.mark.parametrize("spec", [spec for spec in wan_backbones() if spec.name != "tiny"], ids=lambda spec: spec.name)
def test_published_backbones_are_known_without_their_weights(spec: Any) -> None:
    config = published(spec)
    assert count_parameters(config) == spec.parameters
    assert config == architecture(spec.name)
    facts = ("latent_space", "latent_channels", "stride", "embedding_space", "in_channels", "image_dim", "image_tokens", "vace")
    assert all(getattr(config.spec(), fact) == getattr(spec, fact) for fact in facts)


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever looks for a file on the Hub fails."""

    def refuse(*given: Any, **options: Any) -> Any:
        raise AssertionError(f"asks the Hub for {given}")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", refuse)
    monkeypatch.setattr("huggingface_hub.snapshot_download", refuse)


@pytest.mark.usefixtures("offline")
def test_fresh_weights_need_no_published_ones() -> None:
    spec = find("wan_backbones", "wan2.2-t2v-a14b-low")
    small = fresh(spec, "random", SMALL, "cpu")
    assert small.config == DiTConfig(**{**published(spec).model_dump(), **SMALL})
    assert float(small.trunk.blocks[0].ffn[0].weight.detach().std()) > 0
    assert float(small.head.proj.weight.detach().abs().max()) == 0, "as `init_weights` draws them"
    assert small.training
    vae = fresh(find("wan_vaes", "wan2.2"), "random", {"base_dim": 4, "decoder_base_dim": 4}, "cpu")
    assert (vae.config.z_dim, vae.config.base_dim, vae.config.latents_mean) == (48, 4, ())
    with pytest.raises(AssertionError, match="asks the Hub"):
        fresh(spec, "pretrained", {}, "cpu")
    with pytest.raises(ValueError, match=r"architecture of 'wan2\.1': width"):
        fresh(find("wan_vaes", "wan2.1"), "random", {"width": 4}, "cpu")


class Other:
    """The spec of another package's backbone, which is known by its `load` alone."""

    name, weights = "other", "hub:someone/else"

    def load(self, **given: Any) -> Any:
        return WanDiT(DiTConfig(**SMALL))


def test_a_part_that_is_known_by_its_weights_alone_is_loaded_for_its_configuration() -> None:
    part = fresh(Other(), "random", {"num_layers": 2}, "cpu")
    assert (part.config.num_layers, part.config.dim) == (2, 32)

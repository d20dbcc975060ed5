"""The recipes of VAEs: their architectures can be built, their clips fit, and they run through their phases at tiny width."""

from __future__ import annotations

import tomllib
from importlib.resources import files
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from wan_train import TrainConfig, Trainer
from wan_train.objectives.vae import VAESettings
from wan_train.parts import check_clips
from wan_train.plugins import find
from wan_train.published import published
from wan_train.store import shards
from wan_train.store.manifest import folder_name
from wan_vae.config import VAEConfig
from wan_vae.model import WanVAE

FOLDER = Path(str(files("wan_train") / "recipes"))
SIX = 6 * (8,)
NARROW: dict[str, dict[str, Any]] = {  # by the start of a VAE's name
    "wan": {"base_dim": 4, "decoder_base_dim": 4, "z_dim": 4, "num_res_blocks": 1},
    "residual": {"base_dim": 4, "decoder_base_dim": 4, "z_dim": 4, "num_res_blocks": 1},
    "dc-ae": {
        "encoder_dims": SIX, "decoder_dims": SIX, "encoder_depths": (0, *5 * (1,)), "decoder_depths": (0, *5 * (1,)),
        "z_dim": 4, "head_dim": 4,
    },
    "ltx": {"encoder_base_channels": 4, "decoder_base_channels": 4, "latent_channels": 4},
}  # fmt: skip
MEAN, STD = (0.1, 0.2, 0.3, 0.4), (0.5, 1.0, 1.5, 2.0)
DECOUPLED = [(), ("encoder_head", "decoder_input"), ("decoder_head",)]  # what DC-AE's phases train, where () is all


def recipes() -> list[str]:
    """Those of VAEs at their published size."""
    found = [file.stem for file in sorted(FOLDER.glob("*.toml")) if not file.stem.startswith("tiny")]
    return [name for name in found if TrainConfig.from_toml(name).objective.name == "vae"]


def settings_of(name: str) -> VAESettings:
    return VAESettings(**TrainConfig.from_toml(name).objective.settings)


def config_of(settings: VAESettings) -> Any:
    """The configuration that a recipe trains; from random weights there are no statistics of latents yet."""
    known = published(find("wan_vaes", settings.vae))
    fresh = isinstance(known, VAEConfig) and settings.init == "random"
    return type(known)(**{**known.model_dump(), **({"latents_mean": (), "latents_std": ()} if fresh else {}), **settings.architecture})


def test_there_is_a_recipe_for_each_kind_of_training() -> None:
    assert {"wan2.1-vae", "wan2.2-vae", "vae-high-resolution", "dc-ae", "residual-vae", "ltx-vae", "wan2.1-vae-d"} <= set(recipes())


@pytest.mark.parametrize("name", recipes())
def test_a_recipe_builds_its_vae_and_its_clips_fit(name: str) -> None:
    settings, data = settings_of(name), TrainConfig.from_toml(name).data.settings
    config, spec = config_of(settings), find("wan_vaes", settings.vae)
    with torch.device("meta"):
        vae = spec.resolve()(config)
    assert sum(param.numel() for params in vae.parameter_groups().values() for param in params) == sum(p.numel() for p in vae.parameters())
    if settings.architecture.keys() == {"latent_space"}:
        assert sum(param.numel() for param in vae.parameters()) == spec.parameters
    assert (config.latent_space == spec.latent_space) is (settings.init == "pretrained"), "others' latents are not those of a new encoder"
    clips = torch.empty(1, 3, data["frames"], *data["size"], device="meta")
    for frames, size in [(data["frames"], None), *(shape for phase in settings.phases for shape in phase.shapes)]:
        check_clips(clips, vae.spec.stride, frames, *(2 * [size] if size else data["size"]))


@pytest.mark.parametrize("name", ["dc-ae", "residual-vae", "vae-high-resolution"])
def test_decoupled_phases_are_those_of_the_paper(name: str) -> None:
    """Low resolution, high, low; all, the middle, the end; and an adversary in the last one alone."""
    phases = settings_of(name).phases
    assert [phase.trains for phase in phases] == DECOUPLED
    assert [phase.adversary > 0 for phase in phases] == [False, False, True]
    low, high, last = (phase.size for phase in phases)
    assert max(low) == max(last) < min(high)


def test_the_losses_of_ltx_are_those_of_the_paper() -> None:
    settings = settings_of("ltx-vae")
    assert settings.discriminator.judges == "pair"
    assert all(weight > 0 for weight in (settings.l2, settings.wavelet, settings.perceptual, settings.kl))
    assert config_of(settings).latent_log_var == "uniform"
    assert config_of(settings).timestep_conditioning


def tiny(name: str, output: Path) -> TrainConfig:
    """A recipe as it is but for widths, sizes and data: two steps a phase, each of which is saved."""
    values = tomllib.loads((FOLDER / f"{name}.toml").read_text())
    settings = values["objective"]["settings"]
    small = next(fields for start, fields in NARROW.items() if settings["vae"].startswith(start))
    fields = {"architecture": {**settings["architecture"], **small}, "statistics": 2, "validation": 2}
    settings["discriminator"] = {**settings.get("discriminator", {}), "base_dim": 4}
    time, grid, _ = config_of(VAESettings(**{**settings, **fields, "init": "random"})).stride
    if settings.get("init") == "pretrained":
        untold = published(find("wan_vaes", settings["vae"])).model_copy(update={**small, "latents_mean": MEAN, "latents_std": STD})
        torch.manual_seed(0)
        WanVAE(untold).save_pretrained(output.parent / "published")
        fields |= {"vae": str(output.parent / "published"), "architecture": settings["architecture"]}
    settings |= fields
    phases, sizes = settings["phases"], sorted({size for phase in VAESettings(**settings).phases for size in phase.size})
    for i, phase in enumerate(phases):
        lists = {key: phase[key] if isinstance(phase[key], list) else [phase[key]] for key in ("frames", "size")}
        phase |= {"until": (i + 1) / len(phases), "frames": sorted({min(frames, 1 + 2 * time) for frames in lists["frames"]})}
        phase |= {"size": [grid * (1 + sizes.index(size)) for size in lists["size"]], "batch": min(phase.get("batch", 2), 2)}
    frames = max(frames for phase in phases for frames in phase["frames"])
    shape = {"frames": frames, "size": 2 * [grid * len(sizes)], "length": 4}
    run = {"steps": 2 * len(phases), "batch_size": 2, "micro_batch": 0, "precision": "fp32", "device": "cpu", "output": output}
    often = {"log_every": 1, "save_every": 1, "keep": 20, "preview_every": 0}
    return TrainConfig.model_validate({**values, **run, **often, "data": {"name": "shapes", "settings": shape}})


@pytest.mark.parametrize("name", recipes())
def test_the_recipes_run_through_all_of_their_phases(tmp_path: Path, name: str) -> None:
    config = tiny(name, tmp_path / "run")
    with pytest.warns(UserWarning, match="the perceptual term is off"):
        trainer = Trainer(config)
    objective: Any = trainer.objective
    for param in objective.vae.parameters():
        if not param.detach().any():  # through which nothing behind it would learn
            torch.nn.init.normal_(param, std=0.1)
    start = {name: value.clone() for name, value in objective.vae.state_dict().items()}
    folder = trainer.run()
    names = {id(param): name for name, param in objective.vae.named_parameters()}
    parts = {part: {names[id(param)] for param in params} for part, params in objective.vae.parameter_groups().items()}
    kept = [start, *(weights(config, step) for step in range(2, config.steps + 1, 2))]
    for phase, (before, after) in zip(objective.settings.phases, pairwise(kept), strict=True):
        moved = {name for name in start if not torch.equal(before[name], after[name])}
        learning = set().union(*(parts[part] for part in phase.trains or parts))
        assert moved & set(names.values()) <= learning
        assert {part for part, own in parts.items() if own & moved} == set(phase.trains or parts)
        if phase.trains:
            assert moved <= learning, "statistics stay as well"
    assert objective.settings.phases[-1].adversary > 0
    exported = find("wan_vaes", str(folder / "vae")).load(dtype=torch.float32)
    clip = objective.dataset.video([0])
    assert exported.decode(exported.encode(clip)).shape == clip.shape
    if name == "wan2.1-vae-d":
        assert exported.config.timestep_conditioning
        assert (exported.config.latent_space, exported.config.latents_mean, exported.config.latents_std) == ("wan2.1", MEAN, STD)
        assert torch.allclose(exported.encode(clip), objective.vae.encode(clip), atol=0.02), "but for the digits that fp16 does not keep"


def weights(config: TrainConfig, step: int) -> dict[str, Tensor]:
    """Of the VAE after a step."""
    prefix = "modules/vae/"
    found = shards.read_whole(config.output / "checkpoints" / folder_name(step), prefix)
    return {name.removeprefix(prefix): value for name, value in found.items()}

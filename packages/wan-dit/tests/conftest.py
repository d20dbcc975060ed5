"""For the tests: a folder, a recorded backbone, and plugins, in `thirdparty` or written into a temporary folder."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor
from wan_dit.plugins import load_backbone  # imports no huggingface_hub

os.environ["HF_HUB_OFFLINE"] = "1"  # before anything imports huggingface_hub, which reads it once
THIRDPARTY = Path(__file__).parent / "thirdparty"
sys.path.insert(0, str(Path(__file__).parent / "processes"))  # what other processes of the tests import
Install = Callable[..., None]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder, the working directory of the test."""
    folder = tmp_path / "here"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


@pytest.fixture
def acme(monkeypatch: pytest.MonkeyPatch) -> Path:
    """Put the third-party package `acme-wan` on the path; returns the folder."""
    monkeypatch.syspath_prepend(str(THIRDPARTY))
    return THIRDPARTY


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Install:
    """Install a distribution with one module: `install("wan-foo", source, entry="wan-foo")`."""
    site = tmp_path / "installed"
    site.mkdir()
    monkeypatch.syspath_prepend(str(site))

    def write(name: str, source: str, *, entry: str | None = None, version: str = "1.0") -> None:
        module = name.replace("-", "_").lower()
        monkeypatch.delitem(sys.modules, module, raising=False)
        (site / f"{module}.py").write_text(source)
        info = site / f"{module}-{version}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        (info / "entry_points.txt").write_text(f"[wan]\n{entry or name} = {module}\n")
        importlib.invalidate_caches()

    return write


class Recorder:
    """A backbone around another that remembers what it was asked."""

    def __init__(self) -> None:
        self.backbone = load_backbone("tiny")
        self.spec = self.backbone.spec
        self.latents: list[Tensor] = []
        self.timesteps: list[Tensor] = []

    def encode_context(self, text: list[Tensor], conditioning: Any = None) -> Any:
        return self.backbone.encode_context(text, conditioning)

    def __call__(self, latents: Tensor, timestep: Tensor, context: Any, conditioning: Any = None) -> Tensor:
        self.latents.append(latents)
        self.timesteps.append(timestep)
        return self.backbone(latents, timestep, context, conditioning)


@pytest.fixture
def recorder() -> Recorder:
    """The built-in backbone, recorded."""
    return Recorder()


@pytest.fixture
def lora_file() -> Callable[..., Path]:
    """Writes a LoRA of the built-in model in the names of ComfyUI: `lora_file(path, scale=0.3)`."""
    import torch
    from safetensors.torch import save_file
    from wan_dit.config import TINY

    def write(path: Path, scale: float = 0.3) -> Path:
        generator, name = torch.Generator().manual_seed(0), "diffusion_model.blocks.5.self_attn.o"
        down, up = torch.randn(2, TINY.dim, generator=generator), torch.randn(TINY.dim, 2, generator=generator) * scale
        save_file({f"{name}.lora_A.weight": down, f"{name}.lora_B.weight": up}, path)
        return path

    return write

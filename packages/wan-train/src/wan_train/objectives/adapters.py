"""A LoRA beside a frozen backbone (Hu et al., arXiv 2106.09685): W + alpha / rank * up @ down on the linear layers of its trunk.

The base is neither copied nor wrapped: forward hooks add the product, so that what is trained, averaged and kept in checkpoints is
the adapters alone. `wan_dit.lora` writes them, and reads them back in a generation.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn
from wan_dit.lora.delta import Delta
from wan_dit.lora.read import Lora
from wan_dit.lora.write import export

from .trained import check_wan


class LoraSettings(BaseModel):
    """rank, alpha: alpha / rank multiplies the product; None makes alpha the rank.

    targets: a regular expression found in the names of the linear layers of the trunk, as in `trunk.blocks.0.self_attn.q`
    format: of the exported file
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    rank: int = Field(default=16, gt=0)
    alpha: float | None = Field(default=None, gt=0)
    targets: str = r"^trunk\.blocks\.\d+\.(self_attn|cross_attn)\.[qkvo]$|^trunk\.blocks\.\d+\.ffn\.[02]$"
    format: Literal["peft", "comfy", "kohya"] = "peft"

    @property
    def scale(self) -> float:
        return 1.0 if self.alpha is None else self.alpha / self.rank


class Adapter(nn.Module):
    """The two factors of a layer: `down` `[rank, in]` random, `up` `[out, rank]` zero, so that training starts from the base."""

    def __init__(self, layer: nn.Linear, settings: LoraSettings) -> None:
        super().__init__()
        self.scale = settings.scale
        self.down = nn.Parameter(torch.empty(settings.rank, layer.in_features))
        self.up = nn.Parameter(torch.zeros(layer.out_features, settings.rank))
        nn.init.kaiming_uniform_(self.down, a=math.sqrt(5))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(F.linear(x, self.down), self.up) * self.scale


class Adapters(nn.Module):
    """Adapters in a tree of modules of the layers' names, under `layers`; holds nothing of the backbone."""

    def __init__(self, layers: dict[str, nn.Linear], settings: LoraSettings) -> None:
        super().__init__()
        self.layers = nn.Module()
        for name, layer in layers.items():
            *path, leaf = name.split(".")
            place = self.layers
            for part in path:
                if part not in place._modules:
                    place.add_module(part, nn.Module())
                place = place.get_submodule(part)
            place.add_module(leaf, Adapter(layer, settings))

    def named(self) -> dict[str, Adapter]:
        """Name of the layer -> its adapter."""
        return {name: module for name, module in self.layers.named_modules() if isinstance(module, Adapter)}


class TrainedLora:
    """Adapters on a frozen backbone; see `wan_train.objectives.trained.Trained`."""

    def __init__(self, backbone: Any, settings: LoraSettings, expert: Literal["high", "low"] | None = None) -> None:
        """expert: which model of Wan2.2 A14B it is for, which the file says where its format can.

        ValueError where the backbone is no `WanDiT`, or `targets` is no expression, or finds nothing.
        """
        check_wan(backbone, "lora")
        self.backbone, self.settings, self.expert = backbone.requires_grad_(False), settings, expert
        layers = target_layers(backbone, settings.targets)
        adapters = Adapters(layers, settings).to(backbone.patch_embedding.weight.device)
        self.modules: dict[str, nn.Module] = {"lora": adapters}
        self.frozen: dict[str, nn.Module] = {"backbone": backbone}
        self.active = adapters.named()
        for name, layer in layers.items():
            layer.register_forward_hook(_Addition(self, name))

    def parameter_groups(self) -> list[dict[str, Any]]:
        return [{"params": list(self.modules["lora"].parameters())}]

    @contextmanager
    def inserted(self, modules: dict[str, nn.Module]) -> Iterator[Any]:
        own, other = self.active, modules["lora"]
        assert isinstance(other, Adapters)
        self.active = other.named()
        try:
            yield modules.get("backbone", self.backbone)
        finally:
            self.active = own

    def export(self, modules: dict[str, nn.Module], folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        export(self.lora(modules["lora"]), self.settings.format, folder / "lora.safetensors")

    def lora(self, adapters: nn.Module) -> Lora:
        """The adapters as `wan_dit.lora` has what it reads from a file, in the official names of the layers."""
        assert isinstance(adapters, Adapters)
        official = self.backbone.official_names(self.backbone.config)
        deltas = []
        for name, adapter in adapters.named().items():
            layer = official[f"{name}.weight"].removesuffix(".weight")
            parts = {part: getattr(adapter, part).detach().float().cpu() for part in ("down", "up")}
            keys = tuple(f"{layer}.{part}" for part in parts)
            alpha = self.settings.scale * self.settings.rank
            deltas.append(Delta(layer, "weight", "lora", parts, keys, scale=self.settings.scale, alpha=alpha, expert=self.expert))
        return Lora("lora", "plain", tuple(deltas), (), {})


class _Addition:
    """The forward hook of a layer: adds the product of the adapter in use, in copies of the backbone too."""

    def __init__(self, lora: TrainedLora, name: str) -> None:
        self.lora, self.name = lora, name

    def __call__(self, layer: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        return output + self.lora.active[self.name](args[0])

    def __deepcopy__(self, memo: dict[int, Any]) -> _Addition:
        return self


def target_layers(backbone: nn.Module, targets: str) -> dict[str, nn.Linear]:
    """The linear layers of the trunk that an expression finds, by name; ValueError where it finds none, or is none."""
    linear = {name: module for name, module in backbone.named_modules() if name.startswith("trunk.") and isinstance(module, nn.Linear)}
    try:
        found = {name: module for name, module in linear.items() if re.search(targets, name)}
    except re.error as error:
        raise ValueError(f"lora.targets '{targets}' is no regular expression: {error}") from error
    if not found:
        raise ValueError(f"lora.targets '{targets}' finds no linear layer of the trunk: their names are as {', '.join(list(linear)[:4])}")
    return found

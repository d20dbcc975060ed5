"""A LoRA beside a frozen backbone (Hu et al., arXiv 2106.09685): W + alpha / rank * up @ down on the linear layers of its trunk.

Or a LoKr (LyCORIS, arXiv 2309.14859): W + alpha / rank * kron(w1, w2_a @ w2_b), where w1 is small; its rank may be as high as that of W.

The base is neither copied nor wrapped: forward hooks add the product, so that what is trained, averaged and kept in checkpoints is
the adapters alone. `wan_dit.lora` computes the products, writes the adapters, and reads them back in a generation.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, Self, cast

import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from wan_dit.lora.delta import Delta, Kind, product, rank
from wan_dit.lora.formats import Target
from wan_dit.lora.read import Lora
from wan_dit.lora.write import export

from ..frozen import FrozenLinear
from .trained import check_wan

Linear = nn.Linear | FrozenLinear


class LoraSettings(BaseModel):
    """rank, alpha: alpha / rank multiplies the product; None makes alpha the rank.

    kind: `lora`, or `lokr`
    factor: of LoKr alone: rows and columns of w1 at most, and of those that divide the layer's; where `rank` is not below half the
    wider side of w2 that is one whole matrix, which alpha does not scale, as in LyCORIS
    targets: a regular expression found in the names of the linear layers of the trunk, as in `trunk.blocks.0.self_attn.q`
    format: of the exported file; None is `peft` for a LoRA and `kohya`, that of LyCORIS, for a LoKr, which PEFT's has no names for
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    kind: Literal["lora", "lokr"] = "lora"
    rank: int = Field(default=16, gt=0)
    alpha: float | None = Field(default=None, gt=0)
    factor: int = Field(default=8, gt=0)
    targets: str = r"^trunk\.blocks\.\d+\.(self_attn|cross_attn)\.[qkvo]$|^trunk\.blocks\.\d+\.ffn\.[02]$"
    format: Target | None = None

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.kind == "lokr" and self.format == "peft":
            raise ValueError("format = 'peft' has no names for a LoKr: use comfy or kohya")
        if self.kind == "lora" and "factor" in self.model_fields_set:
            raise ValueError("factor is of a LoKr: set kind = 'lokr', or leave it out")
        return self

    @property
    def scale(self) -> float:
        return 1.0 if self.alpha is None else self.alpha / self.rank

    @property
    def target(self) -> Target:
        return self.format or ("peft" if self.kind == "lora" else "kohya")


class Adapter(nn.Module):
    """The factors of a layer's change, as `wan_dit.lora` names them; one is zero, so that training starts from the base."""

    def __init__(self, layer: Linear, settings: LoraSettings) -> None:
        super().__init__()
        self.kind: Kind = settings.kind
        for name, value in (_lora if settings.kind == "lora" else _lokr)(layer, settings).items():
            self.register_parameter(name, nn.Parameter(value))
        self.rank = rank(self.kind, self.parts())
        self.scale = settings.scale if self.rank else 1.0

    def parts(self, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
        return {name: value.to(dtype) for name, value in self.named_parameters(recurse=False)}

    def forward(self, x: Tensor) -> Tensor:
        parts = self.parts(x.dtype)
        if self.kind == "lora":
            return product(self.kind, parts, x) * self.scale
        change = checkpoint(product, self.kind, parts, x, use_reentrant=False, preserve_rng_state=False)
        return cast(Tensor, change) * self.scale  # what is between the two factors is as wide as the result: it is made again, not kept


def _lora(layer: Linear, settings: LoraSettings) -> dict[str, Tensor]:
    """`down` `[rank, in]` random, `up` `[out, rank]` zero."""
    return {"down": _drawn(settings.rank, layer.in_features), "up": torch.zeros(layer.out_features, settings.rank)}


def _lokr(layer: Linear, settings: LoraSettings) -> dict[str, Tensor]:
    """w1 `[o, i]`, and w2 `[out / o, in / i]`, whole or as the product of `w2_a` and `w2_b`, which start at zero."""
    rows, columns = (_divisor(size, settings.factor) for size in (layer.out_features, layer.in_features))
    out, given = layer.out_features // rows, layer.in_features // columns
    first = {"lokr_w1": _drawn(rows, columns)}
    if 2 * settings.rank >= max(out, given):
        return {**first, "lokr_w2": torch.zeros(out, given)}
    return {**first, "lokr_w2_a": _drawn(out, settings.rank), "lokr_w2_b": torch.zeros(settings.rank, given)}


def _drawn(rows: int, columns: int) -> Tensor:
    return nn.init.kaiming_uniform_(torch.empty(rows, columns), a=math.sqrt(5))


def _divisor(size: int, most: int) -> int:
    """The largest divisor of `size` that is at most `most` and its own square root, so that w1 is the small one."""
    return max(each for each in range(1, min(most, math.isqrt(size)) + 1) if size % each == 0)


class Adapters(nn.Module):
    """Adapters in a tree of modules of the layers' names, under `layers`; holds nothing of the backbone."""

    def __init__(self, layers: dict[str, Linear], settings: LoraSettings) -> None:
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
        export(self.lora(modules["lora"]), self.settings.target, folder / "lora.safetensors")

    def lora(self, adapters: nn.Module) -> Lora:
        """The adapters as `wan_dit.lora` has what it reads from a file, in the official names of the layers."""
        assert isinstance(adapters, Adapters)
        official = self.backbone.official_names(self.backbone.config)
        deltas = []
        for name, adapter in adapters.named().items():
            layer = official[f"{name}.weight"].removesuffix(".weight")
            parts = {part: value.detach().cpu() for part, value in adapter.parts().items()}
            keys = tuple(f"{layer}.{part}" for part in parts)
            alpha = adapter.scale * adapter.rank if adapter.rank else None
            deltas.append(Delta(layer, "weight", adapter.kind, parts, keys, scale=adapter.scale, alpha=alpha, expert=self.expert))
        return Lora("lora", "plain", tuple(deltas), (), {})


class _Addition:
    """The forward hook of a layer: adds the product of the adapter in use, in copies of the backbone too."""

    def __init__(self, lora: TrainedLora, name: str) -> None:
        self.lora, self.name = lora, name

    def __call__(self, layer: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        return output + self.lora.active[self.name](args[0])

    def __deepcopy__(self, memo: dict[int, Any]) -> _Addition:
        return self


def target_layers(backbone: nn.Module, targets: str) -> dict[str, Linear]:
    """The linear layers of the trunk that an expression finds, by name; ValueError where it finds none, or is none."""
    linear = {name: module for name, module in backbone.named_modules() if name.startswith("trunk.") and isinstance(module, Linear)}
    try:
        found = {name: module for name, module in linear.items() if re.search(targets, name)}
    except re.error as error:
        raise ValueError(f"lora.targets '{targets}' is no regular expression: {error}") from error
    if not found:
        raise ValueError(f"lora.targets '{targets}' finds no linear layer of the trunk: their names are as {', '.join(list(linear)[:4])}")
    return found

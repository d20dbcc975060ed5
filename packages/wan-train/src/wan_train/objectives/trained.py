"""What of a backbone is trained: all of it, its context embedder for another text encoder, or a LoRA beside it (`adapters`)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from copy import copy
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from torch import nn
from wan_dit._shared.spec import UNKNOWN
from wan_dit.compat import mismatch
from wan_dit.context_embedder import make_context_embedder, save_context_embedder
from wan_dit.model import WanDiT

Choice = Literal["all", "lora", "context_embedder"]


class Trained(Protocol):
    """modules: what is trained, and so averaged and kept in checkpoints; frozen: the backbone under its name, where it stays as it is."""

    modules: dict[str, nn.Module]
    frozen: dict[str, nn.Module]

    def parameter_groups(self) -> list[dict[str, Any]]:
        """As those of an objective; the last one is not for Muon."""

    def inserted(self, modules: dict[str, nn.Module]) -> AbstractContextManager[Any]:
        """The backbone with other (averaged) modules in the place of the trained ones, as long as the context lasts.

        The frozen one may be among the modules: a whole copy of what is split over processes.
        """

    def export(self, modules: dict[str, nn.Module], folder: Path) -> None:
        """Write what was trained."""


class WholeBackbone:
    """Every weight of the backbone; see `Trained`."""

    def __init__(self, backbone: Any) -> None:
        self.backbone = backbone
        self.modules: dict[str, nn.Module] = {"backbone": backbone}
        self.frozen: dict[str, nn.Module] = {}

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Muon may train the matrices of the blocks only; embeddings and head stay with AdamW (docs/tiny-models.md)."""
        named = list(self.backbone.named_parameters())
        matrices = [param for name, param in named if ".blocks." in f".{name}" and param.ndim == 2]
        chosen = {id(param) for param in matrices}
        return [{"params": matrices, "muon": True}, {"params": [param for _, param in named if id(param) not in chosen]}]

    @contextmanager
    def inserted(self, modules: dict[str, nn.Module]) -> Iterator[Any]:
        yield modules["backbone"]

    def export(self, modules: dict[str, nn.Module], folder: Path) -> None:
        part: Any = modules["backbone"]
        part.half().save_pretrained(folder / "backbone")


class ContextEmbedder:
    """The projection of text tokens alone, all else frozen: how a backbone learns to read another text encoder; see `Trained`.

    A text encoder of another width or embedding space gets a fresh one. It is exported as the file that `wan_dit.context_embedder` reads.
    """

    def __init__(self, backbone: Any, text_encoder: Any) -> None:
        """text_encoder: its spec. ValueError where the backbone is no `WanDiT`, or the encoder does not name its embedding space."""
        check_wan(backbone, "context_embedder")
        if text_encoder.embedding_space in ("", UNKNOWN):
            raise ValueError(
                f"text encoder '{text_encoder.name}' does not name its embedding_space, and the file has to say which it is for"
            )
        backbone.requires_grad_(False)
        if mismatch("wan_text_encoders", text_encoder, backbone.spec):
            facts = {
                "embedding_space": text_encoder.embedding_space,
                "text_dim": text_encoder.embed_dim,
                "text_len": text_encoder.max_tokens,
            }
            device = backbone.patch_embedding.weight.device
            backbone.context_embedder = make_context_embedder(text_encoder.embed_dim, backbone.config.dim).to(device)
            backbone.config = backbone.config.model_copy(update=facts)
        _in_fp32(backbone.context_embedder, backbone.patch_embedding.weight.dtype)
        self.backbone = backbone
        self.modules: dict[str, nn.Module] = {"context_embedder": backbone.context_embedder}
        self.frozen: dict[str, nn.Module] = {"backbone": backbone}

    def parameter_groups(self) -> list[dict[str, Any]]:
        return [{"params": list(self.backbone.context_embedder.parameters())}]

    @contextmanager
    def inserted(self, modules: dict[str, nn.Module]) -> Iterator[Any]:
        base: Any = modules.get("backbone", self.backbone)
        backbone = copy(base)
        backbone._modules = {**base._modules, "context_embedder": modules["context_embedder"]}
        yield backbone

    def export(self, modules: dict[str, nn.Module], folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        module, config = modules["context_embedder"], self.backbone.config
        assert isinstance(module, nn.Sequential)
        path = folder / "context_embedder.safetensors"
        save_context_embedder(path, module, embedding_space=config.embedding_space, max_tokens=config.text_len)


def _in_fp32(embedder: nn.Module, dtype: torch.dtype) -> None:
    """Train it in fp32 between parts of another type."""
    embedder.float().requires_grad_(True)
    if dtype != torch.float32:
        embedder.register_forward_pre_hook(lambda module, args: (args[0].float(),))
        embedder.register_forward_hook(lambda module, args, output: output.to(dtype))


def check_wan(backbone: Any, train: str) -> None:
    """ValueError where a part of the backbone cannot be trained by itself."""
    if not isinstance(backbone, WanDiT):
        raise ValueError(f"train = '{train}' is for a backbone of Wan, '{type(backbone).__name__}' is none: use train = 'all'")

"""Which tensor a name in a LoRA file means: the tables of the model's tensor names, dotted and flattened, never a guess."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from functools import lru_cache
from typing import Any

from torch import nn

from ..config import DiTConfig
from ..layouts import Layout, names
from .delta import Delta
from .formats import ENDS

LAYOUTS: tuple[Layout, ...] = ("official", "diffusers")
BLOCK = re.compile(r"(?:^|[._])blocks[._](\d+)(?=[._]|$)")
MOST_BLOCKS = 1000
BRANCHES = {  # parts of own names of tensors: what a model without them lacks
    "image_embedder.": "image branch",
    "_img.": "image branch",
    "vace_": "VACE blocks",
    "ref_conv.": "reference input",
    "control_adapter.": "camera input",
}


class Vocabulary:
    """Names of tensors in all layouts to one's own.

    tables: own name -> theirs, one a layout
    """

    def __init__(self, tables: Iterable[Mapping[str, str]]) -> None:
        self.dotted = {theirs: own for table in tables for own, theirs in table.items()}
        self.flat = {theirs.replace(".", "_"): own for theirs, own in self.dotted.items()}

    def tensor(self, delta: Delta) -> str | None:
        """Own name of the tensor that a delta changes; None where no layer is called so."""
        for end in ENDS[delta.place]:
            name = delta.module + end
            if own := self.flat.get(name.replace(".", "_")) if delta.flat else self.dotted.get(name):
                return own
        return None


def of_model(model: nn.Module) -> Vocabulary:
    """The names of a model's tensors: of its `official_names(config)`, and of diffusers where it is a Wan."""
    config: Any = model.config
    official: Mapping[str, str] = model.official_names(config)  # type: ignore[operator]
    return Vocabulary([official, *([names(config, "diffusers")] if isinstance(config, DiTConfig) else [])])


@lru_cache(maxsize=8)
def of_config(config: DiTConfig) -> Vocabulary:
    """The names of a Wan of this configuration."""
    return Vocabulary(names(config, layout) for layout in LAYOUTS)


def with_all_branches(config: DiTConfig) -> DiTConfig:
    """The configuration with every part that any variant of Wan has; only its names are of use."""
    return config.model_copy(
        update={
            "image_dim": config.image_dim or 1,
            "pos_embed_seq_len": config.pos_embed_seq_len or 1,
            "vace_layers": config.vace_layers or tuple(range(config.num_layers)),
            "ref_dim": config.ref_dim or 1,
            "camera_dim": config.camera_dim or 1,
        }
    )


def any_wan(deltas: Iterable[Delta]) -> DiTConfig:
    """A configuration with all parts, and as many blocks as the deltas name."""
    numbers = [int(found[1]) for delta in deltas if (found := BLOCK.search(delta.module))]
    blocks = min(1 + max(numbers, default=0), MOST_BLOCKS)
    return with_all_branches(DiTConfig(dim=2, ffn_dim=1, num_heads=1, num_layers=blocks))


def branch(own: str) -> str:
    """What a model lacks that has no tensor of this name."""
    return next((what for part, what in BRANCHES.items() if part in own), "such layer")

"""The parts in a checkpoint that can be written as models: what they are is recorded beside their weights."""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from torch import nn
from wan_dit._shared.files import read_json

from ..config import explain
from . import shards
from .manifest import VALUES
from .tree import SEPARATOR

CONFIGS = {  # class of a module: that of its config
    "wan_dit.model:WanDiT": "wan_dit.config:DiTConfig",
    "wan_vae.model:WanVAE": "wan_vae.config:VAEConfig",
    "wan_vae.codecs.dcae:DCAE": "wan_vae.codecs.dcae_config:DCAEConfig",
    "wan_vae.codecs.ltx:LTXVAE": "wan_vae.codecs.ltx_config:LTXConfig",
    "wan_text.encoder:TextEncoder": "wan_text.config:UMT5Config",
}


@dataclass(frozen=True)
class Part:
    """target: the class, one of `CONFIGS`; state: whole tensors in the class's own names; files: such as a tokenizer."""

    target: str
    config: Any
    state: dict[str, Any]
    files: dict[str, bytes]


def describe(modules: Mapping[str, nn.Module]) -> dict[str, Any]:
    """What has to be known of modules to make models of their weights, as plain values; others than those of `CONFIGS` are left out."""
    found = {}
    for name, module in modules.items():
        given: Any = module
        classes = [f"{kind.__module__}:{kind.__qualname__}" for kind in type(module).__mro__]  # FSDP puts a class of its own before
        if target := next((kind for kind in classes if kind in CONFIGS), None):
            files = {file: base64.b64encode(content).decode() for file, content in given.extra_files().items()}
            found[name] = {"target": target, "config": given.config.model_dump_json(), "files": json.dumps(files)}
    return found


def read_parts(checkpoint: Path, names: list[str], *, ema: bool) -> dict[str, Part]:
    """Parts of a checkpoint, all where no name is given; their averaged weights with `ema`. LookupError for one that it has not."""
    values = read_json(checkpoint / VALUES)
    described = sorted(key.split(SEPARATOR)[1] for key in values if key.startswith("parts/") and key.endswith("/target"))
    if unknown := [name for name in names if name not in described]:
        raise LookupError(f"'{checkpoint}' has no part '{unknown[0]}' that can be exported: it has {', '.join(described) or 'none'}")
    if not described:
        raise LookupError(f"'{checkpoint}' has no part that can be exported: none of its modules is a backbone, VAE or text encoder of Wan")
    return {name: _read(checkpoint, name, values, ema) for name in names or described}


def _read(checkpoint: Path, name: str, values: dict[str, Any], ema: bool) -> Part:
    target, written, files = (values[f"parts/{name}/{key}"] for key in ("target", "config", "files"))
    if target not in CONFIGS:
        raise ValueError(f"'{checkpoint}' holds part '{name}' as {target}: this version exports {', '.join(CONFIGS)}")
    module, attribute = CONFIGS[target].split(":")
    try:
        config = getattr(import_module(module), attribute).model_validate_json(written)
    except ModuleNotFoundError as error:
        package = module.partition(".")[0].replace("_", "-")
        raise LookupError(f"part '{name}' is of {package}, which is not installed: pip install {package}") from error
    except ValidationError as error:
        raise ValueError(f"'{checkpoint}', config of part '{name}': {explain(error)}") from error
    state = shards.read_whole(checkpoint, f"{'ema' if ema else 'modules'}/{name}/")
    if not state:
        raise LookupError(f"'{checkpoint}' holds no averaged weights of '{name}': export without --ema")
    return Part(target, config, state, {file: base64.b64decode(text) for file, text in json.loads(files).items()})

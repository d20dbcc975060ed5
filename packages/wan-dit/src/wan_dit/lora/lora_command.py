"""`wan-dit lora info | convert | merge`. Help imports no torch."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .._shared.cli import show
from .reference import EXPERTS

if TYPE_CHECKING:
    from ..model import WanDiT
    from .read import Lora

TARGETS = ("peft", "comfy", "kohya")
UNMATCHED = ("strict", "warn")
TYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
Command = Callable[..., argparse.ArgumentParser]


def add_commands(commands: Any, command: Command) -> None:
    """Add `lora` to the subparsers of `wan-dit`; `command(commands, name, function, text, listing=)` makes one command."""
    text = "read, convert and merge LoRAs of any format"
    parser = commands.add_parser("lora", help=text, description=f"{text[:1].upper()}{text[1:]}.")
    group = parser.add_subparsers(required=True, metavar="COMMAND")

    info = command(group, "info", _info, "what a LoRA holds, and what becomes of every key on a model", listing=True)
    info.add_argument("lora", metavar="FILE", help="a LoRA, or hub:org/repo/file")
    info.add_argument("--model", metavar="PART", help="a backbone by name or path; only its configuration is read")
    info.add_argument("--keys", action="store_true", help="a row for every key, not only for those that are not applied")
    _add_expert(info)

    convert = command(group, "convert", _convert, "write a LoRA in the names of another format")
    convert.add_argument("lora", metavar="FILE", help="a LoRA, or hub:org/repo/file")
    convert.add_argument("output", metavar="OUT", help="the file to write, .safetensors")
    convert.add_argument("--to", choices=TARGETS, required=True, help="peft (diffusers), comfy (ComfyUI), kohya (musubi-tuner)")
    convert.add_argument("--overwrite", action="store_true", help="replace a file that exists")
    _add_expert(convert)

    merge = command(group, "merge", _merge, "write a backbone with LoRAs merged into it")
    merge.add_argument("loras", nargs="+", metavar="PATH[:STRENGTH[:high|low]]", help="LoRAs and their strengths")
    merge.add_argument("--model", metavar="PART", required=True, help="a backbone by name or path")
    merge.add_argument("--output", metavar="FOLDER", required=True, help="the folder to write")
    merge.add_argument("--dtype", choices=TYPES, default="fp32", help="type of the weights (default: fp32)")
    merge.add_argument("--on-unmatched", choices=UNMATCHED, default="strict", help="what keys that fit nothing are (default: an error)")
    _add_expert(merge)


def _add_expert(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--expert", choices=EXPERTS, help="which model of Wan2.2 A14B it is for, where a file or a strength tells them apart"
    )


def _info(args: argparse.Namespace) -> None:
    from .matching import match
    from .read import load_lora

    lora = load_lora(args.lora)
    found = match(_on_meta(args.model), lora, args.expert).ledger if args.model else None
    record = _facts(lora)
    if found:
        record |= {"model": args.model, "keys_on_model": found.counts()}
        keys = [row for row in found.rows() if args.keys or row["status"] != "applied"]
    else:
        keys = [{"key": entry.key, "status": entry.status, "tensor": "", "why": entry.why} for entry in lora.rejected]
    if args.json:
        print(json.dumps({**record, "ledger": keys}, indent=2, ensure_ascii=False))
        return
    width = max(map(len, record))
    for name, value in record.items():
        text = ", ".join(f"{key} ({number})" for key, number in value.items()) if isinstance(value, dict) else value
        print(f"{name:{width}}  {text}")
    if keys:
        print()
        show(keys, as_json=False)


def _facts(lora: Lora) -> dict[str, Any]:
    from .matching import architecture

    def counted(values: list[Any]) -> dict[str, int]:
        return {str(value): values.count(value) for value in dict.fromkeys(values)}

    factored = [delta for delta in lora.deltas if delta.kind != "diff"]
    parts = [part for delta in lora.deltas for part in delta.parts.values()]
    return {
        "name": lora.name,
        "format": lora.format,
        "made_for": architecture(lora),
        "experts": [expert for expert in lora.experts if expert] or "not told",
        "keys": len(lora.rejected) + sum(len(delta.keys) for delta in lora.deltas),
        "layers": len({(delta.module, delta.expert) for delta in lora.deltas}),
        "kinds": counted([f"{delta.kind} of {delta.place}" for delta in lora.deltas]),
        "rank": counted([delta.rank for delta in factored]),
        "alpha": counted(["rank" if delta.alpha is None else f"{delta.alpha:g}" for delta in factored]),
        "dtype": counted([str(part.dtype).removeprefix("torch.") for part in parts]),
        "parameters": sum(part.numel() for part in parts),
    }


def _on_meta(ref: str) -> WanDiT:
    """A backbone without weights, from the configuration of a name or path."""
    import torch

    from .._shared.weights import locate
    from ..checkpoint import CONFIG_FILES, config_of, weights_folder
    from ..model import WanDiT
    from ..plugins import find

    spec = find("wan_backbones", ref)
    if not spec.weights:
        raise ValueError(f"backbone '{ref}' has no weights that tell its configuration: give a path")
    config = config_of(weights_folder(locate(spec.weights, CONFIG_FILES)), None)
    with torch.device("meta"):
        return WanDiT(config)


def _convert(args: argparse.Namespace) -> None:
    output = Path(args.output)
    if output.suffix != ".safetensors":
        raise ValueError(f"'{output}' must end in .safetensors")
    if output.exists() and not args.overwrite:
        raise ValueError(f"'{output}' exists: add --overwrite to replace it")

    from .read import load_lora
    from .write import export

    lora = load_lora(args.lora)
    export(lora, args.to, output, expert=args.expert)
    print(f"{output}  {lora.format} to {args.to}, {len(lora.deltas)} changes of {len({delta.module for delta in lora.deltas})} layers")


def _merge(args: argparse.Namespace) -> None:
    from .reference import parse_lora

    specs = [parse_lora(text) for text in args.loras]
    output = Path(args.output)
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ValueError(f"'{output}' exists: give a new or an empty folder")

    import torch

    from ..plugins import load_backbone
    from .applied import apply

    backbone = load_backbone(args.model, dtype=getattr(torch, TYPES[args.dtype]))
    applied = apply(backbone, specs, on_unmatched=args.on_unmatched, expert=args.expert)
    backbone.save_pretrained(output)
    print(applied.ledger.summary())
    print(f"{output}  {args.model} with {len(applied.strengths)} LoRA{'s' if len(applied.strengths) > 1 else ''} merged")

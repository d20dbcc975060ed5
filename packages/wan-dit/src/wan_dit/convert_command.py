"""The command `wan-dit convert`. Help imports no torch."""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .plugins import find

LAYOUTS = {
    "own": "our folder, which keeps every fact",
    "official": "a folder in the names of an official release",
    "diffusers": "a transformer folder of diffusers",
    "comfy": "one .safetensors for ComfyUI",
}
TYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
PACKED = {"fp8": ("own", "comfy"), "int8": ("own",)}  # the layouts whose readers know them
WEIGHTS = (".safetensors", ".pth", ".pt", ".bin", ".ckpt", ".gguf")


def add_commands(commands: Any, command: Callable[..., argparse.ArgumentParser]) -> None:
    """Add `convert` to the subparsers of `wan-dit`; `command(commands, name, function, text)` makes one."""
    parser = command(commands, "convert", _convert, "write a backbone in another layout, or in 8 bits")
    parser.add_argument("source", metavar="SRC", help="a name, file, folder or Hub id; MODEL+VACE_FILE joins the two")
    parser.add_argument("out", metavar="DST", type=Path, help="the folder or file to write")
    parser.add_argument("--to", choices=LAYOUTS, required=True, help="; ".join(f"{name}: {text}" for name, text in LAYOUTS.items()))
    parser.add_argument(
        "--dtype",
        choices=(*TYPES, *PACKED),
        help="type of the weights (default: their own; bf16 where packed); 8 bits have scales",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace the output where it exists")


def _convert(args: argparse.Namespace) -> None:
    _check_output(args)  # before anything is read, or fetched
    spec = find("wan_backbones", args.source)
    if spec.target != "wan_dit.model:WanDiT" or not spec.weights:
        raise ValueError(f"'{args.source}' is no Wan backbone with weights: it has no other layout")

    import torch

    from . import export
    from ._shared.lazy import own_dtype
    from ._shared.weights import locate
    from .checkpoint import HUB_FILES, config_of, read_checkpoint

    config, state = read_checkpoint(locate(spec.weights, HUB_FILES))
    packed = args.dtype if args.dtype in PACKED else None
    dtype = torch.bfloat16 if packed else getattr(torch, TYPES[args.dtype]) if args.dtype else own_dtype(state)
    save = {"own": export.save_own, "official": export.save_official, "diffusers": export.save_diffusers, "comfy": export.save_comfy}
    save[args.to](config, state, args.out, dtype, packed)
    read = config_of(args.out, None)
    if lost := sorted(name for name, value in config if getattr(read, name) != value):
        warnings.warn(f"'{args.out}' does not say {', '.join(lost)}, which its layout has no room for; --to own keeps them", stacklevel=2)
    kind = f"{packed} and " if packed else ""
    print(f"{args.out}: {LAYOUTS[args.to]}, {len(state)} tensors in {kind}{str(dtype).removeprefix('torch.')}")


def _check_output(args: argparse.Namespace) -> None:
    """ValueError where the output has the wrong suffix, is the source, holds other weights or exists unasked."""
    out: Path = args.out
    if args.dtype in PACKED and args.to not in PACKED[args.dtype]:
        raise ValueError(f"--dtype {args.dtype} takes --to {' or '.join(PACKED[args.dtype])}: no reader of {args.to} knows its scales")
    if args.to == "comfy" and (out.suffix != ".safetensors" or out.is_dir()):
        raise ValueError(f"cannot write '{out}': --to comfy makes a file, give a name that ends in .safetensors")
    if args.to != "comfy" and (out.is_file() or out.suffix in WEIGHTS):
        raise ValueError(f"cannot write '{out}': --to {args.to} makes a folder, give the name of one")
    sources = [Path(part) for part in args.source.split("+")]
    if out.exists() and any(source.exists() and out.resolve() in (source.resolve(), source.resolve().parent) for source in sources):
        raise ValueError(f"'{out}' is the input, or holds it; name another output")
    held = [out] if args.to == "comfy" else [file for file in sorted(out.glob("*")) if file.suffix in WEIGHTS]
    if (taken := next((file for file in held if file.exists()), None)) and not args.overwrite:
        raise ValueError(f"'{taken}' exists; name another output or pass --overwrite")
    own = "model.safetensors" if args.to == "own" else "diffusion_pytorch_model.safetensors"
    if args.to != "comfy" and (other := next((file for file in held if file.name != own), None)):
        raise ValueError(f"cannot write to '{out}': it holds other weights ('{other.name}'); name another folder")

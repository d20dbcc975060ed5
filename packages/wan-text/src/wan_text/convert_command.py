"""The command `wan-text convert`."""

from __future__ import annotations

import argparse
import warnings
from pathlib import Path
from typing import Any

from .plugins import UMT5_TARGET, find_text_encoder

LAYOUTS = {
    "wan": "our folder, which keeps every fact",
    "huggingface": "a folder of transformers' UMT5EncoderModel",
    "official": "a folder with the .pth and the tokenizer of a release",
    "comfy": "one .safetensors with the tokenizer in it",
}
WEIGHTS = (".safetensors", ".pth", ".pt", ".bin", ".ckpt", ".gguf")


def add_convert(commands: Any, command: Any, dtypes: Any) -> None:
    """Add it to the parser; `command` makes one, `dtypes` are PyTorch's types by their short names."""
    text, example = "write an encoder in another layout, or in 8 bits", "wan-text convert umt5.gguf umt5-int8 --to wan --quantise int8"
    parser = command(commands, "convert", _convert, text, example)
    parser.add_argument("source", help="name, file, folder or Hub id of a umT5 encoder")
    parser.add_argument("out", type=Path, help="the folder or file to write")
    parser.add_argument("--to", choices=LAYOUTS, required=True, help="; ".join(f"{name}: {text}" for name, text in LAYOUTS.items()))
    parser.add_argument("--dtype", choices=dtypes, help="type of the weights (default: their own; bf16 where they are packed)")
    parser.add_argument("--quantise", choices=("int8",), help="products in 8 bits and a scale a row, about 2 %% off; --to wan alone")
    parser.add_argument("--overwrite", action="store_true", help="replace the output where it exists")
    parser.set_defaults(dtypes=dtypes)


def _convert(args: argparse.Namespace) -> None:
    spec = find_text_encoder(args.source)
    _check_output(args)  # before anything is read, or fetched
    if spec.target != UMT5_TARGET or not spec.weights:
        raise ValueError(f"'{args.source}' is no umT5 encoder with weights: it has no other layout")

    import torch

    from . import export
    from ._shared.weights import locate
    from .checkpoint import HUB_FILES, read_encoder, read_spiece

    path = locate(spec.weights, HUB_FILES)
    config, state = read_encoder(path)
    spiece = read_spiece(path)
    dtype = getattr(torch, args.dtypes[args.dtype]) if args.dtype else export.own_dtype(state)
    if args.to == "wan":
        export.save_wan(config, state, spiece, args.out, dtype, int8=args.quantise is not None)
    else:
        save = {"huggingface": export.save_hugging_face, "official": export.save_official, "comfy": export.save_comfy}[args.to]
        save(config, state, spiece, args.out, dtype)
    read = read_encoder(args.out)[0]
    if lost := sorted(name for name, value in config if getattr(read, name) != value):
        warnings.warn(f"'{args.out}' does not say {', '.join(lost)}, which its layout has no room for; --to wan keeps them", stacklevel=2)
    kind = f"{args.quantise} and " if args.quantise else ""
    print(f"{args.out}: {LAYOUTS[args.to]}, {len(state)} tensors in {kind}{str(dtype).removeprefix('torch.')}")


def _check_output(args: argparse.Namespace) -> None:
    """ValueError where the output has the wrong suffix, is the source, holds other weights or exists unasked."""
    out: Path = args.out
    if args.quantise and args.to != "wan":
        raise ValueError(f"--quantise {args.quantise} takes --to wan: no other program reads such files")
    if args.to == "comfy" and (out.suffix != ".safetensors" or out.is_dir()):
        raise ValueError(f"cannot write '{out}': --to comfy makes a file, give a name that ends in .safetensors")
    if args.to != "comfy" and (out.is_file() or out.suffix in WEIGHTS):
        raise ValueError(f"cannot write '{out}': --to {args.to} makes a folder, give the name of one")
    source = Path(args.source)
    if out.exists() and source.exists() and out.resolve() in (source.resolve(), source.resolve().parent):
        raise ValueError(f"'{out}' is the input, or holds it; name another output")
    taken = out if args.to == "comfy" else next((file for file in sorted(out.glob("*")) if file.suffix in WEIGHTS), None)
    if taken and taken.exists() and not args.overwrite:
        raise ValueError(f"'{taken}' exists; name another output or pass --overwrite")
    own = {"wan": "model.safetensors", "huggingface": "model.safetensors", "official": "models_t5_*"}.get(args.to)
    if own and (other := next((file for file in out.glob("*") if file.suffix in WEIGHTS and not file.match(own)), None)):
        raise ValueError(f"cannot write to '{out}': it holds other weights ('{other.name}'); name another folder")

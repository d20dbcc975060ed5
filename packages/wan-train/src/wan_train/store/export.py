"""The command `wan-train export`: the parts in a checkpoint, in the layout of whoever is to read them. Help imports no torch."""

from __future__ import annotations

import argparse
from pathlib import Path
from pkgutil import resolve_name
from typing import TYPE_CHECKING, Any

from wan_dit._shared.cli import add_common

if TYPE_CHECKING:
    import torch

    from .exportable import Part

FOLDER = "checkpoints"  # of a run, inside its output folder
LAYOUTS = {
    "own": "our folder, which keeps every fact",
    "official": "the names of an official release",
    "diffusers": "a folder that diffusers or transformers reads",
    "comfy": "one .safetensors for ComfyUI",
}
TYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}


def add_export(commands: Any) -> None:
    """Add `export` to the subparsers of `wan-train`."""
    text = "write the parts of a checkpoint as models of our own, official, diffusers' or ComfyUI's layout"
    parser = commands.add_parser("export", help=text, description=text)
    parser.add_argument("source", metavar="RUN|CHECKPOINT", type=Path, help="output folder of a run, or one of its step-NNNNNNNN folders")
    parser.add_argument("out", metavar="OUT", type=Path, help="the folder or file to write; a folder with one for each of several parts")
    parser.add_argument("--to", choices=LAYOUTS, required=True, help="; ".join(f"{name}: {what}" for name, what in LAYOUTS.items()))
    parser.add_argument("--ema", action="store_true", help="the averaged weights")
    parser.add_argument("--step", type=int, help="of a run: the checkpoint of this step (default: the newest that is complete)")
    parser.add_argument("--part", action="append", default=[], metavar="NAME", help="a part of the run, such as backbone (default: all)")
    parser.add_argument("--dtype", choices=TYPES, help="type of the weights (default: that of the checkpoint)")
    parser.add_argument("--overwrite", action="store_true", help="write over what is at OUT")
    add_common(parser)
    parser.set_defaults(do=_export)


def _export(args: argparse.Namespace) -> None:
    checkpoint = find_checkpoint(args.source, args.step)

    import torch

    from .complete import verify
    from .exportable import read_parts
    from .ranks import Ranks

    verify(checkpoint, Ranks())
    parts = read_parts(checkpoint, args.part, ema=args.ema)
    outputs = {name: _output(args.out, name, part, args.to, alone=len(parts) == 1) for name, part in parts.items()}
    if not args.overwrite and (taken := next((path for path in outputs.values() if path.exists()), None)):
        raise ValueError(f"'{taken}' exists; name another output or pass --overwrite")
    for name, part in parts.items():
        write_part(part, outputs[name], args.to, getattr(torch, TYPES[args.dtype]) if args.dtype else None)
        print(f"{outputs[name]}: {name} of {checkpoint.name}, {LAYOUTS[args.to]}, {len(part.state)} tensors")


def find_checkpoint(source: Path, step: int | None = None) -> Path:
    """The folder of a checkpoint: `source` itself, or that of `step` or the newest complete one of the run in `source`.

    FileNotFoundError where there is none.
    """
    from .complete import newest_complete
    from .manifest import NAME, folder_name, steps
    from .ranks import Ranks

    if (source / NAME).is_file():
        if step is not None:
            raise ValueError(f"'{source}' is one checkpoint: give the folder of the run with --step")
        return source
    folder = source / FOLDER if (source / FOLDER).is_dir() else source
    if not (found := steps(folder)):
        raise FileNotFoundError(f"no checkpoint in '{folder}': give the output folder of a run, or a folder step-NNNNNNNN")
    if step is not None:
        if step not in found:
            raise FileNotFoundError(f"'{folder}' has no checkpoint of step {step}: it has {', '.join(map(str, found))}")
        return folder / folder_name(step)
    if (newest := newest_complete(folder, Ranks())) is None:
        raise FileNotFoundError(f"no checkpoint in '{folder}' is complete")
    return folder / folder_name(newest.step)


def write_part(part: Part, out: Path, layout: str, dtype: torch.dtype | None = None) -> None:
    """Write a part by the savers of its package; dtype None keeps that of the checkpoint."""
    kind = part.target.partition(".")[0]
    {"wan_dit": _write_backbone, "wan_vae": _write_vae, "wan_text": _write_text_encoder}[kind](part, out, layout, dtype)


def _output(out: Path, name: str, part: Part, layout: str, *, alone: bool) -> Path:
    """What is written for a part. ValueError where a file's name, or a folder's, is wanted and the other is given."""
    is_file = layout == "comfy" or (layout == "official" and part.target.startswith("wan_vae"))
    if not alone:
        return out / (f"{name}.safetensors" if is_file else name)
    if is_file != (out.suffix in (".safetensors", ".pth")) or (layout == "comfy" and out.suffix == ".pth"):
        wanted = "a file, give a name that ends in .safetensors" if is_file else "a folder, give the name of one"
        raise ValueError(f"cannot write '{out}': --to {layout} makes {wanted} for '{name}'")
    return out


def _write_backbone(part: Part, out: Path, layout: str, dtype: torch.dtype | None) -> None:
    from wan_dit import export
    from wan_dit._shared.lazy import own_dtype

    save = {"own": export.save_own, "official": export.save_official, "diffusers": export.save_diffusers, "comfy": export.save_comfy}
    save[layout](part.config, part.state, out, dtype or own_dtype(part.state), None)


def _write_vae(part: Part, out: Path, layout: str, dtype: torch.dtype | None) -> None:
    from wan_vae import export
    from wan_vae._shared.lazy import own_dtype
    from wan_vae._shared.weights import build
    from wan_vae.model import WanVAE

    vae = build(lambda: WanVAE(part.config), part.state, dtype=dtype or own_dtype(part.state), source=out)
    if layout == "own":
        vae.save_pretrained(out)
    elif layout == "diffusers":
        export.save_diffusers(vae, out)
    else:
        export.save_official(vae, out)


def _write_text_encoder(part: Part, out: Path, layout: str, dtype: torch.dtype | None) -> None:
    export: Any = resolve_name(f"{part.target.partition('.')[0]}.export")  # of the package that the part is from, as a plugin's target is
    save = {"own": export.save_wan, "official": export.save_official, "diffusers": export.save_hugging_face, "comfy": export.save_comfy}
    state = {key.removeprefix("umt5."): value for key, value in part.state.items()}
    save[layout](part.config, state, part.files["spiece.model"], out, dtype or export.own_dtype(state))

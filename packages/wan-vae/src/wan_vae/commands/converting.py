"""`wan-vae convert`."""

from __future__ import annotations

import argparse
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..plugins import VAESpec, find_vae
from .common import CODEC_HELP, DTYPES, check_folder, command

if TYPE_CHECKING:
    from .._shared.weights import Pretrained

SUFFIXES = {"official": (".pth", ".safetensors"), "comfy": (".safetensors",)}  # the others are folders
LAYOUTS = {
    "official": "one file in official names",
    "comfy": "one .safetensors file in official names",
    "diffusers": "folder for diffusers",
    "wan": "our folder, which keeps every fact",
}


def add(commands: Any) -> None:
    text = "write a checkpoint in another layout, bit for bit"
    parser = command(commands, "convert", _convert, text, "wan-vae convert Wan2.1_VAE.pth wan21-diffusers --to diffusers")
    parser.add_argument("source", help=CODEC_HELP)
    parser.add_argument("out", help="the file (.pth or .safetensors) or folder to write")
    what = "; ".join(f"{name}: {text}" for name, text in LAYOUTS.items())
    parser.add_argument("--to", choices=LAYOUTS, required=True, help=what)
    parser.add_argument("--dtype", choices=DTYPES, help="type of the weights (default: the checkpoint's own)")
    text = "let the decoder take out noise, as it can then be trained to; until then it decodes as before (for --to wan)"
    parser.add_argument("--timestep-conditioning", action="store_true", help=text)
    parser.add_argument("--overwrite", action="store_true", help="replace the output where it exists")


def _convert(args: argparse.Namespace) -> None:
    spec, out = find_vae(args.source), Path(args.out)
    _check_output(args, out)  # before anything is read, or fetched
    if args.timestep_conditioning and args.to != "wan":
        raise ValueError(f"--timestep-conditioning makes a VAE that --to {args.to} cannot hold: use --to wan")
    vae = _load(spec, args)
    if args.timestep_conditioning:
        vae = _conditioned(vae)
    if args.to == "wan":
        vae.save_pretrained(out)
    elif args.to == "diffusers":
        _save_diffusers(vae, out)
    else:
        _save_official(vae, out)
    weights = list(vae.state_dict().values())
    kinds = "/".join(sorted({str(value.dtype).removeprefix("torch.") for value in weights if value.is_floating_point()}))
    print(f"{out}: {LAYOUTS[args.to]}, {len(weights)} tensors, {sum(value.numel() for value in weights):,} parameters in {kinds}")


def _check_output(args: argparse.Namespace, out: Path) -> None:
    """ValueError where the output has the wrong suffix, is the source, holds other weights or exists unasked."""
    from ..export import WEIGHTS, other_weights

    suffixes = SUFFIXES.get(args.to, ())
    if suffixes and out.suffix not in suffixes:
        raise ValueError(f"cannot write '{out}': --to {args.to} makes a file, give a name that ends in {' or '.join(suffixes)}")
    if not suffixes and (out.is_file() or out.suffix in SUFFIXES["official"]):
        raise ValueError(f"cannot write '{out}': --to {args.to} makes a folder, give the name of one")
    if suffixes and out.is_dir():
        raise ValueError(f"cannot write '{out}': it is a folder")
    check_folder(out)
    source = Path(args.source)
    if out.exists() and source.exists() and out.resolve() in (source.resolve(), source.resolve().parent):
        raise ValueError(f"'{out}' is the input, or holds it; name another output")
    own = WEIGHTS if args.to == "diffusers" else "model.safetensors"
    if out.is_dir() and (other := other_weights(out, own)):
        raise ValueError(f"cannot write to '{out}': it holds other weights ('{other}'); name another folder")
    taken = out if suffixes else next((out / name for name in (own, "config.json") if (out / name).exists()), None)
    if taken and taken.exists() and not args.overwrite:
        raise ValueError(f"'{taken}' exists; name another output or pass --overwrite")


def _load(spec: VAESpec, args: argparse.Namespace) -> Pretrained:
    """The VAE in the type asked for, or that of its checkpoint: the widest where its halves differ."""
    from functools import reduce

    import torch

    from .._shared.weights import Pretrained, build, locate

    target = spec.resolve()
    if not (isinstance(target, type) and issubclass(target, Pretrained)):
        raise ValueError(f"'{args.source}' cannot be converted: {spec.target} has no layouts that wan-vae knows")
    if spec.weights is None:
        raise ValueError(f"'{args.source}' names no weights to convert")
    path = locate(spec.weights, target.hub_files, target.hub_fallback)
    config, state = target.read_checkpoint(path)
    own = reduce(torch.promote_types, (value.dtype for value in state.values()))
    vae = build(lambda: target.make(config, path), state, dtype=getattr(torch, DTYPES[args.dtype]) if args.dtype else own, source=path)
    for key, value in vae.state_dict().items():
        if args.dtype and not value.isfinite().all():
            raise ValueError(f"'{args.source}' does not fit in {args.dtype}: '{key}' holds {float(state[key].abs().max()):.3g}; use bf16")
    return vae


def _conditioned(vae: Pretrained) -> Pretrained:
    from ..model import WanVAE
    from ..timestep import conditioned

    if not isinstance(vae, WanVAE):
        raise ValueError(f"--timestep-conditioning is for Wan VAEs, not for a {type(vae).__name__}")
    return conditioned(vae)


def _save_diffusers(vae: Pretrained, out: Path) -> None:
    from .._shared.files import read_json
    from ..diffusers_config import from_diffusers
    from ..export import save_diffusers

    save_diffusers(vae, out)
    read = getattr(vae, "from_diffusers", from_diffusers)
    _warn_of_loss(vae, read(read_json(out / "config.json"), out), out)


def _save_official(vae: Pretrained, out: Path) -> None:
    from ..codecs import dcae_config, dcae_infer, taehv_config
    from ..export import save_official
    from ..layouts import infer_config

    save_official(vae, out)
    if hasattr(vae, "to_official"):  # its metadata keep every fact
        return
    names = vae.official_names(vae.config)
    shapes = {names[key]: tuple(value.shape) for key, value in vae.state_dict().items()}
    others: dict[type, Any] = {taehv_config.TAEHVConfig: taehv_config.infer_config, dcae_config.DCAEConfig: dcae_infer.infer_config}
    _warn_of_loss(vae, others.get(type(vae.config), infer_config)(shapes, out), out)


def _warn_of_loss(vae: Pretrained, read: Any, out: Path) -> None:
    """Warn of facts that the layout has no room for."""
    lost = sorted(name for name, value in vae.config if getattr(read, name) != value)
    if lost:
        warnings.warn(f"'{out}' does not say {', '.join(lost)}, which its layout has no room for; --to wan keeps them", stacklevel=2)

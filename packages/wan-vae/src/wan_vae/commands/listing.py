"""`wan-vae info` and `wan-vae list`."""

from __future__ import annotations

import argparse
from fractions import Fraction
from pathlib import Path
from typing import Any

from .._shared.cli import show
from .._shared.discover import Offer, discover
from ..plugins import VAESpec, find_vae, plugin_manager
from .common import CODEC_HELP, command

CHECKPOINTS = (".safetensors", ".pth", ".pt", ".bin", ".ckpt")
SPEC_FIELDS = ("latent_space", "channels", "stride", "weights", "summary")


def add(commands: Any) -> None:
    text = "facts of a video, a latent file or a codec"
    info = command(commands, "info", _info, text, "wan-vae info film.safetensors --json", listing=True)
    which = info.add_mutually_exclusive_group(required=True)
    which.add_argument("file", nargs="?", help="a video, a latent file or a checkpoint")
    which.add_argument("--codec", help=CODEC_HELP)

    command(commands, "list", _list, "the installed VAEs", "wan-vae list --json", listing=True)


def _info(args: argparse.Namespace) -> None:
    if args.codec:
        spec = find_vae(args.codec)
        facts = {"kind": "codec", "name": spec.name, **_spec_facts(spec)}
    else:
        facts = _file_facts(args.file)
    show([facts] if args.json else [{"field": key, "value": value} for key, value in facts.items()], as_json=args.json)


def _file_facts(path: str) -> dict[str, Any]:
    from ..latents import LatentFile, is_latent_file
    from ..video import probe

    if is_latent_file(path):
        file = LatentFile.open(path)
        return {"kind": "latents", "shape": list(file.shape), "dtype": file.dtype, **file.info.to_metadata()}
    if Path(path).is_dir() or Path(path).suffix in CHECKPOINTS:
        return {"kind": "checkpoint", **_spec_facts(find_vae(path))}
    info = probe(path)
    return {"kind": "video", **{key: str(value) if isinstance(value, Fraction) else value for key, value in vars(info).items()}}


def _list(args: argparse.Namespace) -> None:
    pm = plugin_manager()
    failed = [Offer("wan_vaes", "", dist, pm.versions.get(dist, ""), None, error) for dist, error in pm.broken.items()]
    rows = []
    for offer in [*discover("wan_vaes", pm), *failed]:
        facts = _spec_facts(offer.spec) if offer.spec else dict.fromkeys(SPEC_FIELDS, "")
        status = f"{type(offer.error).__name__}: {offer.error}" if offer.error else "ok"
        rows.append({"name": offer.name, "distribution": offer.dist, "version": offer.version, **facts, "status": status})
    show(rows, as_json=args.json, empty="no VAE is installed")


def _spec_facts(spec: VAESpec) -> dict[str, Any]:
    stride = "x".join(str(step) for step in spec.stride)
    return dict(zip(SPEC_FIELDS, (spec.latent_space, spec.latent_channels, stride, spec.weights or "none", spec.summary), strict=True))

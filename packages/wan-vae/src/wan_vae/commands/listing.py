"""`wan-vae info` and `wan-vae list`."""

from __future__ import annotations

import argparse
from fractions import Fraction
from pathlib import Path
from typing import Any

from .._shared.cli import show
from .._shared.discover import Offer, discover
from ..plugins import VAESpec, find_vae, plugin_manager
from ..weights_state import weights_state
from .common import CODEC_HELP, command

CHECKPOINTS = (".safetensors", ".pth", ".pt", ".bin", ".ckpt")
CONFIGS = ("config.json", "model_index.json")
SPEC_FIELDS = ("latent_space", "channels", "stride", "parameters", "state", "weights", "summary")


def add(commands: Any) -> None:
    text = "facts of a video, pictures, a latent file or a codec"
    info = command(commands, "info", _info, text, "wan-vae info film.safetensors --json", listing=True)
    which = info.add_mutually_exclusive_group(required=True)
    which.add_argument("file", nargs="?", help="a video, a picture or folder of pictures, a latent file, a checkpoint or a VAE's name")
    which.add_argument("--codec", help=CODEC_HELP)

    command(commands, "list", _list, "the installed VAEs", "wan-vae list --json", listing=True)


def _info(args: argparse.Namespace) -> None:
    if codec := args.codec or _installed(args.file):
        spec = find_vae(codec)
        facts = {"kind": "codec", **_codec_facts(spec), "backend": _backend(spec)}
    else:
        facts = _file_facts(args.file)
    show([facts] if args.json else [{"field": key, "value": _plain(value)} for key, value in facts.items()], as_json=args.json)


def _installed(name: str) -> str | None:
    """The name of an installed VAE, which a file or folder of that name hides."""
    names = {offer.name for offer in discover("wan_vaes", plugin_manager())}
    return name if name in names and not Path(name).exists() else None


def _file_facts(path: str) -> dict[str, Any]:
    from ..latents import LatentFile, is_latent_file
    from ..video import probe

    if is_latent_file(path):
        file = LatentFile.open(path)
        return {"kind": "latents", "shape": list(file.shape), "dtype": file.dtype, **file.info.to_metadata()}
    if _is_checkpoint(Path(path)):
        return {"kind": "checkpoint", **_codec_facts(find_vae(path))}
    info = probe(path)
    return {"kind": "video", **{key: str(value) if isinstance(value, Fraction) else value for key, value in vars(info).items()}}


def _is_checkpoint(path: Path) -> bool:
    """Whether a file is named as one, or a folder holds one; any other folder is of pictures."""
    if path.is_dir():
        return any(file.suffix in CHECKPOINTS or file.name in CONFIGS for file in path.iterdir())
    if path.suffix in CHECKPOINTS and not path.is_file():
        raise FileNotFoundError(f"no file at '{path}'")
    return path.suffix in CHECKPOINTS


def _list(args: argparse.Namespace) -> None:
    pm = plugin_manager()
    failed = [Offer("wan_vaes", "", dist, pm.versions.get(dist, ""), None, error) for dist, error in pm.broken.items()]
    rows = []
    for offer in [*discover("wan_vaes", pm), *failed]:
        facts: dict[str, Any] = _spec_facts(offer.spec) if offer.spec else dict.fromkeys(SPEC_FIELDS, "")
        status = f"{type(offer.error).__name__}: {offer.error}" if offer.error else "ok"
        rows.append({"name": offer.name, "distribution": offer.dist, "version": offer.version, **facts, "status": status})
    if not args.json:
        rows = [{key: _plain(value) for key, value in row.items()} for row in rows]
    show(rows, as_json=args.json, empty="no VAE is installed")


def _codec_facts(spec: VAESpec) -> dict[str, Any]:
    """Of one codec: also its name and the distribution whose class reads it, empty where that is none that is listed."""
    offers = [offer for offer in discover("wan_vaes", plugin_manager()) if offer.spec]
    dist = next((offer.dist for offer in offers if spec == offer.spec), None)
    dist = dist or next((offer.dist for offer in offers if spec.target == offer.spec.target), "")
    return {"name": spec.name, "distribution": dist, **_spec_facts(spec)}


def _backend(spec: VAESpec) -> str:
    """The convolutions that "auto" would choose here and now for a preset; empty for others, which are not loaded to tell."""
    import torch

    from .._shared.weights import best_device
    from ..config import PRESETS
    from ..model import WanVAE

    if spec.target not in ("wan_vae.model:WanVAE", "wan_vae.model:untrained") or spec.name not in PRESETS:
        return ""
    with torch.device("meta"):
        return WanVAE(PRESETS[spec.name]).backend_on(torch.device(best_device()))


def _spec_facts(spec: VAESpec) -> dict[str, Any]:
    stride = "x".join(str(step) for step in spec.stride)
    parameters = getattr(spec, "parameters", None)  # third parties may return a record of their own
    facts = (spec.latent_space, spec.latent_channels, stride, parameters, weights_state(spec.weights), spec.weights or "none", spec.summary)
    return dict(zip(SPEC_FIELDS, facts, strict=True))


def _plain(value: Any) -> Any:
    """A fact as a table shows it."""
    if value is None:
        return ""
    return f"{value:,}" if isinstance(value, int) and value >= 10**5 else value

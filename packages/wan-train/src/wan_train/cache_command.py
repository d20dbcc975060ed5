"""The command `wan-train cache`: latents and text embeddings of a data set, made before a run by any number of processes."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from wan_dit._shared.cli import add_common, show

from .data_source import Source, add_source, seen, sources

if TYPE_CHECKING:
    from .config import TrainConfig
    from .data.buckets import Bucket
    from .data.cache import Cache, Wanted
    from .data.mix import Mix

TEXT = (
    "Encode the samples and captions of a data set once, or those of all data sets of a recipe in the shapes of all its stages. What is "
    "there is not made again; several processes may work on one folder, started by hand, and one that was killed is started again."
)


def add_cache(commands: Any) -> None:
    """Add `cache` to the subparsers of `wan-train`."""
    parser = commands.add_parser("cache", help="encode clips and captions once, before a run", description=TEXT)
    add_source(parser)
    parser.add_argument("--output", metavar="DIR", help="folder of the cache (default: `cache` in the recipe's output folder)")
    parser.add_argument("--vae", help="by name, folder or Hub id, or none (default: the recipe's, or tiny)")
    parser.add_argument("--text-encoder", help="by name, folder or Hub id, or none (default: the recipe's, or tiny)")
    parser.add_argument("--device", default="cpu", help="what the parts run on (default: cpu)")
    parser.add_argument("--dtype", choices=("fp32", "bf16"), help="of the text encoder (default: as a run has it, bf16 on a GPU)")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--status", action="store_true", help="make nothing: tell what is there, missing, stale and damaged")
    what.add_argument("--verify", action="store_true", help="as --status, reading all data")
    what.add_argument("--prune", action="store_true", help="as --verify, and remove what is stale or damaged")
    add_common(parser, listing=True)
    parser.set_defaults(do=_cache)


def _cache(args: argparse.Namespace) -> int:
    from .data.cache import Cache
    from .data.mix import Mix

    given, config = sources(args.source, args.overrides)
    folder = Path(args.output) if args.output else config and config.output / "cache"
    if not folder:
        raise ValueError("say where the cache of a folder goes: --output DIR")
    mix, parts = Mix({source.name: source.open() for source in given}), config.objective.settings if config else {}
    wanted = _wanted(args, given, config, mix)
    vae = _part("wan_vaes", args.vae or parts.get("vae", "tiny"), "fp32", args.device)  # as in a run
    text_encoder = _part("wan_text_encoders", args.text_encoder or parts.get("text_encoder", "tiny"), args.dtype, args.device)
    cache = Cache(folder, vae=vae, text_encoder=text_encoder)
    if args.status or args.verify or args.prune:
        return _tell(cache, mix, wanted, args)
    return _fill(cache, mix, wanted, args.json)


def _wanted(args: argparse.Namespace, given: Sequence[Source], config: TrainConfig | None, mix: Mix) -> Wanted:
    """Samples with the shapes that a run brings them to. ValueError where none is asked for and the data set has no size of its own."""
    for source, dataset in zip(given, mix.datasets, strict=True):
        if lacking := [name for name in ("clip", "info") if not hasattr(dataset, name)]:
            what = "gives no clips of a bucket" if "clip" in lacking else "has no `info` of its samples"
            raise ValueError(f"data set '{source.dataset}' {what}, which a cache needs")
    if found := seen(args, given, config, mix):
        return [(index, each.bucket(index)) for each in found for index in each.samples]
    several = len(given) > 1  # which a run without stages brings to one shape, that of the first
    return [(index, _own(given[0], mix, 0 if several else index)) for index in range(len(mix))]


def _own(source: Source, mix: Mix, index: int) -> Bucket:
    """The shape that a sample of a data set has without a bucket."""
    from .data.buckets import Bucket
    from .data.folder import Folder

    info, size = mix.info(index), source.settings.get("size")
    if not isinstance(mix.datasets[0], Folder):
        return Bucket(*info[:3])
    if not size:
        raise ValueError("say what size samples are brought to: --size WxH, or the data set's own setting size = [height, width]")
    return Bucket(info.frames, *size)


def _part(kind: str, name: str, dtype: str | None, device: str) -> Any:
    import torch

    from .plugins import find

    types = {"fp32": torch.float32, "bf16": torch.bfloat16, None: None}
    return None if name == "none" else find(kind, name).load(dtype=types[dtype], device=device)


def _fill(cache: Cache, mix: Mix, wanted: Wanted, as_json: bool) -> int:
    from tqdm import tqdm

    with tqdm(desc="encoded", unit="", disable=not sys.stderr.isatty()) as bar:
        done = cache.fill(mix, wanted, bar.update)
    row = {"made": done.made, "present": done.present, "failed": len(done.failed)}
    show([{**row, "failures": list(done.failed.values())} if as_json else row], as_json=as_json)
    for message in done.failed.values():
        print(message, file=sys.stderr)
    return 2 if done.failed else 0


def _tell(cache: Cache, mix: Mix, wanted: Wanted, args: argparse.Namespace) -> int:
    found = cache.status(mix, wanted, verify=args.verify or args.prune)
    rows = [{"state": "present", "files": len(found.present), "why": ""}, {"state": "missing", "files": len(found.missing), "why": ""}]
    for state, keys in (("stale", found.stale), ("damaged", found.damaged)):
        reasons = list(keys.values()) if state == "stale" else ["its content does not match its name or checksum"] * len(keys)
        rows += [{"state": state, "files": reasons.count(why), "why": why} for why in dict.fromkeys(reasons)]
    if args.prune:
        rows.append({"state": "removed", "files": cache.prune(found), "why": "stale, damaged, or left by a process that was killed"})
    show(rows, as_json=args.json)
    return 2 if found.damaged and not args.prune else 0

"""The command `wan-train cache`: latents and text embeddings of a data set, made before a run by any number of processes."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from wan_dit._shared.cli import add_common, show

from .data_source import Source, add_source, buckets, source

if TYPE_CHECKING:
    from .data.cache import BucketOf, Cache

TEXT = (
    "Encode the samples and captions of a data set once. What is there is not made again; several processes may work on one "
    "folder, started by hand, and one that was killed is started again."
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

    given = source(args.source, args.overrides)
    folder = Path(args.output) if args.output else given.output and given.output / "cache"
    if not folder:
        raise ValueError("say where the cache of a folder goes: --output DIR")
    dataset = given.open()
    bucket_of = _bucket_of(args, given, dataset)
    vae = _part("wan_vaes", args.vae or given.objective.get("vae", "tiny"), "fp32", args.device)  # as in a run
    text_encoder = _part("wan_text_encoders", args.text_encoder or given.objective.get("text_encoder", "tiny"), args.dtype, args.device)
    cache = Cache(folder, vae=vae, text_encoder=text_encoder)
    if args.status or args.verify or args.prune:
        return _tell(cache, dataset, bucket_of, args)
    return _fill(cache, dataset, bucket_of, args.json)


def _bucket_of(args: argparse.Namespace, given: Source, dataset: Any) -> BucketOf:
    """The shape of each sample. ValueError where none is asked for and the data set has no size of its own."""
    from .data.buckets import Bucket, Info
    from .data.folder import Folder

    if not hasattr(dataset, "clip"):
        raise ValueError(f"data set '{given.dataset}' gives no clips of a bucket, which a cache needs")
    shapes = buckets(args, given.settings.get("frames", 81))
    if shapes:
        return lambda index: shapes.of(Info(*dataset.info(index)))
    if not isinstance(dataset, Folder):
        return lambda index: Bucket(*dataset.info(index)[:3])
    size = given.settings.get("size")
    if not size:
        raise ValueError("say what size samples are brought to: --size WxH, or the data set's own setting size = [height, width]")
    return lambda index: Bucket(dataset.info(index)[0], *size)


def _part(kind: str, name: str, dtype: str | None, device: str) -> Any:
    import torch

    from .plugins import find

    types = {"fp32": torch.float32, "bf16": torch.bfloat16, None: None}
    return None if name == "none" else find(kind, name).load(dtype=types[dtype], device=device)


def _fill(cache: Cache, dataset: Any, bucket_of: BucketOf, as_json: bool) -> int:
    from tqdm import tqdm

    with tqdm(desc="encoded", unit="", disable=not sys.stderr.isatty()) as bar:
        done = cache.fill(dataset, bucket_of, bar.update)
    row = {"made": done.made, "present": done.present, "failed": len(done.failed)}
    show([{**row, "failures": list(done.failed.values())} if as_json else row], as_json=as_json)
    for message in done.failed.values():
        print(message, file=sys.stderr)
    return 2 if done.failed else 0


def _tell(cache: Cache, dataset: Any, bucket_of: BucketOf, args: argparse.Namespace) -> int:
    found = cache.status(dataset, bucket_of, verify=args.verify or args.prune)
    rows = [{"state": "present", "files": len(found.present), "why": ""}, {"state": "missing", "files": len(found.missing), "why": ""}]
    for state, keys in (("stale", found.stale), ("damaged", found.damaged)):
        reasons = list(keys.values()) if state == "stale" else ["its content does not match its name or checksum"] * len(keys)
        rows += [{"state": state, "files": reasons.count(why), "why": why} for why in dict.fromkeys(reasons)]
    if args.prune:
        rows.append({"state": "removed", "files": cache.prune(found), "why": "stale, damaged, or left by a process that was killed"})
    show(rows, as_json=args.json)
    return 2 if found.damaged and not args.prune else 0

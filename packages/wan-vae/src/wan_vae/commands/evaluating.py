"""`wan-vae eval`."""

from __future__ import annotations

import argparse
import sys
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .._shared.cli import show
from .._shared.files import replacing
from ..plugins import VAESpec, find_vae
from .coding import TINY_NOTE
from .common import CODEC_HELP, DTYPES, check_folder, command, load, progress_bar, whole_number
from .planning import pixels

if TYPE_CHECKING:
    from ..codec import Progress
    from ..evaluation import Settings
    from ..report import Report

FILMS = {".mp4", ".mkv", ".mov", ".webm", ".avi", ".m4v", ".mpg", ".mpeg", ".ts", ".gif", ".y4m"}
FILES = ("eval.json", "contact-sheet.png", "index.html")


def add(commands: Any) -> None:
    text = "what a codec makes of clips: quality, artefacts, compression, speed"
    parser = command(commands, "eval", _eval, text, "wan-vae eval film.mp4 --codec wan2.1 --codec tiny --out report", listing=True)
    parser.add_argument("clips", nargs="+", metavar="CLIP", help="a video, a picture, a folder of pictures, or a folder of videos")
    parser.add_argument("--codec", action="append", help=f"{CODEC_HELP}; may be repeated (default: the built-in tiny)")
    parser.add_argument("--frames", type=whole_number(1), help="measure only the first so many frames of every clip")
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--size", type=pixels, metavar="HxW", help="scale and crop pictures to this height and width")
    size.add_argument("--max-size", type=whole_number(1), metavar="PIXELS", help="scale pictures down to this longer side")
    parser.add_argument("--tile", type=pixels, metavar="HxW", help="measure seams at the borders of tiles of this size")
    parser.add_argument("--latent-dtype", choices=DTYPES, default="fp32", help="type that latents are stored in (default: fp32)")
    parser.add_argument("--lpips-weights", metavar="FILE", help="TorchScript or .pt2 network: two batches [N, 3, H, W] in [-1, 1] to LPIPS")
    parser.add_argument("--fvd-model", metavar="FILE", help="TorchScript or .pt2 network: a video [1, 3, 16, H, W] in [-1, 1] to features")
    parser.add_argument("--out", metavar="DIR", help=f"folder for {', '.join(FILES)}")
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier report in --out")
    parser.add_argument("--dtype", choices=DTYPES, help="type to compute in (default: fp32)")
    parser.add_argument("--device", help="cpu, cuda, cuda:1, mps (default: the best there is)")
    parser.add_argument("--progress", action="store_true", help="show progress where stderr is no terminal, too")


def _eval(args: argparse.Namespace) -> None:
    from ..video import probe

    out = _output(args)
    clips = _clips(args.clips)
    counts = [probe(clip).frames or 0 for clip in clips]  # before a codec is loaded, or fetched
    specs = {name: find_vae(name) for name in args.codec or ["tiny"]}
    report = _measure(args, clips, specs, sum(min(count, args.frames or count) for count in counts) * len(specs))
    if out:
        _write(report, out)
    if args.json:
        print(report.to_json())
        return
    show(report.rows(), as_json=False)
    print(*report.missing(), sep="\n", end="\n" if report.missing() else "")
    if out:
        print(f"{out}: {', '.join(FILES)}")


def _measure(args: argparse.Namespace, clips: list[str], specs: dict[str, VAESpec], total: int) -> Report:
    import torch

    from ..codec import VideoCodec
    from ..evaluation import evaluate
    from ..report import Report

    settings = _settings(args)
    measured = []
    with progress_bar(args) as progress:
        done = 0
        for name, spec in specs.items():
            vae = load(spec, args, default_dtype=torch.float32)
            if not args.codec:
                print(TINY_NOTE, file=sys.stderr)
            codec = VideoCodec(vae, name=name)
            for clip in clips:
                measured.append(evaluate(codec, clip, settings, progress=partial(_report, progress, done, total)))
                done += measured[-1].values["frames"]
            del vae, codec
    described = {
        "frames": args.frames,
        "size": "x".join(map(str, args.size)) if args.size else None,
        "max_size": args.max_size,
        "tile": "x".join(map(str, args.tile)) if args.tile else None,
        "dtype": args.dtype or "fp32",
        "latent_dtype": args.latent_dtype,
        "lpips_weights": args.lpips_weights,
        "fvd_model": args.fvd_model,
    }
    return Report(measured, described)


def _report(progress: Progress, before: int, total: int, count: int) -> None:
    progress(before + count, total or None)


def _settings(args: argparse.Namespace) -> Settings:
    import torch

    from .._shared.weights import best_device, usable_device
    from ..evaluation import Settings
    from ..perceptual import load_network

    device = usable_device(args.device or best_device())
    return Settings(
        frames=args.frames,
        size=args.size,
        max_size=args.max_size,
        latent_dtype=getattr(torch, DTYPES[args.latent_dtype]),
        tile=args.tile,
        lpips=load_network(args.lpips_weights, device) if args.lpips_weights else None,
        fvd=load_network(args.fvd_model, device) if args.fvd_model else None,
    )


def _clips(paths: list[str]) -> list[str]:
    """The clips that the arguments name: a folder with videos is one each, any other folder a clip of pictures."""
    clips = []
    for path in paths:
        films = sorted(str(file) for file in Path(path).iterdir() if file.suffix.lower() in FILMS) if Path(path).is_dir() else []
        clips += films or [path]
    return list(dict.fromkeys(clips))


def _output(args: argparse.Namespace) -> Path | None:
    if args.out is None:
        return None
    out = Path(args.out)
    if out.exists() and not out.is_dir():
        raise ValueError(f"cannot write to '{out}': it exists and is not a folder")
    check_folder(out)
    for name in FILES:
        if (out / name).exists() and not args.overwrite:
            raise ValueError(f"'{out / name}' exists; name another folder or pass --overwrite")
    return out


def _write(report: Report, out: Path) -> None:
    contents = (report.to_json().encode(), report.sheet(), report.to_html().encode())
    with ExitStack() as stack:  # no file takes its name before all are written
        scratch = [stack.enter_context(replacing(out / name)) for name in FILES]
        for file, content in zip(scratch, contents, strict=True):
            file.write_bytes(content)

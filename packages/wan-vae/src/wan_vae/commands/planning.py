"""`wan-vae plan`, and the options by which other commands work in tiles."""

from __future__ import annotations

import argparse
import re
import sys
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from .._shared.amounts import amount, in_words
from .._shared.cli import show
from ..plugins import find_vae
from .common import CODEC_HELP, DTYPES, add_chunk, command, whole_number

if TYPE_CHECKING:
    import torch

    from ..tiles import Half

LONGEST_SIDE = 32768  # pixels, beyond any film
HALVES: dict[str, Half] = {"encode": "encoder", "decode": "decoder"}


def add(commands: Any) -> None:
    text = "the memory that encoding and decoding will take, and whether in tiles"
    plan = command(commands, "plan", _plan, text, "wan-vae plan --codec wan2.1 --size 480x832 --memory 8GB", listing=True)
    plan.add_argument("--codec", default="tiny", help=f"{CODEC_HELP}; of a preset no weights are fetched (default: tiny)")
    plan.add_argument("--size", type=pixels, required=True, metavar="HxW", help="height and width in pixels")
    plan.add_argument("--frames", type=whole_number(1), help="length; only 1, a picture, takes less than any other (default: a film)")
    plan.add_argument("--dtype", choices=DTYPES, default="fp32", help="type to compute in (default: fp32)")
    plan.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1, mps (default: cpu)")
    plan.add_argument("--memory", type=amount, help="keep to so much, such as 8GB or 500MiB (default: what is free on the device)")
    add_chunk(plan)


def add_tiling(parser: argparse.ArgumentParser) -> None:
    """The options `--tile` and `--tile-mode`."""
    parser.add_argument(
        "--tile",
        type=tile_size,
        default="auto",
        metavar="HxW|auto|off",
        help="work in tiles of so many pixels; auto: only where memory would not do otherwise, or runs out (default: auto)",
    )
    parser.add_argument(
        "--tile-mode",
        choices=("exact", "blend"),
        help="exact: the result of the whole picture; blend: less work, approximate (default: exact, where that is possible)",
    )


def tiled(vae: Any, args: argparse.Namespace, size: tuple[int, int], half: Half, chunk: int = 1, frames: int | None = None) -> Any:
    """`vae` in the tiles that the options ask for, or that a plan for `half` ("encoder" or "decoder") finds necessary.

    size: height and width in pixels
    chunk: latent frames at a time
    frames: of the film, where known
    Says on stderr which tiles a plan chose, and whether they are exact. Raises ValueError for options that contradict each other.
    """
    from ..backoff import BackingOff, describe, smaller_tiles
    from ..model import WanVAE
    from ..plan import make_plan
    from ..setting import setting_of
    from ..tiling import TiledVAE

    if args.tile == "off" and args.tile_mode:
        raise ValueError(f"--tile off works without tiles: leave out --tile-mode {args.tile_mode}")
    if args.tile == "off":
        return vae
    if args.tile != "auto":
        exact = isinstance(vae, WanVAE)
        vae = TiledVAE(vae, args.tile, args.tile_mode or ("exact" if exact else "blend"))
    elif found := setting_of(vae, half, size, chunk):
        setting = replace(found, frames=frames)
        plan = make_plan(setting, "whole")
        if not plan.fits:
            plan = make_plan(setting, args.tile_mode)
        if plan.mode != "whole":
            vae = TiledVAE(vae, plan.tile, plan.mode, plan.overlap or None)
            print(f"wan-vae: {size[0]}x{size[1]} pixels would not fit into {in_words(plan.budget)}: {describe(vae)}", file=sys.stderr)
        if not plan.fits:
            less = ", of which a smaller --chunk takes less" if chunk > 1 else ""
            print(f"wan-vae: {in_words(plan.memory)} may be needed, {in_words(plan.budget)} are free{less}", file=sys.stderr)
    return BackingOff(vae, smaller_tiles(vae, chunk))


def _plan(args: argparse.Namespace) -> None:
    import torch

    from ..plan import make_plan
    from ..setting import Setting, config_of

    device = _device(args)
    config = config_of(find_vae(args.codec))
    rows = []
    for name, half in HALVES.items():
        setting = Setting(
            config,
            half,
            args.size,
            getattr(torch, DTYPES[args.dtype]),
            device,
            args.chunk,
            args.frames,
            memory=args.memory,  # type: ignore[arg-type]
        )
        plan = make_plan(setting)
        row = {"command": name, "mode": plan.mode, "tile": "x".join(map(str, plan.tile)), "tiles": plan.tiles, "overlap": plan.overlap}
        parts = {key: value for key, value in vars(plan.parts).items() if key != "still"}
        if args.json:
            row |= {"overhead": plan.overhead, "memory": plan.memory, "budget": plan.budget, "fits": plan.fits, **parts, "note": plan.note}
        else:
            row |= {"overhead": f"{plan.overhead:.0%}", "memory": in_words(plan.memory), "budget": in_words(plan.budget)}
            row |= {key: in_words(value) for key, value in parts.items()} | {"note": plan.note}
        rows.append(row)
    show(rows, as_json=args.json)


def _device(args: argparse.Namespace) -> torch.device:
    """The device to plan for; with `--memory` it need not be here."""
    import torch

    from .._shared.weights import usable_device

    if not args.memory:
        return usable_device(args.device)
    try:
        return torch.device(args.device)
    except RuntimeError as error:
        raise ValueError(f"there is no device '{args.device}', expected one such as cpu, cuda, cuda:1 or mps") from error


def pixels(text: str) -> tuple[int, int]:
    """An argparse type: `HxW`."""
    match = re.fullmatch(r"(\d{1,5})x(\d{1,5})", text, re.ASCII)
    height, width = (int(match[1]), int(match[2])) if match else (0, 0)
    if not (0 < height <= LONGEST_SIDE and 0 < width <= LONGEST_SIDE):
        raise argparse.ArgumentTypeError(f"'{text}' is not a height and width such as 480x832, of at most {LONGEST_SIDE} pixels")
    return height, width


def tile_size(text: str) -> tuple[int, int] | str:
    """An argparse type: `HxW`, "auto" or "off"."""
    return text if text in ("auto", "off") else pixels(text)

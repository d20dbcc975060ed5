"""`wan-vae encode` and `wan-vae decode`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .._shared.discover import discover, resolve
from ..plugins import VAESpec, find_vae, plugin_manager
from .common import CODEC_HELP, DTYPES, add_running, command, load, output_path, progress_bar, whole_number

if TYPE_CHECKING:
    from ..latents import LatentInfo

TINY_NOTE = "wan-vae: using the built-in 'tiny', which was trained on rendered shapes; --codec wan2.1 is the one for real films"


def add(commands: Any) -> None:
    encode = command(commands, "encode", _encode, "film to latent file", "wan-vae encode film.mp4 --codec wan2.1 --device cuda")
    encode.add_argument("video", help="a video file")
    encode.add_argument("output", nargs="?", help="the latent file (default: the film's name with .safetensors)")
    encode.add_argument("--codec", help=f"{CODEC_HELP} (default: the built-in tiny)")
    encode.add_argument("--latent-dtype", choices=DTYPES, default="fp32", help="type of the latents in the file (default: fp32)")
    encode.add_argument("--frames", type=whole_number(1), help="encode only the first so many frames")
    add_running(encode)

    decode = command(commands, "decode", _decode, "latent file to film", "wan-vae decode film.safetensors back.mp4")
    decode.add_argument("latents", help="a latent file")
    decode.add_argument("output", nargs="?", help="the video file (default: the latent file's name with .decoded.mp4)")
    decode.add_argument("--codec", help=f"{CODEC_HELP} (default: the one the file names)")
    decode.add_argument("--crf", type=whole_number(0, 51), default=18, metavar="0-51", help="H.264 quality, 0 is best (default: 18)")
    decode.add_argument("--lossless", action="store_true", help="store RGB as it is decoded")
    add_running(decode)


def _encode(args: argparse.Namespace) -> None:
    import torch

    from ..codec import VideoCodec
    from ..video import probe

    probe(args.video)  # before a codec is loaded, or fetched
    output = output_path(args, Path(args.video), ".safetensors")
    spec = find_vae(args.codec or "tiny")
    vae = load(spec, args, default_dtype=torch.float32)
    if not args.codec:
        print(TINY_NOTE, file=sys.stderr)
    with progress_bar(args) as progress:
        info = VideoCodec(vae, name=_recorded_name(spec)).encode_file(
            args.video,
            output,
            chunk=args.chunk,
            dtype=getattr(torch, DTYPES[args.latent_dtype]),
            limit=args.frames,
            progress=progress,
        )
    print(f"{output}: {_summary(info)}")


def _decode(args: argparse.Namespace) -> None:
    from ..codec import VideoCodec
    from ..latents import LatentFile

    recorded = LatentFile.open(args.latents).info
    output = output_path(args, Path(args.latents), ".decoded.mp4")
    spec = find_vae(args.codec) if args.codec else _named_codec(recorded)
    if spec.latent_space != recorded.latent_space:
        raise ValueError(
            f"'{args.latents}' holds latents of the space '{recorded.latent_space}', but '{spec.name}' decodes '{spec.latent_space}'"
        )
    with progress_bar(args) as progress:
        info = VideoCodec(load(spec, args), name=_recorded_name(spec)).decode_file(
            args.latents, output, chunk=args.chunk, crf=args.crf, lossless=args.lossless, progress=progress
        )
    print(f"{output}: {_summary(info)}")


def _named_codec(info: LatentInfo) -> VAESpec:
    """The codec that a latent file names; a checkpoint without a registered name is replaced by what shares its space."""
    pm = plugin_manager()
    try:
        spec: VAESpec = resolve("wan_vaes", info.codec, pm, typed=False)
        return spec
    except LookupError as error:
        fitting = [offer.spec for offer in discover("wan_vaes", pm) if offer.spec and offer.spec.latent_space == info.latent_space]
        if fitting and ":" not in info.codec:
            return fitting[0]  # type: ignore[no-any-return]
        raise LookupError(f"{error}; name the codec with --codec (latent space '{info.latent_space}')") from error


def _recorded_name(spec: VAESpec) -> str | None:
    """The name for the latent file: none for a path, Hub id or import string, which mean nothing elsewhere."""
    return None if spec.name in (spec.weights, spec.target) else spec.name


def _summary(info: LatentInfo) -> str:
    return f"{info.frames} frames of {info.width}x{info.height} at {float(info.fps):.5g} fps, codec '{info.codec}'"

"""`wan-vae encode` and `wan-vae decode`."""

from __future__ import annotations

import argparse
import re
import sys
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .._shared.discover import discover, resolve
from ..plugins import VAESpec, find_vae, plugin_manager
from .common import CODEC_HELP, DTYPES, add_running, command, load, output_path, progress_bar, whole_number
from .planning import add_tiling, tiled

if TYPE_CHECKING:
    from ..latents import LatentInfo

TINY_NOTE = "wan-vae: using the built-in 'tiny', a codec of 0.7 million parameters; --codec wan2.1 is the one for real films"


def add(commands: Any) -> None:
    encode = command(commands, "encode", _encode, "film to latent file", "wan-vae encode film.mp4 --codec wan2.1 --device cuda")
    encode.add_argument("video", help="a video, a picture or a folder of pictures (in natural order: 2 before 10)")
    encode.add_argument("output", nargs="?", help="the latent file (default: the film's name with .safetensors)")
    encode.add_argument("--codec", help=f"{CODEC_HELP} (default: the built-in tiny)")
    encode.add_argument("--latent-dtype", choices=DTYPES, default="fp32", help="type of the latents in the file (default: fp32)")
    encode.add_argument("--logvar", action="store_true", help="store the log-variance beside the latents")
    encode.add_argument("--frames", type=whole_number(1), help="encode only the first so many frames")
    encode.add_argument("--fps", type=_rate, help="frame rate of pictures, such as 25 or 30000/1001 (default: 24)")
    encode.add_argument("--crop", type=_crop, metavar="WxH+X+Y", help="encode only this part: width, height and its left upper corner")
    encode.add_argument(
        "--on-error",
        choices=("error", "stop", "fill"),
        default="error",
        help="at a missing or damaged frame: refuse the film, stop there, or repeat the last good frame; "
        "the latter two are recorded in the file (default: error)",
    )
    add_running(encode)
    add_tiling(encode)

    decode = command(commands, "decode", _decode, "latent file to film", "wan-vae decode film.safetensors back.mp4")
    decode.add_argument("latents", help="a latent file")
    text = "the video; or a folder, a pattern such as out/%%05d.png or (one frame) a .png (default: LATENTS with .decoded.mp4)"
    decode.add_argument("output", nargs="?", help=text)
    decode.add_argument("--codec", help=f"{CODEC_HELP} (default: the one the file names)")
    quality = decode.add_mutually_exclusive_group()
    quality.add_argument("--crf", type=whole_number(0, 51), default=18, metavar="0-51", help="H.264 quality, 0 is best (default: 18)")
    quality.add_argument("--lossless", action="store_true", help="store 8-bit RGB as it is decoded")
    decode.add_argument("--bit-depth", type=int, choices=(8, 10), default=8, help="bits per component; 10 gives 16-bit PNG (default: 8)")
    decode.add_argument("--audio", metavar="SOURCE", help="copy the sound of this film, such as the one that was encoded")
    add_running(decode)
    add_tiling(decode)


def _encode(args: argparse.Namespace) -> None:
    import torch

    from ..codec import VideoCodec
    from ..video import probe

    source = probe(args.video, fps=args.fps)  # before a codec is loaded, or fetched
    output = output_path(args, Path(args.video), ".safetensors")
    if output.suffix != ".safetensors" and not output.is_dir():  # a folder is refused by what it is
        raise ValueError(f"a latent file is named .safetensors, got '{output}'")
    spec = find_vae(args.codec or "tiny")
    vae = load(spec, args, default_dtype=torch.float32)
    if not args.codec:
        print(TINY_NOTE, file=sys.stderr)
    margins = _margins(args.crop, source.width, source.height) if args.crop else (0, 0, 0, 0)
    width, height = source.width - margins[0] - margins[2], source.height - margins[1] - margins[3]
    frames = min(filter(None, (source.frames, args.frames)), default=None)
    chunk = _chunk(args.chunk, frames, spec)
    vae = tiled(vae, args, _padded(height, width, spec), "encoder", chunk, frames)
    with progress_bar(args) as progress:
        info = VideoCodec(vae, name=_recorded_name(spec)).encode_file(
            args.video,
            output,
            chunk=chunk,
            dtype=getattr(torch, DTYPES[args.latent_dtype]),
            limit=args.frames,
            logvar=args.logvar,
            on_error=args.on_error,
            fps=args.fps,
            crop=margins if args.crop else None,
            progress=progress,
        )
    print(f"{output}: {_summary(info)}")


def _decode(args: argparse.Namespace) -> None:
    from ..audio import AudioTrack
    from ..codec import VideoCodec
    from ..images import taken
    from ..latents import LatentFile

    recorded = LatentFile.open(args.latents).info
    output = output_path(args, Path(args.latents), ".decoded.mp4")
    if not args.overwrite and (exists := taken(output, recorded.frames)):
        raise ValueError(f"'{exists}' exists; name another output or pass --overwrite")
    if args.audio:
        AudioTrack(args.audio).close()  # before a codec is loaded, or fetched
    spec = find_vae(args.codec) if args.codec else _named_codec(recorded)
    if spec.latent_space != recorded.latent_space:
        raise ValueError(
            f"'{args.latents}' holds latents of the space '{recorded.latent_space}', but '{spec.name}' decodes '{spec.latent_space}'"
        )
    chunk = _chunk(args.chunk, recorded.frames, spec)
    vae = tiled(load(spec, args), args, _padded(recorded.height, recorded.width, spec), "decoder", chunk, recorded.frames)
    with progress_bar(args) as progress:
        info = VideoCodec(vae, name=_recorded_name(spec)).decode_file(
            args.latents,
            output,
            chunk=chunk,
            crf=args.crf,
            lossless=args.lossless,
            bit_depth=args.bit_depth,
            audio=args.audio,
            progress=progress,
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


def _rate(text: str) -> Fraction:
    match = re.fullmatch(r"(\d{1,7}(?:\.\d{1,6})?)(?:/(\d{1,7}))?", text, re.ASCII)
    if not match or not float(match[1]) or (match[2] and not int(match[2])):
        raise argparse.ArgumentTypeError(f"'{text}' is not a frame rate such as 25, 23.976 or 30000/1001")
    return Fraction(match[1]) / int(match[2] or 1)


def _crop(text: str) -> tuple[int, int, int, int]:
    match = re.fullmatch(r"(\d{1,6})x(\d{1,6})\+(\d{1,6})\+(\d{1,6})", text, re.ASCII)
    if not match or not int(match[1]) or not int(match[2]):
        raise argparse.ArgumentTypeError(f"'{text}' is not a part of a picture such as 1920x800+0+140")
    return int(match[1]), int(match[2]), int(match[3]), int(match[4])


def _margins(part: tuple[int, int, int, int], width: int, height: int) -> tuple[int, int, int, int]:
    """What is cut off at the left, top, right and bottom to keep `part` (width, height, x, y) of a picture."""
    wide, high, x, y = part
    if x + wide > width or y + high > height:
        raise ValueError(f"--crop {wide}x{high}+{x}+{y} reaches beyond the picture, which is {width}x{height}")
    return x, y, width - x - wide, height - y - high


def _padded(height: int, width: int, spec: VAESpec) -> tuple[int, int]:
    """The size that the codec works on."""
    from ..latent_info import Padding

    padding = Padding.of(1, height, width, spec.stride)
    return height + padding.bottom, width + padding.right


def _chunk(asked: int, frames: int | None, spec: VAESpec) -> int:
    """Latent frames at a time, not more than the film has after the first: memory is planned for them."""
    return asked if frames is None else max(1, min(asked, -(-(frames - 1) // spec.stride[0])))


def _recorded_name(spec: VAESpec) -> str | None:
    """The name for the latent file: none for a path, Hub id or import string, which mean nothing elsewhere."""
    return None if spec.name in (spec.weights, spec.target) else spec.name


def _summary(info: LatentInfo) -> str:
    return f"{info.frames} frame{'s' * (info.frames > 1)} of {info.width}x{info.height} at {float(info.fps):.5g} fps, codec '{info.codec}'"

"""The command `wan-vae`: encode, decode, info, list. Help and listing import no torch."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import __version__
from ._shared.cli import Parser, add_common, run, show
from ._shared.discover import Offer, discover, resolve
from .plugins import VAESpec, find_vae, plugin_manager

if TYPE_CHECKING:
    import torch

    from .codec import Progress
    from .latents import LatentInfo

DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
CHECKPOINTS = (".safetensors", ".pth", ".pt", ".bin", ".ckpt")
SPEC_FIELDS = ("latent_space", "channels", "stride", "weights", "summary")
TINY_NOTE = "wan-vae: using the built-in 'tiny', which was trained on rendered shapes; --codec wan2.1 is the one for real films"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code (0, 2 for bad input, 1 for anything unexpected, 130 on Ctrl-C)."""
    return run(lambda args: args.command(args), _parser(), argv)


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="wan-vae",
        description="Film to latents and back, at constant memory.",
        epilog="example: wan-vae encode film.mp4 film.safetensors && wan-vae decode film.safetensors back.mp4",
    )
    parser.add_argument("--version", action="version", version=f"wan-vae {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    encode = _command(commands, "encode", _encode, "film to latent file", "wan-vae encode film.mp4 --codec wan2.1 --device cuda")
    encode.add_argument("video", help="a video file")
    encode.add_argument("output", nargs="?", help="the latent file (default: the film's name with .safetensors)")
    encode.add_argument("--codec", help="name, file, folder, Hub id or module:attr of a VAE (default: the built-in tiny)")
    encode.add_argument("--latent-dtype", choices=DTYPES, default="fp32", help="type of the latents in the file (default: fp32)")
    encode.add_argument("--frames", type=_whole_number(1), help="encode only the first so many frames")
    _add_running(encode)

    decode = _command(commands, "decode", _decode, "latent file to film", "wan-vae decode film.safetensors back.mp4")
    decode.add_argument("latents", help="a latent file")
    decode.add_argument("output", nargs="?", help="the video file (default: the latent file's name with .decoded.mp4)")
    decode.add_argument("--codec", help="name, file, folder, Hub id or module:attr of a VAE (default: the one the file names)")
    decode.add_argument("--crf", type=_whole_number(0, 51), default=18, metavar="0-51", help="H.264 quality, 0 is best (default: 18)")
    decode.add_argument("--lossless", action="store_true", help="store RGB as it is decoded")
    _add_running(decode)

    text = "facts of a video, a latent file or a codec"
    info = _command(commands, "info", _info, text, "wan-vae info film.safetensors --json", listing=True)
    which = info.add_mutually_exclusive_group(required=True)
    which.add_argument("file", nargs="?", help="a video, a latent file or a checkpoint")
    which.add_argument("--codec", help="name, file, folder, Hub id or module:attr of a VAE")

    _command(commands, "list", _list, "the installed VAEs", "wan-vae list --json", listing=True)
    return parser


def _command(commands: Any, name: str, run_it: Any, text: str, example: str, *, listing: bool = False) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(
        name, help=text, description=f"{text.capitalize()}.", epilog=f"example: {example}"
    )
    parser.set_defaults(command=run_it)
    add_common(parser, listing=listing)
    return parser


def _add_running(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--dtype", choices=DTYPES, help="type to compute in (default: fp32; to decode on a GPU the checkpoint's own)")
    parser.add_argument("--device", help="cpu, cuda, cuda:1, mps (default: the best there is)")
    parser.add_argument("--chunk", type=_whole_number(1), default=1, help="latent frames at a time, more take more memory (default: 1)")
    parser.add_argument("--overwrite", action="store_true", help="replace the output where it exists")
    parser.add_argument("--progress", action="store_true", help="show progress where stderr is no terminal, too")


def _whole_number(least: int, most: int | None = None) -> Callable[[str], int]:
    def read(text: str) -> int:
        value = int(text) if text.isdecimal() else -1
        if value < least or (most is not None and value > most):
            bounds = f"of at least {least}" if most is None else f"from {least} to {most}"
            raise argparse.ArgumentTypeError(f"'{text}' is not a whole number {bounds}")
        return value

    return read


def _encode(args: argparse.Namespace) -> None:
    import torch

    from .codec import VideoCodec
    from .video import probe

    probe(args.video)  # before a codec is loaded, or fetched
    output = _output(args, Path(args.video), ".safetensors")
    spec = find_vae(args.codec or "tiny")
    vae = _load(spec, args, default_dtype=torch.float32)
    if not args.codec:
        print(TINY_NOTE, file=sys.stderr)
    with _progress(args) as progress:
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
    from .codec import VideoCodec
    from .latents import LatentFile

    recorded = LatentFile.open(args.latents).info
    output = _output(args, Path(args.latents), ".decoded.mp4")
    spec = find_vae(args.codec) if args.codec else _named_codec(recorded)
    if spec.latent_space != recorded.latent_space:
        raise ValueError(
            f"'{args.latents}' holds latents of the space '{recorded.latent_space}', but '{spec.name}' decodes '{spec.latent_space}'"
        )
    with _progress(args) as progress:
        info = VideoCodec(_load(spec, args), name=_recorded_name(spec)).decode_file(
            args.latents, output, chunk=args.chunk, crf=args.crf, lossless=args.lossless, progress=progress
        )
    print(f"{output}: {_summary(info)}")


def _info(args: argparse.Namespace) -> None:
    if args.codec:
        spec = find_vae(args.codec)
        facts = {"kind": "codec", "name": spec.name, **_spec_facts(spec)}
    else:
        facts = _file_facts(args.file)
    show([facts] if args.json else [{"field": key, "value": value} for key, value in facts.items()], as_json=args.json)


def _file_facts(path: str) -> dict[str, Any]:
    from .latents import LatentFile, is_latent_file
    from .video import probe

    if is_latent_file(path):
        file = LatentFile.open(path)
        return {"kind": "latents", "shape": list(file.shape), "dtype": file.dtype, **file.info.to_metadata()}
    if Path(path).is_dir() or Path(path).suffix in CHECKPOINTS:
        return {"kind": "checkpoint", **_spec_facts(find_vae(path))}
    info = probe(path)
    return {"kind": "video", **vars(info), "fps": str(info.fps)}


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


def _load(spec: VAESpec, args: argparse.Namespace, default_dtype: torch.dtype | None = None) -> Any:
    import torch

    from ._shared.weights import best_device, usable_device

    device = usable_device(args.device or best_device())
    return spec.load(dtype=getattr(torch, DTYPES[args.dtype]) if args.dtype else default_dtype, device=device)


def _output(args: argparse.Namespace, source: Path, suffix: str) -> Path:
    output = Path(args.output) if args.output else source.with_suffix(suffix)
    if output.exists() and output.samefile(source):
        raise ValueError(f"'{output}' is the input; name another output")
    if output.exists() and not args.overwrite:
        raise ValueError(f"'{output}' exists; name another output or pass --overwrite")
    if not output.absolute().parent.is_dir():
        raise ValueError(f"cannot write '{output}': there is no folder '{output.absolute().parent}'")
    return output


@contextmanager
def _progress(args: argparse.Namespace) -> Iterator[Progress]:
    from tqdm import tqdm

    with tqdm(unit=" frames", file=sys.stderr, disable=not (args.progress or sys.stderr.isatty())) as bar:

        def report(done: int, total: int | None) -> None:
            bar.total = total
            bar.update(done - bar.n)

        yield report


def _summary(info: LatentInfo) -> str:
    return f"{info.frames} frames of {info.width}x{info.height} at {float(info.fps):.5g} fps, codec '{info.codec}'"

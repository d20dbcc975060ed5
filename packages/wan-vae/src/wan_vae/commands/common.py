"""What several commands share: parsers, options for running a VAE, outputs, progress."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .._shared.cli import add_common
from ..plugins import VAESpec

if TYPE_CHECKING:
    import torch

    from ..codec import Progress

DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
BACKENDS = ("auto", "direct", "winograd", "conv2d")  # as in convolution.py, which imports torch
LARGEST_CHUNK = 9999  # latent frames
CODEC_HELP = "name, file, folder, Hub id or module:attr of a VAE"


def command(commands: Any, name: str, run_it: Any, text: str, example: str, *, listing: bool = False) -> argparse.ArgumentParser:
    """Declare the subcommand `name`, which calls `run_it(args)`."""
    parser: argparse.ArgumentParser = commands.add_parser(
        name, help=text, description=f"{text[0].upper()}{text[1:]}.", epilog=f"example: {example}"
    )
    parser.set_defaults(command=run_it)
    add_common(parser, listing=listing)
    return parser


def add_running(parser: argparse.ArgumentParser) -> None:
    """The options of every command that runs a VAE over frames."""
    parser.add_argument("--dtype", choices=DTYPES, help="type to compute in (default: fp32; bf16 to decode on a GPU)")
    parser.add_argument("--device", help="cpu, cuda, cuda:1, mps (default: the best there is)")
    parser.add_argument("--backend", choices=BACKENDS, help="how convolutions are computed (default: auto, the fastest that has room)")
    add_chunk(parser)
    parser.add_argument("--overwrite", action="store_true", help="replace the output where it exists")
    parser.add_argument("--progress", action="store_true", help="show progress where stderr is no terminal, too")


def add_chunk(parser: argparse.ArgumentParser) -> None:
    """The option `--chunk`."""
    reads = whole_number(1, LARGEST_CHUNK)
    parser.add_argument("--chunk", type=reads, default=1, help="latent frames at a time, more take more memory (default: 1)")


def whole_number(least: int, most: int | None = None) -> Callable[[str], int]:
    """An argparse type: a whole number from `least` to `most`."""

    def read(text: str) -> int:
        value = min(int(text), sys.maxsize) if text.isdecimal() else -1
        if value < least or (most is not None and value > most):
            bounds = f"of at least {least}" if most is None else f"from {least} to {most}"
            raise argparse.ArgumentTypeError(f"'{text}' is not a whole number {bounds}")
        return value

    return read


def load(spec: VAESpec, args: argparse.Namespace, default_dtype: torch.dtype | None = None) -> Any:
    """The VAE that the options `--dtype`, `--device` and `--backend` ask for."""
    import torch

    from .._shared.weights import best_device, usable_device

    device = usable_device(args.device or best_device())
    vae = spec.load(dtype=getattr(torch, DTYPES[args.dtype]) if args.dtype else default_dtype, device=device)
    if getattr(args, "backend", None):
        if not hasattr(vae, "backend"):
            raise ValueError(f"'{spec.name}' has no choice of convolution backends: leave out --backend {args.backend}")
        vae.backend = args.backend
    return vae


def output_path(args: argparse.Namespace, source: Path, suffix: str) -> Path:
    """Where to write: `args.output`, or the source's name with `suffix`.

    Raises ValueError where there is no such name or it is taken, and as `check_folder` does.
    """
    if not args.output and source.name in ("", ".."):
        raise ValueError(f"'{source}' gives the output no name; name one")
    output = Path(args.output) if args.output else source.with_suffix(suffix)
    if output.exists() and output.samefile(source):
        raise ValueError(f"'{output}' is the input; name another output")
    if output.exists() and not args.overwrite:
        raise ValueError(f"'{output}' exists; name another output or pass --overwrite")
    check_folder(output)
    return output


def check_folder(output: Path) -> None:
    """ValueError where `output` has no folder to be in, PermissionError where nothing can be written there: before any work."""
    folder = output.absolute() if output.is_dir() else output.absolute().parent
    if not folder.is_dir():
        raise ValueError(f"cannot write '{output}': there is no folder '{folder}'")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise PermissionError(f"cannot write '{output}': no permission to write into '{folder}'")


@contextmanager
def progress_bar(args: argparse.Namespace) -> Iterator[Progress]:
    """A bar on stderr with frames, speed and time left, where stderr is a terminal or `--progress` asks."""
    from tqdm import tqdm

    with tqdm(unit=" frames", file=sys.stderr, disable=not (args.progress or sys.stderr.isatty())) as bar:

        def report(done: int, total: int | None) -> None:
            bar.total = total
            bar.update(done - bar.n)

        yield report

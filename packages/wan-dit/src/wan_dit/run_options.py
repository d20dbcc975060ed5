"""Options that the commands which run a model share: parts, how it is run, over how many processes. Imports no torch."""

from __future__ import annotations

import argparse
import re
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

from .lora import parse_lora

if TYPE_CHECKING:
    from .setup import BackboneSetup

MODEL = "wan-dit:tiny"
PARTS = {
    "vae": "VAE", "text_encoder": "text encoder", "backbone": "backbone", "low_noise_backbone": "second expert",
    "image_encoder": "image encoder", "scheduler": "scheduler",
}  # fmt: skip


def add_size_options(group: Any) -> None:
    group.add_argument("--frames", metavar="N", type=int, help="number of frames")
    group.add_argument("--size", metavar="WxH", help="width and height in pixels, such as 64x64; with an image, by default in its shape")


def add_parts(parser: argparse.ArgumentParser, instead_of: str, *, dtype: str, device: str) -> None:
    """Options that put other parts in place of a model's."""
    parts = parser.add_argument_group("parts", f"In place of {instead_of}: a name from wan-dit plugins, a path, a Hub id or module:attr.")
    for part, label in PARTS.items():
        parts.add_argument(f"--{part.replace('_', '-')}", metavar="PART", help=f"another {label}")
    parts.add_argument("--context", metavar="DIR", help="a folder that wan-text encode wrote, in place of a text encoder")
    parts.add_argument("--dtype", choices=("fp32", "bf16", "fp16"), help=f"type of the weights (default: {dtype})")
    parts.add_argument("--device", metavar="NAME", help=f"cpu, cuda, cuda:1, mps (default: {device})")


def add_run(parser: argparse.ArgumentParser) -> None:
    """Options of how the backbone is run."""
    how = parser.add_argument_group("running")
    how.add_argument("--lora", metavar="FILE[:STRENGTH[:high|low]]", action="append", default=[], help="put a LoRA on; may be repeated")
    how.add_argument("--lora-unmatched", choices=("strict", "warn"), default="strict", help="LoRA keys without a place (default: strict)")
    how.add_argument("--context-embedder", metavar="FILE", help="makes the backbone read another text encoder")
    how.add_argument(
        "--precision", choices=("strict", "official", "diffusers", "fast"), help="of residuals and norms in 16 bits (default: official)"
    )
    how.add_argument("--offload", choices=("none", "model", "blocks", "stream"), default="none",
                     help="keep in memory: all; a part at a time; two blocks; two blocks, read from their file")  # fmt: skip
    how.add_argument("--quantise", choices=("int8", "fp8"), help="linear layers of the blocks in 8 bits")
    how.add_argument("--attention", metavar="NAME", help="of wan-dit plugins (default: sdpa)")
    how.add_argument("--cache", metavar="NAME[:KEY=VALUE,...]", help="skip work that changes little, at some loss; of wan-dit plugins")
    how.add_argument("--cache-error", action="store_true", help="run once more without the cache, and tell how far the video is off")
    how.add_argument("--compile", action="store_true", help="compile a block before the first step")
    how.add_argument("--compat", choices=("fixed", "official"), default="fixed", help="what to do where the official code has defects")
    many = parser.add_argument_group("processes", "Under torchrun --nproc-per-node N -m wan_dit ...")
    many.add_argument("--ulysses", metavar="N", type=int, default=1, help="split the attention heads over N processes")
    many.add_argument("--ring", metavar="N", type=int, default=1, help="split the tokens over N processes")
    many.add_argument("--cfg-parallel", action="store_true", help="prompt and negative prompt in two processes")
    many.add_argument("--fsdp", action="store_true", help="split the weights over all processes")


def build_setup(args: argparse.Namespace, stack: ExitStack) -> BackboneSetup:
    """The setup that the options of `add_run` ask for; processes are joined for the time of the stack."""
    from .setup import BackboneSetup

    mesh = None
    if args.ulysses > 1 or args.ring > 1 or args.cfg_parallel or args.fsdp:
        from .parallel import init_parallel

        kind = args.device.partition(":")[0] if args.device else None
        mesh = stack.enter_context(init_parallel(ulysses=args.ulysses, ring=args.ring, cfg_parallel=args.cfg_parallel, device=kind))
    return BackboneSetup(
        precision=args.precision, loras=[parse_lora(text) for text in args.lora], on_unmatched=args.lora_unmatched,
        attention=args.attention, offload=args.offload, quantise=args.quantise, context_embedder=args.context_embedder,
        compile=args.compile, mesh=mesh, fsdp=args.fsdp,
    )  # fmt: skip


def parse_size(text: str | None) -> tuple[int, int] | None:
    """(width, height) of `WxH`."""
    if text is None:
        return None
    if not (match := re.fullmatch(r"(\d+)[xX×](\d+)", text)):
        raise ValueError(f"size '{text}' is not WIDTHxHEIGHT, such as 64x64")
    return int(match[1]), int(match[2])


def parse_guidance(text: str | None) -> float | tuple[float, float] | None:
    """A number, or `LOW,HIGH`."""
    if text is None:
        return None
    try:
        low, comma, high = text.partition(",")
        return (float(low), float(high)) if comma else float(low)
    except ValueError as error:
        raise ValueError(f"guidance '{text}' is not a number such as 5, or LOW,HIGH such as 3,4") from error

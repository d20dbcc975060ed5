"""The command `wan-dit plan`. Help imports no torch."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

from ._shared.amounts import amount
from .run_options import MODEL


def add_commands(commands: Any, command: Callable[..., argparse.ArgumentParser]) -> None:
    """Add `plan` to the subparsers of `wan-dit`; `command(commands, name, function, text, listing=)` makes one."""
    parser = command(commands, "plan", _plan, "the memory and the time that a run will take, before anything is loaded", listing=True)
    parser.add_argument("--model", metavar="NAME", default=MODEL, help="see wan-dit models, or a model on disk (default: tiny)")
    parser.add_argument("--backbone", metavar="PATH", help="plan with this backbone in place of the model's")
    parser.add_argument("--size", metavar="WxH", help="width and height in pixels (default: the model's)")
    parser.add_argument("--frames", metavar="N", type=int, help="number of frames (default: the model's)")
    parser.add_argument("--steps", metavar="N", type=int, help="denoising steps (default: the model's)")
    parser.add_argument("--guidance", metavar="X", help="1 is one forward a step, anything else two (default: the model's)")
    parser.add_argument("--dtype", choices=("fp32", "bf16", "fp16"), help="type of the weights (default: fp32 on a CPU, else bf16)")
    parser.add_argument("--device", metavar="NAME", help="cpu, cuda, cuda:1, mps (default: the best there is)")
    parser.add_argument("--offload", choices=("none", "model", "blocks", "stream"), default="none", help="as wan-dit generate --offload")
    parser.add_argument("--quantise", choices=("int8", "fp8"), help="linear layers of the blocks in 8 bits")
    parser.add_argument("--memory", type=amount, help="what there is, such as 24GB (default: what is free on the device)")
    parser.add_argument("--tflops", type=float, metavar="X", help="10^12 operations a second (default: measured, in about a second)")


def _plan(args: argparse.Namespace) -> None:
    from .planning import tell_plan

    tell_plan(args)

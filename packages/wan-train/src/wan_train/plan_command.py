"""The command `wan-train plan`. Help imports no torch."""

from __future__ import annotations

import argparse
from typing import Any

from wan_dit._shared.amounts import amount
from wan_dit._shared.cli import add_common

TEXT = "Predict memory, operations, communication and time of a training run, check its layout or choose one, and tell what to change."


def add_plan(commands: Any) -> None:
    """Add `plan` to the subparsers of `wan-train`."""
    parser = commands.add_parser("plan", help="memory, time and layout of a run, before it is started", description=TEXT)
    parser.add_argument(
        "--config", nargs="+", metavar=("RECIPE", "key=value"),
        help="a .toml file or the name of a recipe in the package, and fields of it to change; options replace what it says",
    )  # fmt: skip
    parser.add_argument("--model", default="wan2.1-t2v-1.3b", help="see wan-dit models, or a backbone on disk (default: wan2.1-t2v-1.3b)")
    _add_job(parser.add_argument_group("what is trained"))
    _add_layout(parser.add_argument_group("layout", "What is not given is chosen: the fastest that fits."))
    _add_memory(parser.add_argument_group("activations"))
    _add_gpu(parser.add_argument_group("GPUs"))
    add_common(parser, listing=True)
    parser.set_defaults(do=_plan)


def _add_job(group: Any) -> None:
    group.add_argument("--size", metavar="WxH", help="width and height in pixels (default: the model's)")
    group.add_argument("--frames", metavar="N", type=int, help="frames of a clip, 1 for images (default: the model's)")
    group.add_argument("--micro-batch", metavar="N", type=int, help="samples at a time (default: 1)")
    group.add_argument("--accumulate", metavar="N", type=int, help="turns of a step (default: 1)")
    group.add_argument(
        "--precision",
        choices=("fp32", "bf16", "autocast"),
        help="bf16: weights gathered so; autocast: over fp32 weights (default: bf16)",
    )
    group.add_argument("--optimiser", choices=("adamw", "adamw8bit", "muon"), help="default: adamw")
    group.add_argument("--ema", action="store_true", help="keep averaged weights")
    group.add_argument("--lora", metavar="RANK", type=int, help="train adapters on the linear layers of the blocks")
    group.add_argument("--base", choices=("fp32", "bf16", "fp8", "int8"), help="type of the frozen weights under a LoRA (default: bf16)")
    group.add_argument("--block-swap", metavar="N", type=int, help="frozen blocks that wait in the host's memory")


def _add_layout(group: Any) -> None:
    group.add_argument("--gpus", metavar="N", type=int, help="default: as many as the degrees need")
    group.add_argument("--ulysses", metavar="N", type=int, help="GPUs that split the heads of a sample")
    group.add_argument("--ring", metavar="N", type=int, help="groups of these that split its tokens")
    group.add_argument("--fsdp", metavar="N", type=int, help="GPUs that split the weights; contains those that share a sample")
    group.add_argument("--dp", metavar="N", type=int, help="copies of the weights: GPUs = DP x FSDP")
    group.add_argument("--verify", action="store_true", help="build the layout on a fake process group and compare")


def _add_memory(group: Any) -> None:
    group.add_argument("--checkpointing", metavar="none|full|N|auto", help="blocks to compute again (default: auto, what memory asks for)")
    group.add_argument(
        "--offload-activations", nargs="?", const="all", metavar="N|all|none|auto",
        help="blocks whose activations wait in the host's memory (default: auto with --checkpointing auto, else none)",
    )  # fmt: skip
    group.add_argument(
        "--gamma", metavar="X|measure", help="bytes a token and channel that a block keeps (default: as counted, 73 of 14B in bf16)"
    )


def _add_gpu(group: Any) -> None:
    group.add_argument("--gpu", default="h100", help="h100, h200, b200, a100, a100-40gb, l40s, rtx4090, rtx5090 (default: h100)")
    group.add_argument("--memory", type=amount, help="of each, such as 24GB")
    group.add_argument("--host-memory", type=amount, help="of a machine, such as 2TB")
    group.add_argument("--per-machine", metavar="N", type=int, help="GPUs in a machine (default: 8)")
    group.add_argument("--tflops", metavar="X[,Y]", help="10^12 operations a second, products and attention (default: 40%% of the peak)")
    group.add_argument("--calibrate", action="store_true", help="measure these on the device here")
    group.add_argument("--bandwidth", metavar="X,Y,Z", help="GB/s between GPUs of a machine, between machines, to the host's memory")


def _plan(args: argparse.Namespace) -> None:
    from .planning.options import tell_plan

    tell_plan(args)

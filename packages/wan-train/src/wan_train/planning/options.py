"""The plan that the options of `wan-train plan` ask for."""

from __future__ import annotations

import argparse
import json
from dataclasses import replace

from wan_dit.run_options import parse_size
from wan_dit.run_plan import Rates

from .choose import choose
from .degrees import Degrees
from .gpus import Gpu, gpu_named
from .job import Bucket, Job
from .plan import Plan
from .policy import Wanted
from .recipe import Asked, architecture, default_size, degrees, read
from .report import record, tell
from .timing import default_rates


def tell_plan(args: argparse.Namespace) -> None:
    """Print the plan."""
    asked = _recipe(args) if args.config else _model(args)
    gpu = _gpu(args)
    rates = _rates(args, gpu, asked.job)
    gamma = _gamma(args.gamma, asked.job)
    plan = _planned(asked, gpu, rates, gamma)
    chosen = None in (asked.ulysses, asked.ring, asked.fsdp) and asked.gpus > 1
    found, verified = record(plan), None  # all of it before the first line
    if args.verify:
        from .verify import verify

        verified = verify(plan)
    if args.json:
        print(json.dumps({"name": asked.name, "chosen": chosen, **found, "verified": verified}, indent=2))
    else:
        tell(plan, asked.name, chosen, verified)


def _planned(asked: Asked, gpu: Gpu, rates: Rates, gamma: float | None) -> Plan:
    """With a layout chosen where it is not given."""
    if None not in (asked.ulysses, asked.ring, asked.fsdp):
        return Plan(asked.job, degrees(asked, gpu.per_machine), gpu, rates, asked.wanted, gamma)
    start = Plan(asked.job, Degrees(asked.gpus, 1, 1, 1, gpu.per_machine), gpu, rates, asked.wanted, gamma)
    return choose(start, asked.ulysses, asked.ring, asked.fsdp)


def _model(args: argparse.Namespace) -> Asked:
    config = architecture(args.model)
    size, frames = default_size(args.model)
    bucket = Bucket(parse_size(args.size) or size, frames if args.frames is None else args.frames)
    job = Job(config, (bucket,)).changed(**_given(args))
    return _placed(args, Asked(args.model, job, 1, None, None, None, _wanted(args, job.blocks)))


def _recipe(args: argparse.Namespace) -> Asked:
    """A recipe, with what is given besides in place of what it says."""
    from ..config import TrainConfig

    recipe, *overrides = args.config
    asked = read(TrainConfig.from_toml(recipe, overrides), _gpus(args), parse_size(args.size), args.frames)
    job = asked.job.changed(**_given(args))
    wanted = asked.wanted if args.checkpointing is None and args.offload_activations is None else _wanted(args, job.blocks)
    return _placed(args, replace(asked, job=job, wanted=wanted))


def _given(args: argparse.Namespace) -> dict[str, object]:
    """Fields of a job, of the options that are there."""
    given = {
        "micro_batch": args.micro_batch, "accumulate": args.accumulate, "precision": args.precision, "optimiser": args.optimiser,
        "ema": args.ema or None, "lora": args.lora, "base": args.base, "swapped": args.block_swap,
    }  # fmt: skip
    return {name: value for name, value in given.items() if value is not None}


def _gpus(args: argparse.Namespace) -> int | None:
    """Those given, or copies of the weights times shards."""
    return args.gpus or (args.dp * args.fsdp if args.dp and args.fsdp else None)


def _placed(args: argparse.Namespace, asked: Asked) -> Asked:
    """The degrees given in place of those asked for. ValueError where --dp is not what they come to."""
    gpus = _gpus(args) or max(asked.gpus, (args.ulysses or 1) * (args.ring or 1), args.fsdp or 1)
    fsdp = args.fsdp or (gpus // args.dp if args.dp and gpus % args.dp == 0 else asked.fsdp)
    if args.dp and gpus != args.dp * (fsdp or 1):
        raise ValueError(
            f"{gpus} GPUs are not DP {args.dp} x FSDP {fsdp or 1}: FSDP contains the GPUs that share a sample, so GPUs = DP x FSDP; "
            f"use --dp {gpus // (fsdp or 1)} or --gpus {args.dp * (fsdp or 1)}"
        )
    one = 1 if gpus == 1 else None
    return replace(
        asked, gpus=gpus, ulysses=args.ulysses or asked.ulysses or one, ring=args.ring or asked.ring or one, fsdp=fsdp or one,
    )  # fmt: skip


def _wanted(args: argparse.Namespace, blocks: int) -> Wanted:
    """none and full are of all blocks, a number of so many, auto for the solver; offload follows checkpointing where it is not given."""
    words = {None: None, "auto": None, "none": 0, "full": blocks}
    again = words[args.checkpointing] if args.checkpointing in words else _number(args.checkpointing, "checkpointing", "auto, none, full")
    if args.offload_activations is None:
        return Wanted(again, None if again is None else 0)
    words = {"auto": None, "none": 0, "all": blocks - (again or 0)}
    given = args.offload_activations
    return Wanted(again, words[given] if given in words else _number(given, "offload-activations", "auto, none, all"))


def _number(text: str, name: str, words: str) -> int:
    if not text.isdecimal():
        raise ValueError(f"{name} '{text}' is not one of {words} or a number of blocks")
    return int(text)


def _gpu(args: argparse.Namespace) -> Gpu:
    """The GPU named, with what is given in place of its data sheet."""
    gpu = gpu_named(args.gpu)
    if args.bandwidth:
        values = args.bandwidth.split(",")
        try:
            inside, between, pcie = (1e9 * float(value) for value in values)
        except ValueError:
            inside = between = pcie = 0.0
        if min(inside, between, pcie) <= 0:
            raise ValueError(f"bandwidth '{args.bandwidth}' is not INSIDE,BETWEEN,PCIE in GB/s, such as 400,50,25")
        gpu = replace(gpu, inside=inside, between=between, pcie=pcie)
    per_machine = args.per_machine or gpu.per_machine
    if per_machine < 1:
        raise ValueError(f"per-machine is {per_machine}, expected a number of GPUs")
    host = args.host_memory // per_machine if args.host_memory else gpu.host
    return replace(gpu, memory=args.memory or gpu.memory, per_machine=per_machine, host=host)


def _rates(args: argparse.Namespace, gpu: Gpu, job: Job) -> Rates:
    """Given, measured here, or a share of the data sheet's peak."""
    if args.calibrate:
        import torch
        from wan_dit._shared.weights import best_device, usable_device
        from wan_dit.rates import measure

        dtype = torch.float32 if job.precision == "fp32" else torch.bfloat16
        return measure(usable_device(best_device()), dtype, job.config.head_dim)
    if args.tflops is None:
        return default_rates(gpu, job.precision)
    try:
        products, _, attention = args.tflops.partition(",")
        rates = Rates(1e12 * float(products), 1e12 * float(attention or products))
    except ValueError:
        rates = Rates(0, 0)
    if min(rates.products, rates.attention) <= 0:
        raise ValueError(f"tflops '{args.tflops}' is not a number, or PRODUCTS,ATTENTION, in 10^12 operations a second")
    return rates


def _gamma(text: str | None, job: Job) -> float | None:
    """A number, or measured on a block that has no numbers."""
    if text is None:
        return None
    if text == "measure":
        from .measured import gamma

        return gamma(job.config, job.precision)
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if value <= 0:
        raise ValueError(f"gamma '{text}' is not 'measure' or bytes a token and channel, such as 67")
    return value

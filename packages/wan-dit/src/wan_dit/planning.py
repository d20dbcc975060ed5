"""What `wan-dit plan` tells: the model is found, its parts are asked, and the device is timed."""

from __future__ import annotations

import argparse
import json
import re
from pkgutil import resolve_name
from typing import Any

from ._shared.amounts import in_words
from ._shared.cli import show
from .config import TINY, DiTConfig
from .plan import parameters, tokens
from .plugins import PART_KINDS, WAN_DIT, BackboneSpec, PluginManager, VideoModelSpec, find, plugin_manager
from .recognition import ARCHITECTURES
from .run_options import parse_guidance, parse_size
from .run_plan import OFFLOADS, Demand, Rates, RunPlan

TYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
PARTS = {"text_encoder": "wan_text_encoders", "image_encoder": "wan_image_encoders", "vae": "wan_vaes"}


def tell_plan(args: argparse.Namespace) -> None:
    """Print the plan that the arguments of the command ask for."""
    pm, size = plugin_manager(), parse_size(args.size)
    model, backbones, specs = _model(args, pm)
    device = args.device or _best_device()
    if not re.fullmatch(r"cpu|mps|cuda(:\d+)?", device):
        raise ValueError(f"there is no device '{device}', expected cpu, cuda, cuda:1 or mps")
    dtype = args.dtype or ("fp32" if device == "cpu" else "bf16")
    size, frames, guidance = size or model.size, model.frames if args.frames is None else args.frames, parse_guidance(args.guidance)
    for name, value in (("steps", args.steps), ("tflops", args.tflops)):
        if value is not None and not value > 0:
            raise ValueError(f"{name} is {value:g}, expected a positive number")
    count = tokens(backbones[0], size, frames)
    others = {part: _demand(spec, size, frames, dtype, device) for part, spec in specs.items()}
    run = RunPlan(
        backbones, {part: demand for part, demand in others.items() if demand}, count, dtype,
        guided=(model.guidance if guidance is None else guidance) not in (1, (1, 1)), on_cpu=device == "cpu",
        offload=args.offload, quantise=args.quantise,
    )  # fmt: skip
    free = args.memory or _free(device)
    facts = {
        "model": model.name, "size": list(size), "frames": frames, "device": device, "dtype": dtype, "tokens": count,
        "parameters": run.parameters, "unknown": sorted(part for part, demand in others.items() if demand is None),
    }  # fmt: skip
    timed = _timed(run, args.steps or model.steps, _rates(args.tflops, device, dtype, backbones[0]))
    if args.json:
        print(
            json.dumps({**facts, **timed, **_record(run, free), "choices": [_record(choice, free) for choice in run.choices()]}, indent=2)
        )
    else:
        _tell(run, facts, timed, free)


def _model(args: argparse.Namespace, pm: PluginManager) -> tuple[VideoModelSpec, tuple[DiTConfig, ...], dict[str, Any]]:
    """The model, the configurations of its backbones, and the specs of its other parts; weights are neither read nor fetched."""
    from .find_model import find_model

    found = find_model(args.model, None, pm)
    model, parts = found.model, {**found.parts, **({"backbone": args.backbone} if args.backbone else {})}
    names = ["backbone", *(["low_noise_backbone"] if model.low_noise_backbone else [])]
    refs = {part: parts.get(part) or getattr(model, part) for part in (*names, *PARTS)}
    backbones = tuple(_config(find(PART_KINDS["backbone"], refs[part], pm), model) for part in names)
    specs: dict[str, Any] = {}
    for part, kind in PARTS.items():
        try:
            specs |= {part: find(kind, refs[part], pm)} if refs[part] else {}
        except LookupError:
            specs[part] = None  # not installed: it is said to be unknown
    return model, backbones, specs


def _config(spec: BackboneSpec, model: VideoModelSpec) -> DiTConfig:
    """ValueError for a backbone that is not of this package."""
    if spec.target != WAN_DIT or spec.weights is None:
        raise ValueError(f"'{spec.name}' is no Wan transformer with weights: what it takes cannot be predicted")
    if spec.weights.startswith("pkg:") and spec.name == "tiny":
        return TINY
    if spec.weights.startswith("hub:") and model.name in ARCHITECTURES:
        return ARCHITECTURES[model.name]
    from ._shared.weights import locate
    from .checkpoint import CONFIG_FILES, config_of, weights_folder

    return config_of(weights_folder(locate(spec.weights, CONFIG_FILES)), None)


def _demand(spec: Any, size: tuple[int, int], frames: int, dtype: str, device: str) -> Demand | None:
    """What a part says that it takes; None where it does not."""
    if not getattr(spec, "footprint", None):
        return None
    return Demand(**resolve_name(spec.footprint)(spec, size=size, frames=frames, dtype=TYPES[dtype], device=device))


def _rates(tflops: float | None, device: str, dtype: str, config: DiTConfig) -> Rates:
    if tflops is not None:
        return Rates(1e12 * tflops, 1e12 * tflops)
    import torch

    from ._shared.weights import usable_device
    from .rates import measure

    return measure(usable_device(device), getattr(torch, TYPES[dtype]), config.head_dim)


def _timed(run: RunPlan, steps: int, rates: Rates) -> dict[str, Any]:
    """Seconds where nothing but products and attention takes time, and weights are at hand."""
    found = run.operations()
    step = found.products / rates.products + found.attention / rates.attention
    return {
        "steps": steps, "operations_per_step": found.products + found.attention, "operations_of_context": found.context,
        "products_per_second": rates.products, "attention_per_second": rates.attention,
        "seconds_per_step": step, "seconds": steps * step + found.context / rates.products,
    }  # fmt: skip


def _record(run: RunPlan, free: int) -> dict[str, Any]:
    return {
        "offload": run.offload, "quantise": run.quantise,
        "memory": run.memory, "free": free or None, "fits": not free or run.memory <= free,
        "host": run.backbone_weights().host * len(run.backbones), "brought_per_step": run.brought,
        "phases": [{**vars(phase), "memory": phase.memory} for phase in run.phases()],
    }  # fmt: skip


def _tell(run: RunPlan, facts: dict[str, Any], timed: dict[str, Any], free: int) -> None:
    size, config = "x".join(map(str, facts["size"])), run.backbones[0]
    experts = f" in each of {len(run.backbones)} experts" if len(run.backbones) > 1 else ""
    print(f"{facts['model']}: {size}, {facts['frames']} frames: {run.count:,} tokens; {parameters(config).total:,} parameters{experts}")
    print(f"{facts['dtype']} on {facts['device']}, offload {run.offload}, quantise {run.quantise or 'none'}\n")
    columns = ("weights", "context", "work", "memory")
    show([{"phase": phase.name, **{name: in_words(getattr(phase, name)) for name in columns}} for phase in run.phases()], as_json=False)
    if facts["unknown"]:
        print(f"not counted, as it does not say: {', '.join(part.replace('_', ' ') for part in facts['unknown'])}")
    room = f" of {in_words(free)} that are free: {'fits' if run.memory <= free else 'does not fit'}" if free else ""
    print(f"\nthe most at a time: {in_words(run.memory)}{room}")
    if host := run.backbone_weights().host:
        print(f"weights that wait in the host's memory: {in_words(host)}")
    if run.brought:
        print(f"weights brought to the device in a step: {in_words(run.brought)}")
    rates = f"{_tera(timed['products_per_second'])} TFLOP/s in products and {_tera(timed['attention_per_second'])} in attention"
    print(f"a step: {_tera(timed['operations_per_step'])} TFLOP, {_number(timed['seconds_per_step'])} s at {rates}")
    print(f"{timed['steps']} steps and the context: {_number(timed['seconds'])} s, where nothing else takes time\n")
    rows = []
    for offload in OFFLOADS:
        choices = [choice for choice in run.choices() if choice.offload == offload]
        cells = {f"quantise {choice.quantise or 'none'}": in_words(choice.memory) + _mark(choice.memory, free) for choice in choices}
        rows.append({"memory with offload": offload, **cells})
    show(rows, as_json=False)


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _tera(value: float) -> str:
    return _number(value / 1e12)


def _mark(size: int, free: int) -> str:
    return " (too much)" if free and size > free else ""


def _best_device() -> str:
    from ._shared.weights import best_device

    return best_device()


def _free(device: str) -> int:
    """Bytes free on a device, 0 where the system does not tell."""
    if device.startswith("cuda"):
        import torch

        from ._shared.weights import usable_device

        return torch.cuda.mem_get_info(usable_device(device))[0]
    from ._shared.memory import free_memory

    return free_memory()

"""What a recipe says about its memory and work. `read` is the one place that knows the fields of a recipe."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from wan_dit.config import TINY, DiTConfig
from wan_dit.plan import tokens
from wan_dit.plugins import find, plugin_manager
from wan_dit.recognition import ARCHITECTURES

from ..config import StageConfig, TrainConfig
from .degrees import Degrees
from .job import Bucket, Job
from .policy import Wanted

WITHOUT = ("vae",)  # objectives of this package that train no transformer
RANK = 16  # of a LoRA where a recipe does not say
SHAPES, FRAMES = (64, 64), {"shapes": 17}  # what data sets have where a recipe does not say: (height, width), and frames, else 81


@dataclass(frozen=True)
class Asked:
    """A job and where it runs. degrees: what is said of the layout, None for what a plan may choose."""

    name: str
    job: Job
    gpus: int
    ulysses: int | None
    ring: int | None
    fsdp: int | None
    wanted: Wanted


def read(config: TrainConfig, gpus: int | None, size: tuple[int, int] | None = None, frames: int | None = None) -> Asked:
    """A recipe of a transformer on `gpus` processes, the fewest its degrees allow where that is None.

    ADAPTER: everything that the plan takes from a recipe is read here, so that new sections of the recipe are added here alone.
    size, frames: in place of those of its data
    ValueError for an objective without a transformer, or where there is no size.
    """
    settings = config.objective.settings
    if config.objective.name in WITHOUT:
        raise ValueError(f"plans are of transformers, and the objective of '{config.name}' is '{config.objective.name}'")
    model = architecture(str(settings.get("backbone", "tiny")), settings.get("architecture", {}))
    parallel, context = config.parallel, config.parallel.ulysses * config.parallel.ring
    least = max(context, parallel.fsdp)
    gpus = gpus or least
    ranks = max(1, gpus // context)
    clips, heaviest = bucket(config, size, frames), _heaviest(config)
    share = -(-((heaviest.batch_size if heaviest else 0) or config.batch_size) // ranks)
    budget = max(1, heaviest.tokens // tokens(model, clips.size, clips.frames)) if heaviest else share
    micro = min(config.micro_batch or share, share, budget)
    job = Job(
        model, (clips,), micro_batch=micro, accumulate=-(-share // micro),
        precision="autocast" if config.precision == "bf16" else "fp32", optimiser=config.optimiser.name, ema=config.ema > 0,
        held_gradients=True, lora=int(settings.get("lora", {}).get("rank", RANK)) if settings.get("train") == "lora" else 0,
    )  # fmt: skip
    policy = config.memory.policy
    choices = [policy] * job.blocks if isinstance(policy, str) else list(policy)
    return Asked(
        config.name, job, gpus, parallel.ulysses, parallel.ring, parallel.fsdp,
        Wanted(choices.count("recompute"), choices.count("offload")),
    )  # fmt: skip


def bucket(config: TrainConfig, size: tuple[int, int] | None, frames: int | None) -> Bucket:
    """Size, (width, height), and frames of the clips; where they are not given those of the heaviest stage, or of the recipe's data.

    Sizes in a recipe are (height, width).
    """
    data = config.data
    if (stage := _heaviest(config)) is not None:
        return Bucket(size or stage.video[::-1], frames or max(stage.frames))
    if size is None:
        found = data.settings.get("size") or (SHAPES if data.name == "shapes" else None)
        if found is None:
            raise ValueError(f"the data of '{config.name}' have no size of their own: say for which to plan with --size WxH")
        size = int(found[1]), int(found[0])
    return Bucket(size, int(data.settings.get("frames", FRAMES.get(data.name, 81))) if frames is None else frames)


def _heaviest(config: TrainConfig) -> StageConfig | None:
    """The stage with the largest clips: the memory of a run is that of it."""
    return max(config.stages, key=lambda stage: stage.video[0] * stage.video[1] * max(stage.frames), default=None)


def architecture(name: str, changes: dict[str, Any] | None = None) -> DiTConfig:
    """The configuration of a model or backbone by name, or of a checkpoint on disk, with fields changed; reads no weights.

    LookupError that lists the names known.
    """
    short = name.rpartition(":")[2] if not name.startswith(("hub:", "pkg:")) else name
    known = {**ARCHITECTURES, "tiny": TINY}
    if short in known:
        config = known[short]
    else:
        spec = find("wan_backbones", name, plugin_manager())  # a path, or a backbone of another package
        from wan_dit._shared.weights import locate
        from wan_dit.checkpoint import CONFIG_FILES, config_of, weights_folder

        if not getattr(spec, "weights", None):
            raise ValueError(f"'{name}' has no weights of a Wan transformer: what it takes cannot be predicted")
        config = config_of(weights_folder(locate(spec.weights, CONFIG_FILES)), None)
    return DiTConfig(**{**config.model_dump(), **changes}) if changes else config


def default_size(name: str) -> tuple[tuple[int, int], int]:
    """Size (width, height) and frames that a model is generated at, and so trained at last."""
    try:
        model = find("wan_models", name, plugin_manager())
    except LookupError:
        return (832, 480), 81
    return model.size, model.frames


def degrees(asked: Asked, per_machine: int) -> Degrees:
    """The layout as far as it is said, ones for the rest."""
    return Degrees(asked.gpus, asked.ulysses or 1, asked.ring or 1, asked.fsdp or 1, per_machine)

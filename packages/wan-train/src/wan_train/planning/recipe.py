"""What a recipe says about its memory and work. `read` is the one place that knows the fields of a recipe."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

from wan_dit.config import DiTConfig
from wan_dit.plan import tokens
from wan_dit.plugins import find, plugin_manager
from wan_dit.recognition import ARCHITECTURES

from ..config import StageConfig, TrainConfig
from ..published import backbones
from .degrees import Degrees
from .job import Bucket, Job, Precision
from .memory import Policy, memory
from .policy import Wanted

WITHOUT = ("vae",)  # objectives of this package that train no transformer
RANK, FACTOR = 16, 8  # of a LoRA and a LoKr where a recipe does not say
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
    A recipe with stages is read as the part of them, clips or pictures, that takes the most memory in the recipe's layout.
    ValueError for an objective without a transformer, or where there is no size.
    """
    settings = config.objective.settings
    if config.objective.name in WITHOUT:
        raise ValueError(f"plans are of transformers, and the objective of '{config.name}' is '{config.objective.name}'")
    model = architecture(str(settings.get("backbone", "tiny")), settings.get("architecture", {}))
    parallel = config.parallel
    gpus = gpus or max(parallel.ulysses * parallel.ring, parallel.fsdp)
    laid = Degrees(gpus, parallel.ulysses, parallel.ring, parallel.fsdp)
    job_of = partial(
        Job, model, precision=_precision(config), optimiser=config.optimiser.name, ema=config.ema > 0, held_gradients=True,
        lora=_rank(settings), base=settings.get("base", "fp32"), swapped=settings.get("swap", 0),
    )  # fmt: skip
    jobs = []
    for stage, clips in _clips(config, size, frames):
        micro, turns = _turns(config, stage, tokens(model, clips.size, clips.frames), max(1, laid.data_ranks))
        jobs.append(job_of((clips,), micro_batch=micro, accumulate=turns))
    policy = config.memory.policy
    choices: Policy = (policy,) * jobs[0].blocks if isinstance(policy, str) else policy
    return Asked(
        config.name, max(jobs, key=lambda job: memory(job, laid, choices).total), gpus, parallel.ulysses, parallel.ring, parallel.fsdp,
        Wanted(choices.count("recompute"), choices.count("offload")),
    )  # fmt: skip


def _precision(config: TrainConfig) -> Precision:
    """A frozen base in bf16 or in 8 bits is computed with in bf16, as are weights of which all are trained where FSDP gathers them.

    `fp8` is planned as bf16 autocast. It makes no copies of the blocks' weights in bf16, which are counted, but operands in 8 bits and, for
    their casts, fp32, which are not: at the worst about 11 bytes a token and channel of the feed-forward layer, on a CPU. Time is bf16's.
    """
    settings = config.objective.settings
    if settings.get("base", "fp32") != "fp32" or (config.precision == "bf16" and settings.get("train", "all") == "all"):
        return "bf16"
    return "fp32" if config.precision == "fp32" else "autocast"


def _rank(settings: dict[str, Any]) -> int:
    """Of the LoRA, or of the one that has as many numbers as the LoKr; 0 where all weights are trained."""
    if settings.get("train") != "lora":
        return 0
    lora = settings.get("lora", {})
    rank = int(lora.get("rank", RANK))
    return max(1, round(rank / lora.get("factor", FACTOR))) if lora.get("kind") == "lokr" else rank


def _clips(config: TrainConfig, size: tuple[int, int] | None, frames: int | None) -> list[tuple[StageConfig | None, Bucket]]:
    """What is trained on: the clips of each stage, and pictures where it speaks of them; without stages those of the recipe's data.

    Sizes in a recipe are (height, width).
    """
    if not config.stages:
        return [(None, _bucket(config, size, frames))]
    found: list[tuple[StageConfig | None, Bucket]] = []
    for stage in config.stages:
        if films := stage.weights.get("video") != 0:
            found.append((stage, Bucket(size or stage.video[::-1], frames or max(stage.frames))))
        if stage.image or stage.weights.get("image") or not films:
            found.append((stage, Bucket(size or (stage.image or stage.video)[::-1], frames or 1)))
    return found


def _turns(config: TrainConfig, stage: StageConfig | None, count: int, ranks: int) -> tuple[int, int]:
    """Samples, of `count` tokens each, that a data rank computes at a time, and such turns of a step."""
    held, share = config.batch_size, -(-config.batch_size // ranks)
    if stage is not None:
        squared = stage.squared // count**2 if stage.squared else stage.tokens
        held = max(1, min(stage.tokens // count, squared, stage.samples or stage.tokens))
        share = -(-stage.micro_batches // ranks) * held if stage.micro_batches else -(-(stage.batch_size or config.batch_size) // ranks)
    micro = min(config.micro_batch or share, share, held)
    return micro, -(-share // micro)


def _bucket(config: TrainConfig, size: tuple[int, int] | None, frames: int | None) -> Bucket:
    """Size and frames of the recipe's data, where they are not given."""
    data = config.data
    if size is None:
        found = data.settings.get("size") or (SHAPES if data.name == "shapes" else None)
        if found is None:
            raise ValueError(f"the data of '{config.name}' have no size of their own: say for which to plan with --size WxH")
        size = int(found[1]), int(found[0])
    return Bucket(size, int(data.settings.get("frames", FRAMES.get(data.name, 81))) if frames is None else frames)


def architecture(name: str, changes: dict[str, Any] | None = None) -> DiTConfig:
    """The configuration of a model or backbone by name, or of a checkpoint on disk, with fields changed; reads no weights.

    LookupError that lists the names known.
    """
    short = name.rpartition(":")[2] if not name.startswith(("hub:", "pkg:")) else name
    known = {**ARCHITECTURES, **backbones()}
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

"""From a prompt to a video: encode, denoise, decode. One pipeline for every model, made of parts that are found by name.

The pipeline owns shift, guidance, noise and the precision of the sample (float32); parts are read on first use.
"""

from __future__ import annotations

import os
import re
import time
import warnings
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor

from . import manifest
from ._shared.weights import usable_device
from .context_files import ContextFiles
from .events import Decoding, Done, Encoding, Event, Loading, Preparing, Step
from .find_model import find_model
from .parts import KINDS, Parts
from .plugins import PluginManager, VideoModelSpec, plugin_manager
from .request import Request, make_request, unknown_words
from .result import Result, Timings
from .sampling import Sampling
from .setup import BackboneSetup
from .state import RunState
from .tasks import TextToVideo
from .tasks.record import recorded
from .tasks.task import COMPATS, Compat, Encoders, Prepared, Target, Task

if TYPE_CHECKING:
    import numpy as np

    from .contracts import Schedule

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
ANOTHER_MATTER = re.compile(r"versions\.|device:|options\.processes\.|.*\.version:|.*\.weights:.* None\b")  # of two records
PHASES = ("load", "text", "denoise", "decode")


@dataclass(frozen=True)
class _Job:
    """One generation, checked: `cache` is a policy, `cache_name` how it was given."""

    request: Request
    task: Task
    schedule: Schedule
    cache: Any
    cache_name: str | None


class Pipeline:
    """A model ready to be prompted.

    Example: `Pipeline("tiny")("a red circle moves left", seed=1).save("circle.mp4")`.
    """

    def __init__(
        self,
        model: str | os.PathLike[str] | VideoModelSpec = "wan-dit:tiny",
        *,
        preset: str | None = None,
        context: str | os.PathLike[str] | None = None,
        dtype: torch.dtype | str | None = None,
        device: torch.device | str | None = None,
        compat: Compat = "fixed",
        pm: PluginManager | None = None,
        setup: BackboneSetup | None = None,
        **parts: Any,
    ) -> None:
        """Find the parts and check that they fit; no weights are read yet.

        model: the name of an installed model, or what is on disk: an official release, a diffusers pipeline, a ComfyUI tree, or
        a repository of one of these on the Hub
        preset: the installed model whose task and settings a model on disk is used with, where its shapes do not tell
        parts: `vae`, `text_encoder`, `backbone`, `low_noise_backbone`, `image_encoder`, `scheduler` in place of the model's own:
        a path, name, Hub id or import string, a spec, or a loaded object with a `spec`, used where and as it is; a diffusers
        scheduler is taken too
        context: a folder of encoded prompts, in place of a text encoder
        dtype: of all weights: `"fp32"`, `"bf16"`, `"fp16"` or torch's; None is fp32 on a CPU, the checkpoint's own on a GPU
        device: None is the CPU
        compat: `"official"` repeats the defects of the official code, see `Target`
        setup: LoRAs, attention, offload, processes; the default is none of them
        Raises LookupError for names that are not installed, ValueError for parts that do not fit together.
        """
        if unknown := parts.keys() - KINDS.keys():
            raise TypeError(f"Pipeline has no parameter {', '.join(sorted(unknown))}; parts are {', '.join(KINDS)}")
        if context is not None and parts.get("text_encoder") is not None:
            raise ValueError("give a text encoder or a context folder, not both")
        if compat not in COMPATS:
            raise ValueError(f"compat '{compat}' is not one of {', '.join(COMPATS)}")
        self.pm = pm or plugin_manager()
        given = {part: ref for part, ref in parts.items() if ref is not None}
        if context is not None:
            given["text_encoder"] = ContextFiles(context)
        found = find_model(model, preset, self.pm, given=given.keys())
        self.model, self.notes = found.model, found.notes
        self.context = None if context is None else str(context)
        self.device, self.dtype, self.compat = usable_device(device or "cpu"), _dtype(dtype), compat
        self.setup = setup or BackboneSetup()
        self.parts = Parts(self.model, {**found.parts, **given}, self.pm, dtype=self.dtype, device=self.device, setup=self.setup)
        self._contexts: dict[str, Tensor] = {}
        self._preview: Any = None

    @classmethod
    def from_pretrained(cls, model: str | os.PathLike[str] | VideoModelSpec = "wan-dit:tiny", **options: Any) -> Self:
        """`Pipeline(model, ...)` under the name that is usual for models."""
        return cls(model, **options)

    @property
    def specs(self) -> dict[str, Any]:
        """Part -> spec."""
        return self.parts.specs

    @property
    def _sees(self) -> bool:
        """Whether the backbone reads the tokens of an image encoder."""
        return getattr(self.specs["backbone"], "image_dim", None) is not None

    def __call__(self, prompt: str, *, on_event: Callable[[Event], None] | None = None, **settings: Any) -> Result:
        """Generate one video; `settings` are those of `stream`, and `on_event` is called with each of its events."""
        for event in self.stream(prompt, **settings):
            if on_event:
                on_event(event)
            if isinstance(event, Done):
                return event.result
        raise RuntimeError("the stream ended without a result")

    def stream(
        self,
        prompt: str,
        *,
        task: Task | None = None,
        negative_prompt: str | None = None,
        steps: int | None = None,
        shift: float | None = None,
        guidance: float | Sequence[float] | None = None,
        seed: int = 0,
        frames: int | None = None,
        size: tuple[int, int] | None = None,
        cache: Any = None,
        resume: RunState | None = None,
    ) -> Generator[Event, None, None]:
        """The events of one generation, `Done` with the result at the end. Settings that are None are the model's own; steps and shift
        those of the scheduler, where it is made for certain ones; frames and size those that the task's inputs suggest.

        task: what is given besides text (see `wan_dit.tasks`); None is text alone
        negative_prompt: may be empty; None is the model's own
        guidance: classifier-free guidance scale; 1 runs the backbone once a step and needs no negative prompt; a pair is for the
        low-noise and the high-noise expert
        seed: the noise is drawn on the CPU, so that a seed means the same on every device
        frames: 1 + k * temporal stride of the VAE; size: (width, height) in pixels
        cache: a cache that trades quality for speed (see `wan_dit.caching`), None for none
        resume: go on from there, to the same bits; all settings have to be those of its run
        Raises ValueError at once, with the nearest valid value, before anything is loaded. Streams of one pipeline may be
        interleaved; one that is closed stops.
        """
        task = task or TextToVideo()
        request = self.settings(
            prompt, task=task, negative_prompt=negative_prompt, steps=steps, shift=shift, guidance=guidance, seed=seed,
            frames=frames, size=size,
        )  # fmt: skip
        if hint := unknown_words(self.model, prompt):
            warnings.warn(hint, UserWarning, stacklevel=2)
        if isinstance(cache, str):
            from .caching import find_cache

            policy = find_cache(cache, self.pm)
        else:
            policy = cache
        schedule = self.parts["scheduler"].schedule(request.steps, request.shift)
        job = _Job(request, task, schedule, policy, None if cache is None else str(cache))
        return self._run(job, resume)

    def settings(self, prompt: str, *, task: Task | None = None, **given: Any) -> Request:
        """The settings that `stream` would run with: those given, and for the rest what the scheduler, the inputs or the model say.

        Raises ValueError with the nearest valid value.
        """
        scheduler = self.parts["scheduler"]
        for name in ("steps", "shift"):
            given[name] = getattr(scheduler, name, None) if given.get(name) is None else given[name]
        frames, size = self._extent(task or TextToVideo(), given.pop("frames", None), given.pop("size", None))
        specs = self.model, self.specs["backbone"], self.specs["text_encoder"]
        return make_request(*specs, prompt, frames=frames, size=size, **given)

    def preview(self, latents: Tensor) -> np.ndarray[Any, Any]:
        """A rough picture of latents `[1, C, T', H', W']`, uint8 `[T', H', W', 3]`, by a linear map that is fitted once."""
        from .previews import fit_preview, latent_preview

        if self._preview is None:
            self.parts.load("vae")
            self._preview = fit_preview(self.parts["vae"])
        return latent_preview(latents, self._preview)

    def _extent(self, task: Task, frames: int | None, size: tuple[int, int] | None) -> tuple[int, tuple[int, int]]:
        """Number of frames and size, as asked for or as the inputs of the task suggest; the inputs are checked on the way."""
        target = Target(self.model, self.specs["backbone"], self.model.size, self.model.frames, self.compat)
        target = replace(target, frames=frames if frames is not None else task.frames(target) or self.model.frames)
        task.check(target)
        if self._sees and "image_encoder" not in self.specs:
            raise ValueError(f"backbone '{target.backbone.name}' reads image tokens, and the model has no image encoder: give one")
        return target.frames, size or task.size(target) or self.model.size

    @torch.no_grad()
    def _run(self, job: _Job, resume: RunState | None) -> Generator[Event, None, None]:
        request, task = job.request, job.task
        timings = dict.fromkeys(PHASES, 0.0) if resume is None else dict(resume.timings)
        text = yield from self._encode(request, timings)
        prepared = yield from self._prepare(request, task, timings)
        everything = self.setup.offload == "none"
        for part in (*(self.parts.experts if everything else self.parts.experts[:1]), "vae"):
            yield from self._load(part, timings)  # all of it, so that what is wrong with a part is said before the long phase
        self.parts.check()
        sampling = self._sampling(job, prepared)
        record = self._record(job)
        if resume is not None:
            _check_same(resume.run, record)
            sampling.restore(resume.latents, resume.scheduler, resume.generator, resume.cache)
        yield from self._denoise(sampling, text, record, timings)
        if not everything:
            self.parts.release(*self.parts.experts)
        yield Decoding(request.frames)
        with self._timed(timings, "decode"):
            video = self._decode(sampling.latents[:, :, prepared.front :], request, sampling.generator)
        made = manifest.Manifest(
            **{**dict(record), "parts": self.parts.record()}, timings=timings, frames_sha256=manifest.frames_sha256(video),
            cache=sampling.cache.report() if sampling.cache else None,
        )  # fmt: skip
        yield Done(Result(video, self.model.fps, request.seed, timings, made.model_dump(mode="json")))

    def _sampling(self, job: _Job, prepared: Prepared) -> Sampling:
        boundary = self.model.boundary if len(self.parts.experts) > 1 else 0.0
        cache = None if job.cache is None else job.cache.start(job.schedule.timesteps, boundary or None, self.setup.mesh)
        return Sampling(
            self.parts["scheduler"], job.schedule, job.request.latent_shape(self.specs["backbone"], prepared.front), prepared,
            seed=job.request.seed, scales=job.request.scales, boundary=boundary, guide=self.setup.guide(), cache=cache, device=self.device,
        )  # fmt: skip

    def _encode(self, request: Request, timings: Timings) -> Generator[Event, None, list[Tensor]]:
        """Text context `[L, D]` of each prompt; those of the last request are kept for the next, which often shares them."""
        contexts = {prompt: self._contexts[prompt] for prompt in request.prompts if prompt in self._contexts}
        if missing := tuple(prompt for prompt in request.prompts if prompt not in contexts):
            yield from self._load("text_encoder", timings)
            yield Encoding(missing)
            with self._timed(timings, "text"):
                for prompt in missing:  # one at a time: its context must not depend on what else is encoded with it
                    contexts[prompt] = self.parts["text_encoder"].encode([prompt])[0]
                    self._check_finite("text_encoder", contexts[prompt], "context")
            if self.setup.offload != "none":
                self.parts.release("text_encoder")
        self._contexts = contexts
        return [contexts[prompt] for prompt in request.prompts]

    def _prepare(self, request: Request, task: Task, timings: Timings) -> Generator[Event, None, Prepared]:
        """What the task makes of its inputs."""
        target = Target(self.model, self.specs["backbone"], request.size, request.frames, self.compat)
        if type(task) is TextToVideo and target.scheme != "vace":
            return Prepared()
        for part in ("vae", *(["image_encoder"] if self._sees else [])):
            yield from self._load(part, timings)
        yield Preparing(task.name)
        with self._timed(timings, "prepare"):
            prepared = task.prepare(target, Encoders(self._encode_video, self._encode_images))
        if self.setup.offload != "none":
            self.parts.release("image_encoder")
        return prepared

    def _encode_video(self, video: Tensor) -> Tensor:
        vae = self.parts["vae"]
        latents: Tensor = vae.encode(video[None].to(self.device, _dtype_of(vae))).float()
        self._check_finite("vae", latents, "latents")
        return latents

    def _encode_images(self, pictures: Sequence[Tensor]) -> Tensor:
        """Tokens of all pictures in one row, `[1, N, D]`."""
        tokens: Tensor = self.parts["image_encoder"].encode(list(pictures)).float()
        self._check_finite("image_encoder", tokens, "tokens")
        return tokens.flatten(0, 1)[None].to(self.device)

    def _denoise(self, sampling: Sampling, text: list[Tensor], record: manifest.Run, timings: Timings) -> Generator[Event, None, None]:
        count, contexts = len(sampling.schedule.timesteps), dict[str, list[Any]]()
        while sampling.i < count:
            expert, before = sampling.expert, timings["denoise"]
            if not self.parts.is_loaded(expert):
                contexts.clear()
                yield from self._load(expert, timings)
                self.parts.check()
                record = record.model_copy(update={"parts": self.parts.record()})
            self.parts.read_ahead(sampling.expert_ahead)
            with self._timed(timings, "denoise"):
                denoised = self._step(sampling, text, contexts)
            self._check_finite(expert, sampling.latents, "latents")
            state = RunState(record, **sampling.snapshot(), timings=dict(timings))
            sigma = float(sampling.schedule.sigmas[sampling.i])
            yield Step(sampling.i, count, timings["denoise"] - before, sigma, denoised, state)

    def _step(self, sampling: Sampling, text: list[Tensor], contexts: dict[str, list[Any]]) -> Tensor:
        """A step by the expert it belongs to, which no variable of the stream may hold: it has to go before the next one is read.

        contexts: what the expert made of `text`, made here before its first step
        """
        expert, backbone = sampling.expert, self.parts[sampling.expert]
        dtype = _dtype_of(backbone)
        if expert not in contexts:
            contexts.clear()
            conditioning = sampling.prepared.conditioning
            contexts[expert] = [backbone.encode_context([tokens.to(self.device, dtype)], conditioning) for tokens in text]
        positive, *negative = contexts[expert]
        return sampling.step(backbone, positive, negative[0] if negative else None, dtype)

    def _decode(self, latents: Tensor, request: Request, generator: torch.Generator) -> Tensor:
        vae = self.parts["vae"]
        video: Tensor = vae.decode(latents.to(_dtype_of(vae)), generator=generator).float().cpu()
        expected = [1, 3, request.frames, request.size[1], request.size[0]]
        if list(video.shape) != expected:
            name = self.specs["vae"].name
            raise ValueError(f"vae '{name}' decoded {list(latents.shape)} to {list(video.shape)}, its spec promises {expected}")
        self._check_finite("vae", video, "frames")
        return video

    def _check_finite(self, part: str, made: Tensor, what: str) -> None:
        if made.isfinite().all():
            return
        dtype = _name(_dtype_of(self.parts[part]))
        advice = {"float16": "try --dtype bf16 or fp32", "bfloat16": "try --dtype fp32"}.get(dtype, "its weights are damaged or do not fit")
        raise ValueError(f"{part.replace('_', ' ')} '{self.specs[part].name}' made {what} that are NaN or infinite, in {dtype}: {advice}")

    def _record(self, job: _Job) -> manifest.Run:
        request = job.request
        return manifest.Run(
            prompt=request.prompt, negative_prompt=request.negative_prompt,
            model=self.parts.model_record(), parts=self.parts.record(), context=self.context,
            task=manifest.TaskRecord(**recorded(job.task)), loras=self.setup.lora_records(),
            options=self.setup.record(cache=job.cache_name, compat=self.compat),
            steps=request.steps, shift=request.shift, guidance=request.guidance, seed=request.seed, noise_device="cpu",
            device=str(self.device), dtype=_name(self.dtype) if self.dtype else None,
            frames=request.frames, size=request.size, fps=self.model.fps, sigmas=manifest.tensor_sha256(job.schedule.sigmas),
            versions=manifest.versions(),
        )  # fmt: skip

    def _load(self, part: str, timings: Timings) -> Iterator[Event]:
        if self.parts.is_loaded(part):
            return
        yield Loading(part, self.specs[part].name)
        with self._timed(timings, "load"):
            self.parts.load(part)

    @contextmanager
    def _timed(self, timings: Timings, phase: str) -> Iterator[None]:
        began = time.perf_counter()
        yield
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        timings[phase] = timings.get(phase, 0.0) + time.perf_counter() - began


def _check_same(saved: manifest.Run, run: manifest.Run) -> None:
    """ValueError where a saved state is of another run. Equal weights may have moved; those that one has not read are not compared."""
    pairs = ((part, getattr(saved.parts, part), getattr(run.parts, part)) for part in KINDS)
    same = tuple(f"parts.{part}." for part, old, new in pairs if old and new and old.weights and old.weights == new.weights)
    if lines := [line for line in manifest.differences(saved, run) if not line.startswith(same) and not ANOTHER_MATTER.match(line)]:
        raise ValueError(f"the saved state is of another run: {'; '.join(lines[:3])}")


def _dtype(dtype: torch.dtype | str | None) -> torch.dtype | None:
    found = DTYPES.get(dtype) if isinstance(dtype, str) else dtype
    if dtype is not None and found not in DTYPES.values():
        raise ValueError(f"dtype '{dtype}' is not one of {', '.join(DTYPES)}")
    return found


def _dtype_of(part: Any) -> torch.dtype:
    """The type of a part's weights; float32 where it has none."""
    parameters = part.parameters() if isinstance(part, torch.nn.Module) else ()
    return next((value.dtype for value in parameters if value.is_floating_point()), torch.float32)


def _name(dtype: torch.dtype) -> Any:
    return str(dtype).removeprefix("torch.")

"""From a prompt to a video: encode, denoise, decode. One pipeline for every model, made of parts that are found by name.

The pipeline owns shift, guidance, noise and the precision of the sample (float32); parts are read on first use.
"""

from __future__ import annotations

import os
import time
import warnings
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor

from . import compat, manifest, outputs
from ._shared.files import replacing
from ._shared.weights import usable_device
from .context_files import ContextFiles
from .events import Decoding, Done, Encoding, Event, Loading, Step
from .guidance import guided_velocity
from .listing import origin
from .plugins import PART_KINDS, PluginManager, VideoModelSpec, find, plugin_manager
from .request import Request, make_request, unknown_words
from .schedulers.diffusers import as_scheduler

if TYPE_CHECKING:
    from .contracts import Schedule

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
PHASES = ("load", "text", "denoise", "decode")
Timings = dict[str, float]


@dataclass(frozen=True, eq=False)
class Result:
    """A generated video.

    video: `[1, 3, T, H, W]` float32 in [-1, 1] on the CPU
    timings: seconds for load, text, denoise and decode
    manifest: the fields of `wan_dit.manifest.Manifest`
    """

    video: Tensor = field(repr=False)
    fps: int
    seed: int
    timings: Timings
    manifest: dict[str, Any] = field(repr=False)

    def save(self, path: str | os.PathLike[str], *, overwrite: bool = False) -> list[Path]:
        """Write FILE.mp4 and beside it a contact sheet (.png) and the run manifest (.json), all or none; returns the three paths.

        Raises OSError where one of them exists and `overwrite` is not set, ValueError where `path` does not end in .mp4.
        """
        from . import media

        began = time.perf_counter()
        files = outputs.check(path, overwrite=overwrite)
        with replacing(files[0]) as video, replacing(files[1]) as sheet, replacing(files[2]) as record:
            media.write_video(self.video, video, self.fps)
            media.contact_sheet(self.video, sheet)
            self.timings["write"] = time.perf_counter() - began
            made = manifest.Manifest(**{**self.manifest, "timings": self.timings})
            record.write_text(made.model_dump_json(indent=2) + "\n")
        return list(files)


class Pipeline:
    """A model ready to be prompted.

    Example: `Pipeline("tiny")("a red circle moves left", seed=1).save("circle.mp4")`.
    """

    def __init__(
        self,
        model: str | VideoModelSpec = "wan-dit:tiny",
        *,
        vae: Any = None,
        text_encoder: Any = None,
        backbone: Any = None,
        scheduler: Any = None,
        context: str | os.PathLike[str] | None = None,
        dtype: torch.dtype | str | None = None,
        device: torch.device | str | None = None,
        pm: PluginManager | None = None,
    ) -> None:
        """Find the parts and check that they fit; no weights are read yet.

        vae, text_encoder, backbone, scheduler: in place of the model's own: a path, name, Hub id or import string, a
        spec, or a loaded object with a `spec`, used where and as it is; a diffusers scheduler is taken too
        context: a folder of encoded prompts, in place of a text encoder
        dtype: of all weights: `"fp32"`, `"bf16"`, `"fp16"` or torch's; None is fp32 on a CPU, the checkpoint's own on a GPU
        device: None is the CPU
        Raises LookupError for names that are not installed, ValueError for parts that do not fit together.
        """
        if context is not None and text_encoder is not None:
            raise ValueError("give a text encoder or a context folder, not both")
        self.pm = pm or plugin_manager()
        self.model: VideoModelSpec = find("wan_models", model, self.pm) if isinstance(model, str) else model
        self.context = None if context is None else str(context)
        self.device, self.dtype = usable_device(device or "cpu"), _dtype(dtype)
        self.specs: dict[str, Any] = {}
        self._loaded: dict[str, Any] = {}
        self._contexts: dict[str, Tensor] = {}
        self._weights: dict[str, str | None] = {}
        text = text_encoder if context is None else ContextFiles(context)
        for part, ref in {"backbone": backbone, "vae": vae, "text_encoder": text, "scheduler": scheduler}.items():
            self._add(part, ref)
        self._check({})

    @classmethod
    def from_pretrained(cls, model: str | VideoModelSpec = "wan-dit:tiny", **parts: Any) -> Self:
        """`Pipeline(model, ...)` under the name that is usual for models."""
        return cls(model, **parts)

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
        negative_prompt: str | None = None,
        steps: int | None = None,
        shift: float | None = None,
        guidance: float | None = None,
        seed: int = 0,
        frames: int | None = None,
        size: tuple[int, int] | None = None,
    ) -> Iterator[Event]:
        """The events of one generation, `Done` with the result at the end. Settings that are None are the model's own; steps and shift
        those of the scheduler, where it is made for certain ones.

        guidance: classifier-free guidance scale; 1 runs the backbone once a step and needs no negative prompt
        seed: the noise is drawn on the CPU, so that a seed means the same on every device
        frames: 1 + k * temporal stride of the VAE; size: (width, height) in pixels
        Raises ValueError at once, with the nearest valid value, before anything is loaded. Streams of one pipeline may be
        interleaved.
        """
        scheduler = self._loaded["scheduler"]
        steps = getattr(scheduler, "steps", None) if steps is None else steps
        shift = getattr(scheduler, "shift", None) if shift is None else shift
        request = make_request(
            self.model, self.specs["backbone"], self.specs["text_encoder"], prompt,
            negative_prompt=negative_prompt, steps=steps, shift=shift, guidance=guidance, seed=seed, frames=frames, size=size,
        )  # fmt: skip
        if hint := unknown_words(self.model, prompt):
            warnings.warn(hint, UserWarning, stacklevel=2)
        return self._run(request, scheduler.schedule(request.steps, request.shift))

    @torch.no_grad()
    def _run(self, request: Request, schedule: Schedule) -> Generator[Event, None, None]:
        timings = dict.fromkeys(PHASES, 0.0)
        contexts = yield from self._encode(request, timings)
        for part in ("backbone", "vae"):  # the VAE too, so that what is wrong with it is said before the long part
            yield from self._load(part, timings)
        self._check(self._loaded)
        generator = torch.Generator("cpu").manual_seed(request.seed)
        latents = yield from self._denoise(request, schedule, contexts, generator, timings)
        yield Decoding(request.frames)
        with self._timed(timings, "decode"):
            video = self._decode(latents, request, generator)
        yield Done(Result(video, self.model.fps, request.seed, timings, self._manifest(request, video, schedule, timings)))

    def _encode(self, request: Request, timings: Timings) -> Generator[Event, None, list[Tensor]]:
        """Text context `[L, D]` of each prompt; those of the last request are kept for the next, which often shares them."""
        contexts = {prompt: self._contexts[prompt] for prompt in request.prompts if prompt in self._contexts}
        if missing := tuple(prompt for prompt in request.prompts if prompt not in contexts):
            yield from self._load("text_encoder", timings)
            yield Encoding(missing)
            with self._timed(timings, "text"):
                for prompt in missing:  # one at a time: its context must not depend on what else is encoded with it
                    contexts[prompt] = self._loaded["text_encoder"].encode([prompt])[0]
                    self._check_finite("text_encoder", contexts[prompt], "context")
        self._contexts = contexts
        return [contexts[prompt] for prompt in request.prompts]

    def _denoise(
        self, request: Request, schedule: Schedule, text: list[Tensor], generator: torch.Generator, timings: Timings
    ) -> Generator[Event, None, Tensor]:
        backbone, scheduler = self._loaded["backbone"], self._loaded["scheduler"]
        dtype = _dtype_of(backbone)
        with self._timed(timings, "denoise"):
            contexts = [backbone.encode_context([tokens.to(self.device, dtype)]) for tokens in text]
            context, negative_context = contexts[0], contexts[1] if request.guided else None
            state = scheduler.start(schedule)
            noise = torch.randn(request.latent_shape(self.specs["backbone"]), generator=generator)
            latents = (noise * schedule.noise_scale).to(self.device)
        count = len(schedule.timesteps)
        for i in range(count):
            before = timings["denoise"]
            with self._timed(timings, "denoise"):
                timestep = schedule.timesteps[i].to(self.device, torch.float32).reshape(1)
                velocity = guided_velocity(backbone, latents.to(dtype), timestep, context, negative_context, request.guidance)
                latents = scheduler.step(state, velocity.float(), latents, generator)
            yield Step(i + 1, count, timings["denoise"] - before, float(schedule.sigmas[i + 1]))
        self._check_finite("backbone", latents, "latents")
        return latents

    def _decode(self, latents: Tensor, request: Request, generator: torch.Generator) -> Tensor:
        vae = self._loaded["vae"]
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
        dtype = _name(_dtype_of(self._loaded[part]))
        advice = {"float16": "try --dtype bf16 or fp32", "bfloat16": "try --dtype fp32"}.get(dtype, "its weights are damaged or do not fit")
        raise ValueError(f"{part.replace('_', ' ')} '{self.specs[part].name}' made {what} that are NaN or infinite, in {dtype}: {advice}")

    def _manifest(self, request: Request, video: Tensor, schedule: Schedule, timings: Timings) -> dict[str, Any]:
        record = manifest.Manifest(
            prompt=request.prompt, negative_prompt=request.negative_prompt,
            model=self._part("wan_models", self.model), context=self.context,
            parts=manifest.Parts(
                **{part: self._part(kind, self.specs[part], self._fingerprint(part)) for part, kind in PART_KINDS.items()}
            ),
            steps=request.steps, shift=request.shift, guidance=request.guidance, seed=request.seed, noise_device="cpu",
            device=str(self.device), dtype=_name(self.dtype) if self.dtype else None,
            frames=request.frames, size=request.size, fps=self.model.fps, sigmas=manifest.tensor_sha256(schedule.sigmas),
            versions=manifest.versions(), timings=timings, frames_sha256=manifest.frames_sha256(video),
        )  # fmt: skip
        return record.model_dump(mode="json")

    def _part(self, kind: str, spec: Any, weights: str | None = None) -> manifest.Part:
        dist, version = origin(kind, spec, self.pm)
        return manifest.Part(name=spec.name, dist=dist, version=version, weights=weights)

    def _fingerprint(self, part: str) -> str | None:
        """Of the weights as loaded; read once, since a large model takes seconds."""
        if part not in self._weights:
            loaded = self._loaded[part]
            self._weights[part] = loaded.fingerprint() if hasattr(loaded, "fingerprint") else None
        return self._weights[part]

    def _add(self, part: str, ref: Any) -> None:
        """Note the spec of a part; a loaded object is kept beside the spec it carries."""
        if ref is None:
            ref = find(PART_KINDS[part], getattr(self.model, part), self.pm, typed=False)
        elif isinstance(ref, str):
            ref = find(PART_KINDS[part], ref, self.pm)
        is_spec = hasattr(ref, "load") and hasattr(ref, "name")
        self.specs[part] = ref if is_spec else getattr(ref, "spec", None) or SimpleNamespace(name=type(ref).__name__)
        if part == "scheduler":  # has no weights, so what is wrong with it is said at once
            self._loaded[part] = as_scheduler(ref.load() if is_spec else ref)
        elif not is_spec:
            self._loaded[part] = ref

    def _check(self, loaded: dict[str, Any]) -> None:
        """Do the parts fit, by the specs of what is loaded, and by what was promised for the rest?"""
        specs = [getattr(loaded.get(part), "spec", None) or self.specs[part] for part in ("backbone", "vae", "text_encoder")]
        compat.check(*specs, pm=self.pm)

    def _load(self, part: str, timings: Timings) -> Iterator[Event]:
        if part in self._loaded:
            return
        spec = self.specs[part]
        yield Loading(part, spec.name)
        if part not in self._loaded:  # another stream may have been quicker
            with self._timed(timings, "load"):
                self._loaded[part] = spec.load(dtype=self.dtype, device=self.device)

    @contextmanager
    def _timed(self, timings: Timings, phase: str) -> Iterator[None]:
        began = time.perf_counter()
        yield
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        timings[phase] += time.perf_counter() - began


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

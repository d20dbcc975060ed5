"""Rectified flow (report, section 4.2.1): the velocity of the straight path from data to noise, timesteps logit-normal and shifted."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from pydantic import Field
from torch import Tensor, nn
from tqdm import tqdm
from wan_dit._shared.weights import usable_device
from wan_dit.compat import check, mismatch
from wan_dit.contracts import Conditioning
from wan_dit.guidance import guided_velocity

from ..config import read_settings
from ..data.buckets import Bucket
from ..data.cache import Cache
from ..data.mix import Mix
from ..parts import check_clips, fresh
from ..plugins import find
from .adapters import LoraSettings, TrainedLora
from .conditioning import Task, check_task, conditioning_of, joined, moved, with_input_channels
from .frozen_base import Base, load_base
from .timesteps import TimestepSettings, draw_sigmas, loss_weights
from .trained import Choice, ContextEmbedder, Trained, WholeBackbone

if TYPE_CHECKING:
    import pluggy

    from ..contracts import Dataset, Draw


CONTEXTS = 256  # prompts whose context is held in memory: 4 MB each at most of umT5-XXL in fp16


class FlowSettings(TimestepSettings):
    """backbone, text_encoder, vae, scheduler: parts by name; the VAE is frozen and its latents are cached.

    init: `random` or `pretrained`, for the backbone and a trained text encoder
    architecture: fields of the config of a random backbone, which is otherwise like the named one, for latents of the VAE; of a pretrained
    one `in_dim` alone, which adds inputs of weight zero
    train: `all` of the backbone, a `lora` beside it, or its `context_embedder` for another text encoder
    base: type of the weights of a backbone that stays as it is (`lora`, `context_embedder`): `fp32`, `bf16`, `fp8` or `int8`
    swap: blocks of such a one that wait in the host's memory (`wan_train.frozen`)
    task: which frames are known besides the text: `t2v` none, `i2v`, `flf2v`, `continuation`, `mixed`, or what `vace` backbones take
    train_text_encoder: trains it together with the backbone; otherwise it is frozen and its output cached
    text_device: where a frozen text encoder is, such as `cpu` where the backbone needs the GPU's memory; empty for the run's device
    tokenizer: pieces of a tokenizer that is first trained on the captions, 0 to keep the encoder's own
    clips: clips encoded once, 0 for the whole data set
    precache: encode all clips before training, which then have one shape; off, where the recipe has stages: each is encoded when it is
    first needed, in the shape that is asked for, and kept
    text_drop: share of samples that are trained on the empty prompt, for classifier-free guidance
    preview_*: how previews and validation figures are sampled
    noise levels: `wan_train.objectives.timesteps`
    """

    backbone: str = "tiny"
    text_encoder: str = "tiny"
    vae: str = "tiny"
    scheduler: str = "unipc"
    init: str = "random"
    architecture: dict[str, Any] = Field(default_factory=dict)
    text_architecture: dict[str, Any] = Field(default_factory=dict)
    train: Choice = "all"
    lora: LoraSettings = LoraSettings()
    base: Base = "fp32"
    swap: int = Field(0, ge=0)
    task: Task = "t2v"
    train_text_encoder: bool = False
    text_device: str = ""
    tokenizer: int = Field(0, ge=0)
    clips: int = Field(0, ge=0)
    precache: bool = True
    text_drop: float = Field(0.1, ge=0, le=1)
    preview_prompts: int = Field(60, gt=0)
    preview_steps: int = Field(15, gt=0)
    preview_guidance: float = Field(2.0, ge=0)


@dataclass(frozen=True)
class FlowBatch:
    """Samples of a step: latents and noise `[B, C, T', H', W']`, noise levels `[B]`, prompts, and known frames where the task has them.

    context: what a frozen text encoder makes of the prompts, `[L, D]` each; None of one that is trained
    """

    clean: Tensor
    noise: Tensor
    sigma: Tensor
    prompts: list[str]
    context: list[Tensor] | None = None
    conditioning: Conditioning | None = None


class RectifiedFlow:
    """Trains a backbone, and a text encoder with it where asked; see `wan_train.contracts.Objective`."""

    def __init__(self, settings: dict[str, Any], dataset: Dataset, folder: Path, device: str, pm: pluggy.PluginManager) -> None:
        self.settings = s = read_settings(FlowSettings, settings, "objective.settings")
        _check(s)
        self.dataset, self.folder, self.device = dataset, folder, device
        self.shown: Any = dataset.datasets[0] if isinstance(dataset, Mix) else dataset  # what previews are of
        names = {"backbone": s.backbone, "vae": s.vae, "text_encoder": s.text_encoder}
        specs = {kind: find(f"wan_{kind}s", name, pm) for kind, name in names.items()}
        s = self.settings = _on_latents(s, specs["backbone"], specs["vae"])
        if not s.architecture and not s.text_architecture and s.train != "context_embedder":
            check(specs["backbone"], specs["vae"], specs["text_encoder"], pm=pm)
        self.scheduler = find("wan_schedulers", s.scheduler, pm).load()
        self.backbone = _backbone(specs["backbone"], s, device)
        self.trained = _trained(self.backbone, s, specs["text_encoder"])
        self.modules: dict[str, nn.Module] = dict(self.trained.modules)
        self.frozen = self.trained.frozen
        if s.train_text_encoder:
            self.text_encoder = self.modules["text_encoder"] = self._trained_text_encoder(specs["text_encoder"])
        check(self.backbone.spec, specs["vae"], self.text_encoder.spec if s.train_text_encoder else specs["text_encoder"], pm=pm)
        check_task(s.task, self.backbone.spec)
        stride, patch, clips = specs["vae"].stride, self.backbone.spec.patch, dataset.video([0])
        self.grid = (stride[0] * patch[0], stride[1] * patch[1], stride[2] * patch[2])
        check_clips(clips, (stride[0], *self.grid[1:]), *clips.shape[2:])  # previews have this shape
        self.bucket = frames, height, width = Bucket(*clips.shape[2:])  # of samples where there are no stages
        self.shape = (self.backbone.spec.latent_channels, 1 + (frames - 1) // stride[0], height // stride[1], width // stride[2])
        if not s.train_text_encoder:
            self.text_encoder = specs["text_encoder"].load(device=usable_device(s.text_device) if s.text_device else device)
        self.vae = specs["vae"].load(dtype=torch.float32, device=device)
        self.cache = Cache(folder / "cache", vae=self.vae, text_encoder=None if s.train_text_encoder else self.text_encoder)
        self._captions = lru_cache(maxsize=100_000)(dataset.captions)
        self._context = lru_cache(maxsize=CONTEXTS)(self.cache.context)

    def _trained_text_encoder(self, spec: Any) -> Any:
        settings = self.settings
        encoder = fresh(spec, settings.init, settings.text_architecture, self.device)
        if settings.tokenizer:
            lines = (line for index in range(settings.clips or len(self.dataset)) for line in self.dataset.captions(index))
            encoder = encoder.retokenised(lines, settings.tokenizer).to(self.device).train()
        return encoder

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Those of what is trained of the backbone; a text encoder stays with AdamW (docs/tiny-models.md)."""
        *groups, last = self.trained.parameter_groups()
        text = list(self.text_encoder.parameters()) if self.settings.train_text_encoder else []
        return [*groups, {**last, "params": last["params"] + text}]

    def prepare(self) -> None:
        """Encode the clips once, where that is asked for, or read what a run or `wan-train cache` has encoded before."""
        if not self.settings.precache:
            return
        clips = tqdm(range(self.samples), desc="latents", disable=None)
        self.latents = torch.stack([self.cache.latents(self.dataset, index, self.bucket) for index in clips])

    @property
    def samples(self) -> int:
        return self.settings.clips or len(self.dataset)

    def batch_size(self, given: int, progress: float) -> int:
        return given

    def batch(self, samples: Sequence[int], draw: Draw, progress: float, *bucket: Bucket, shift: float | None = None) -> FlowBatch:
        clean = self._clean(samples, *bucket)
        noise = torch.stack([torch.randn(clean.shape[1:], generator=draw(sample, "noise")) for sample in samples])
        sigma = torch.cat([self.sigmas(1, draw(sample, "sigma"), shift) for sample in samples])
        prompts = [self._prompt(sample, draw(sample, "prompt")) for sample in samples]
        context = None if self.settings.train_text_encoder else [self._context(prompt) for prompt in prompts]
        known = self._conditioning(self.dataset, samples, [draw(sample, "task") for sample in samples], *bucket)
        return FlowBatch(clean, noise, sigma, prompts, context, known)

    @torch.no_grad()
    def _clean(self, samples: Sequence[int], *bucket: Bucket) -> Tensor:
        """Latents `[B, C, T', H', W']`."""
        if not self.settings.precache:
            return torch.stack([self.cache.latents(self.dataset, sample, *(bucket or (self.bucket,))) for sample in samples])
        if bucket:
            raise ValueError("a recipe with stages encodes clips in several shapes: set objective.settings.precache = false")
        return self.latents[list(samples)]

    @torch.no_grad()
    def _conditioning(
        self, dataset: Any, samples: Sequence[int], generators: Sequence[torch.Generator], *bucket: Bucket
    ) -> Conditioning | None:
        """Known frames of clips of a data set, drawn for each."""
        task = self.settings.task
        if task == "t2v":
            return None
        stride = self.backbone.spec.stride
        clips: Any = [dataset.clip(sample, *bucket) for sample in samples] if bucket else dataset.video(samples)
        pairs = zip(clips, generators, strict=True)
        return joined([conditioning_of(task, clip, stride, self._encode, generator) for clip, generator in pairs])

    def _encode(self, frames: Tensor) -> Tensor:
        latents: Tensor = self.vae.encode(frames[None].to(self.device))
        return latents

    def _prompt(self, sample: int, generator: torch.Generator) -> str:
        """One of a clip's captions, or the empty prompt."""
        drop, pick = torch.rand(2, generator=generator).tolist()
        captions = self._captions(sample)
        return "" if drop < self.settings.text_drop else captions[int(pick * len(captions))]

    def losses(self, batch: FlowBatch) -> tuple[Tensor, dict[str, Tensor]]:
        clean, noise, sigma = (value.to(self.device) for value in (batch.clean, batch.noise, batch.sigma))
        share = sigma.view(-1, 1, 1, 1, 1)
        tokens = self.text_encoder.embed(batch.prompts) if batch.context is None else [given.to(self.device) for given in batch.context]
        context = self.backbone.encode_context(list(tokens))
        given = () if batch.conditioning is None else (moved(batch.conditioning, self.device),)
        velocity = self.backbone((1 - share) * clean + share * noise, 1000 * sigma, context, *given)
        error = (velocity.float() - (noise - clean)).square().flatten(1).mean(1)
        return error * loss_weights(self.settings, sigma), {"error": error.detach(), "sigma": sigma}

    def sigmas(self, count: int, generator: torch.Generator, shift: float | None = None) -> Tensor:
        """Noise levels `[count]`; shift: in place of that of the settings."""
        settings = self.settings if shift is None else self.settings.model_copy(update={"shift": shift})
        return draw_sigmas(settings, count, generator)

    @property
    def previews(self) -> int:
        return self.settings.preview_prompts

    @torch.no_grad()
    def preview(self, modules: dict[str, nn.Module], indices: Sequence[int]) -> Tensor:
        """Clips of prompts that are kept for previews; one at a time, so that each has the same bits in any company."""
        text_encoder: Any = modules.get("text_encoder", self.text_encoder)
        encode = (lambda prompt: text_encoder.encode([prompt])[0]) if self.settings.train_text_encoder else self._context
        prompts = self._preview_prompts()
        clips = []
        with self.trained.inserted(modules) as backbone:
            negative = backbone.encode_context([encode("").to(self.device)])
            for index in indices:
                context, held_out = backbone.encode_context([encode(prompts[index]).to(self.device)]), len(self.shown) + index
                given = self._conditioning(self.shown, [held_out], [torch.Generator().manual_seed(held_out)])
                clips.append(self.sample(backbone, context, negative, index, given))
        return torch.cat(clips)

    def measure(self, clips: Tensor) -> tuple[Tensor, dict[str, float]]:
        """The first clips, and what the data set's evaluator reads from all."""
        figures = self.dataset.evaluate(clips, self._preview_prompts())
        return clips[:12], {f"val_{name}": value for name, value in figures.items()}

    def _preview_prompts(self) -> list[str]:
        """The data set's evaluation prompts; where frames are known, captions of the held-out clips that they are of."""
        if self.settings.task == "t2v":
            return self.dataset.evaluation_prompts(self.previews)
        return [self.shown.captions(len(self.shown) + index)[0] for index in range(self.previews)]

    def sample(self, backbone: Any, context: Any, negative: Any, seed: int, conditioning: Conditioning | None = None) -> Tensor:
        """A clip `[1, 3, T, H, W]` of the context of a prompt, and of the empty one; all that is random in it is drawn from `seed`."""
        settings, generator = self.settings, torch.Generator().manual_seed(seed)
        schedule = self.scheduler.schedule(settings.preview_steps, settings.shift)
        sample = (torch.randn((1, *self.shape), generator=generator) * schedule.noise_scale).to(self.device)
        state, given = self.scheduler.start(schedule), None if conditioning is None else moved(conditioning, self.device)
        for t in schedule.timesteps:
            timestep = t.float().reshape(1).to(self.device)
            velocity = guided_velocity(backbone, sample, timestep, context, negative, settings.preview_guidance, given)
            sample = self.scheduler.step(state, velocity, sample, generator)
        return self.vae.decode(sample, generator=generator).cpu()

    def export(self, modules: dict[str, nn.Module], folder: str) -> None:
        self.trained.export(modules, Path(folder))
        if self.settings.train_text_encoder:
            part: Any = modules["text_encoder"]
            part.half().save_pretrained(Path(folder) / "text_encoder")


def _check(s: FlowSettings) -> None:
    """ValueError where settings do not go together."""
    if (s.tokenizer or s.text_architecture) and (s.init != "random" or not s.train_text_encoder):
        raise ValueError("tokenizer and text_architecture are of a text encoder trained from random weights: set train_text_encoder")
    if s.train != "all" and s.init != "pretrained":
        raise ValueError(f"train = '{s.train}' leaves the other weights as they are: it needs init = 'pretrained', got '{s.init}'")
    if s.train != "all" and s.architecture:
        raise ValueError(
            f"train = '{s.train}' leaves the backbone as it is, and inputs that are added would stay zero: leave architecture out, got "
            f"{', '.join(sorted(s.architecture))}"
        )
    if s.train == "all" and (s.base != "fp32" or s.swap):
        raise ValueError("base and swap are of a backbone that stays as it is: use them with train = 'lora' or 'context_embedder'")
    if s.text_device and s.train_text_encoder:
        raise ValueError("text_device is of a text encoder as it is: leave it out, or train_text_encoder")
    if s.train == "context_embedder" and s.train_text_encoder:
        raise ValueError("train = 'context_embedder' is for a text encoder as it is: leave train_text_encoder out")


def _on_latents(s: FlowSettings, backbone: Any, vae: Any) -> FlowSettings:
    """A random backbone is made for the latents of the VAE, where they are others than those of the one that it is like."""
    if s.init != "random" or not mismatch("wan_vaes", vae, backbone):
        return s
    latents = {"in_dim": vae.latent_channels, "out_dim": vae.latent_channels, "latent_space": vae.latent_space, "stride": vae.stride}
    return s.model_copy(update={"architecture": {**latents, **s.architecture}})


def _backbone(spec: Any, s: FlowSettings, device: str) -> Any:
    if s.train != "all":
        return load_base(spec, s.base, s.swap, device, s.train)
    if s.init == "pretrained" and set(s.architecture) == {"in_dim"}:
        return with_input_channels(fresh(spec, s.init, {}, device), s.architecture["in_dim"])
    return fresh(spec, s.init, s.architecture, device)


def _trained(backbone: Any, s: FlowSettings, text_encoder: Any) -> Trained:
    """text_encoder: its spec"""
    if s.train == "lora":
        return TrainedLora(backbone, s.lora, s.expert)
    return ContextEmbedder(backbone, text_encoder) if s.train == "context_embedder" else WholeBackbone(backbone)

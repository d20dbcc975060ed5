"""The VAE objective, in phases (report, section 4.1.2): L1, KL and, where asked for, wavelets, a perceptual term and an adversary.

The report trains a VAE of pictures, makes it one of videos, and lets a discriminator sharpen it; L1 : KL : LPIPS are 3 : 3e-6 : 3. DC-AE
(arXiv 2410.10733) adapts one to high resolution by training parts of it. Both are phases of this objective. It trains whatever satisfies
`wan_train.contracts.TrainableVAE`: of any stride, with a posterior or without.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from ..config import read_settings
from ..parts import check_clips, fresh
from ..plugins import find
from .discriminator import DiscriminatorSettings, adversarial
from .inflation import check_inflation, inflate
from .perceptual import Perceptual
from .phases import Phase, phase_at
from .wavelet import wavelet_distance

if TYPE_CHECKING:
    import pluggy

    from ..contracts import Dataset, Draw


FLOOR = 1e-4  # squared error, 46 dB, below which the logarithm hardly counts


class VAESettings(BaseModel):
    """vae: the part by name; init: `random` or `pretrained`; architecture: fields of its config to change.

    l1, l2, kl: weights of the loss; log_l2: of the logarithm of the squared error, which counts a dB the same in clips easy and hard.
    A VAE without a posterior has no KL
    wavelet: weight of L1 on the sub-bands of a Haar transform over time, height and width (`wavelet`) of so many `wavelet_levels`
    perceptual: weight of the distance that the network in the file `perceptual_weights` gives (`perceptual`); off without one, and said so
    discriminator: of phases with an adversary
    statistics: clips the latent mean and deviation are measured on, once, at the end
    validation: clips of the validation set whose PSNR is logged
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    vae: str = "tiny"
    init: str = "random"
    architecture: dict[str, Any] = {}
    phases: tuple[Phase, ...] = Field(min_length=1)
    l1: float = Field(3.0, ge=0)
    l2: float = Field(0.0, ge=0)
    log_l2: float = Field(0.0, ge=0)
    kl: float = Field(3e-6, ge=0)
    wavelet: float = Field(0.0, ge=0)
    wavelet_levels: int = Field(1, gt=0)
    perceptual: float = Field(0.0, ge=0)
    perceptual_weights: Path | None = None
    discriminator: DiscriminatorSettings = DiscriminatorSettings()
    statistics: int = Field(256, gt=0)
    validation: int = Field(16, gt=0)


@dataclass(frozen=True)
class VAEBatch:
    """Crops `[B, 3, T, H, W]`, the random numbers of the posterior of each, and the phase that they are trained in."""

    video: Tensor
    generators: list[torch.Generator]
    phase: Phase


class VAEObjective:
    """Trains one VAE on crops of clips; see `wan_train.contracts.Objective`."""

    def __init__(self, settings: dict[str, Any], dataset: Dataset, folder: Path, device: str, pm: pluggy.PluginManager) -> None:
        self.settings = read_settings(VAESettings, settings, "objective.settings")
        self.dataset, self.device = dataset, device
        spec = find("wan_vaes", self.settings.vae, pm)
        self.vae = fresh(spec, self.settings.init, self._architecture(spec), device)
        self.modules: dict[str, nn.Module] = {"vae": self.vae}
        if any(phase.adversary for phase in self.settings.phases):
            self.modules["discriminator"] = self.settings.discriminator.build().to(device)
        self._before: list[Tensor] = []
        self.perceptual = self._perceptual()
        clips = dataset.video([0])
        check_clips(clips, self.vae.spec.stride, *clips.shape[2:])  # previews are of whole clips
        for phase in self.settings.phases:
            for frames, size in phase.shapes:
                check_clips(clips, self.vae.spec.stride, frames, size, size)
            self._check(phase)
        if any(phase.inflate for phase in self.settings.phases):
            check_inflation(self.vae, min(size for phase in self.settings.phases for size in phase.size))

    def _architecture(self, spec: Any) -> dict[str, Any]:
        """Fields to change; the latents of fresh weights are none of a published VAE's, and are not tagged as such."""
        settings = self.settings
        if settings.init == "random" and "latent_space" not in settings.architecture and str(spec.weights).startswith("hub:"):
            return {**settings.architecture, "latent_space": f"{spec.latent_space}-retrained"}
        return settings.architecture

    def _perceptual(self) -> Perceptual | None:
        settings = self.settings
        if not settings.perceptual:
            return None
        if settings.perceptual_weights is None:
            if not dist.is_initialized() or dist.get_rank() == 0:
                warnings.warn("the perceptual term is off: give a network in objective.settings.perceptual_weights", stacklevel=2)
            return None
        sizes = {size for phase in settings.phases for size in phase.size}
        return Perceptual(settings.perceptual_weights, self.device, sorted(sizes))

    def _check(self, phase: Phase) -> None:
        parts = self.vae.parameter_groups() if phase.trains else {}
        if unknown := [name for name in phase.trains if name not in parts]:
            raise ValueError(f"phases: trains '{unknown[0]}', and the parts of the VAE are {', '.join(parts)}")
        if phase.adversary and min(phase.size) < (least := 2**self.settings.discriminator.levels):
            levels = self.settings.discriminator.levels
            raise ValueError(f"phases: a discriminator of {levels} levels needs a size of {least} or more, got {min(phase.size)}")

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Muon may train the convolutions inside the two halves; the first and the last of each, and a discriminator, stay with AdamW."""
        parts = self.vae.parameter_groups()
        encoder, decoder = ([param for param in parts.get(half, []) if _mixes(param)] for half in ("encoder", "decoder"))
        chosen = {id(param) for param in (*encoder[1:], *decoder)}  # the encoder's first takes pixels
        inner, rest = ([param for param in self.vae.parameters() if (id(param) in chosen) is wanted] for wanted in (True, False))
        groups: list[dict[str, Any]] = [{"params": inner, "muon": True}, {"params": rest}]
        if (discriminator := self.modules.get("discriminator")) is not None:
            groups.append({"params": list(discriminator.parameters()), "scale": self.settings.discriminator.scale})
        return groups

    def prepare(self) -> None:
        """Nothing is encoded once: a VAE trains on pixels."""

    @property
    def samples(self) -> int:
        return len(self.dataset)

    def batch(self, samples: Sequence[int], draw: Draw, progress: float) -> VAEBatch:
        """Random crops in time and space of the clips, as the phase at `progress` says."""
        phase = self.phase(progress)
        frames, size = phase.shape(draw)
        crops = []
        for sample, clip in zip(samples, self.dataset.video(samples), strict=True):
            generator = draw(sample, "crop")
            spans = zip(clip.shape[1:], (frames, size, size), strict=True)
            t, y, x = (int(torch.randint(have - want + 1, (), generator=generator)) for have, want in spans)
            crops.append(clip[:, t : t + frames, y : y + size, x : x + size])
        return VAEBatch(torch.stack(crops), [draw(sample, "posterior") for sample in samples], phase)

    def batch_size(self, given: int, progress: float) -> int:
        """Samples of a step: those of the phase, where it says how many."""
        return self.phase(progress).batch or given

    def phase(self, progress: float) -> Phase:
        return self.settings.phases[phase_at(self.settings.phases, progress)]

    def enter(self, progress: float, before: float, averages: Mapping[str, Mapping[str, Tensor]]) -> bool:
        """Freeze what the phase does not train, and inflate the VAE where one begins that asks for it; says whether one begins."""
        self._before = [buffer.clone() for buffer in _statistics(self.vae)]
        phases, now = self.settings.phases, phase_at(self.settings.phases, progress)
        self.vae.requires_grad_(not phases[now].trains)
        parts = self.vae.parameter_groups() if phases[now].trains else {}
        for param in (param for name in phases[now].trains for param in parts[name]):
            param.requires_grad_(True)
        for module in self.vae.modules():
            if isinstance(module, _NormBase):  # statistics of the batch only where a phase trains the norm, or all
                module.train(not phases[now].trains or any(param.requires_grad for param in module.parameters()))
        if (discriminator := self.modules.get("discriminator")) is not None:
            discriminator.requires_grad_(phases[now].adversary > 0)
        begun = phases[0 if before < 0 else phase_at(phases, before) + 1 : now + 1]
        if any(phase.inflate for phase in begun):
            inflate(self.vae, averages["vae"])
        return bool(begun)

    def gather(self) -> None:
        """Statistics of batches become the mean over the processes, so that all hold, and save, the same; those of a step that went wrong
        are the ones before it."""
        if not (own := _statistics(self.vae)):
            return
        joined = torch.cat([buffer.flatten() for buffer in own])
        if dist.is_initialized():
            dist.all_reduce(joined)
            joined /= dist.get_world_size()
        agreed = joined.split([buffer.numel() for buffer in own])
        for buffer, values in zip(own, agreed if joined.isfinite().all() else self._before, strict=True):
            buffer.copy_(values.view_as(buffer))

    def losses(self, batch: VAEBatch) -> tuple[Tensor, dict[str, Tensor]]:
        settings, video = self.settings, batch.video.to(self.device)
        output, mean, logvar = self.vae.reconstruct(video, batch.generators)
        output = output.float()
        difference = output - video
        l1, l2 = difference.abs().flatten(1).mean(1), difference.square().flatten(1).mean(1)
        kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).flatten(1).mean(1) if logvar is not None else torch.zeros_like(l1)
        reconstruction = settings.l1 * l1 + settings.l2 * l2 + settings.log_l2 * (l2 + FLOOR).log()
        figures = {"l1": l1.detach(), "kl": kl.detach(), "psnr": _psnr(l2.detach())}
        if settings.wavelet:
            distance = wavelet_distance(difference, settings.wavelet_levels)
            reconstruction = reconstruction + settings.wavelet * distance
            figures["wavelet"] = distance.detach()
        if self.perceptual is not None:
            distance = self.perceptual(output, video)
            reconstruction = reconstruction + settings.perceptual * distance
            figures["perceptual"] = distance.detach()
        losses = reconstruction + settings.kl * kl
        if batch.phase.adversary:
            pair = settings.discriminator.judges == "pair"
            generator, discriminator = adversarial(self.modules["discriminator"], video, output, reconstruction, pair)
            losses = losses + batch.phase.adversary * generator + discriminator
            figures |= {"adversary": generator.detach(), "discriminator": discriminator.detach()}
        return losses, figures

    @property
    def previews(self) -> int:
        return self.settings.validation

    @torch.no_grad()
    def preview(self, modules: dict[str, nn.Module], indices: Sequence[int]) -> Tensor:
        """Reconstructions of whole validation clips."""
        vae: Any = modules["vae"]
        return torch.cat([vae.decode(vae.encode(clip[None].to(self.device))).cpu() for clip in self._validation(indices)])

    def measure(self, clips: Tensor) -> tuple[Tensor, dict[str, float]]:
        """Validation clips above their reconstructions, and the mean PSNR in dB."""
        video = self._validation(range(self.previews))
        psnr = torch.stack([_psnr((a - b).square().mean()) for a, b in zip(clips, video, strict=True)]).mean()
        return torch.cat([video[:3], clips[:3]]), {"val_psnr": psnr.item()}

    def _validation(self, indices: Sequence[int]) -> Tensor:
        """Clips that are never drawn in training."""
        return self.dataset.video([len(self.dataset) + index for index in indices])

    def export(self, modules: dict[str, nn.Module], folder: str) -> None:
        vae: Any = modules["vae"].to(self.device)
        if not self._keeps_latents():
            indices = range(0, self.samples, max(1, self.samples // self.settings.statistics))  # all data sets of a mix have their share
            vae.fit_normaliser(self.dataset.video([index]).to(self.device) for index in indices)
        numbers = [value for value in vae.state_dict().values() if value.is_floating_point()]
        fits = all(bool((value.abs() <= torch.finfo(torch.float16).max).all()) for value in numbers)  # variances of batches may not
        (vae.half() if fits else vae).save_pretrained(Path(folder) / "vae")

    def _keeps_latents(self) -> bool:
        """Whether the encoder stays as it was, so that backbones may go on with the latents: then their statistics stay too."""
        trained = {part for phase in self.settings.phases for part in phase.trains or ("encoder",)}
        return self.settings.init == "pretrained" and not trained & {"encoder", "encoder_head"}


def _statistics(module: nn.Module) -> list[Tensor]:
    """What its batch norms have gathered."""
    norms = [norm for norm in module.modules() if isinstance(norm, _NormBase)]
    return [buffer for norm in norms for buffer in norm.buffers() if buffer.is_floating_point()]


def _mixes(param: nn.Parameter) -> bool:
    """Whether it is the weight of a convolution that mixes channels: neither a norm's nor one of each channel by itself."""
    return param.ndim > 3 and param.shape[1] > 1


def _psnr(mean_square: Tensor) -> Tensor:
    return 10 * torch.log10(4 / mean_square)  # the peak of [-1, 1] is 2

"""The VAE objective: reconstruction and KL (report, section 4.1.2: L1 and KL at 3 : 3e-6; no adversary, no perceptual term)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from ..config import read_settings
from ..parts import check_clips, fresh
from ..plugins import find

if TYPE_CHECKING:
    import pluggy

    from ..contracts import Dataset, Draw


class Phase(BaseModel):
    """Until `until` (a share of the run): clips of `frames` frames, cropped to `size` pixels square, `batch` of them (0: the run's)."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    until: float = Field(gt=0)
    frames: int = Field(gt=0)
    size: int = Field(gt=0)
    batch: int = Field(0, ge=0)


class VAESettings(BaseModel):
    """vae: the part by name; init: `random` or `pretrained`; architecture: fields of its config to change.

    l1, l2, kl: weights of the loss
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
    kl: float = Field(3e-6, ge=0)
    statistics: int = Field(256, gt=0)
    validation: int = Field(16, gt=0)


@dataclass(frozen=True)
class VAEBatch:
    """Crops `[B, 3, T, H, W]`, and the random numbers of the posterior of each."""

    video: Tensor
    generators: list[torch.Generator]


class VAEObjective:
    """Trains one VAE on crops of clips; see `wan_train.contracts.Objective`."""

    def __init__(self, settings: dict[str, Any], dataset: Dataset, folder: Path, device: str, pm: pluggy.PluginManager) -> None:
        self.settings = read_settings(VAESettings, settings, "objective.settings")
        self.dataset, self.device = dataset, device
        self.vae = fresh(find("wan_vaes", self.settings.vae, pm), self.settings.init, self.settings.architecture, device)
        self.modules: dict[str, nn.Module] = {"vae": self.vae}
        clips = dataset.video([0])
        check_clips(clips, self.vae.spec.stride, *clips.shape[2:])  # previews are of whole clips
        for phase in self.settings.phases:
            check_clips(clips, self.vae.spec.stride, phase.frames, phase.size, phase.size)

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Muon may train the convolutions inside the two halves; the first and the last of each stay with AdamW."""
        named = list(self.vae.named_parameters())
        inner = [
            param for name, param in named if (".levels." in name or ".middle." in name) and param.ndim > 3 and not name.endswith("gamma")
        ]
        chosen = {id(param) for param in inner}
        return [{"params": inner, "muon": True}, {"params": [param for _, param in named if id(param) not in chosen]}]

    def prepare(self) -> None:
        """Nothing is encoded once: a VAE trains on pixels."""

    @property
    def samples(self) -> int:
        return len(self.dataset)

    def batch(self, samples: Sequence[int], draw: Draw, progress: float) -> VAEBatch:
        """Random crops in time and space of the clips, as the phase at `progress` says."""
        phase = self.phase(progress)
        crops = []
        for sample, clip in zip(samples, self.dataset.video(samples), strict=True):
            generator = draw(sample, "crop")
            spans = zip(clip.shape[1:], (phase.frames, phase.size, phase.size), strict=True)
            t, y, x = (int(torch.randint(have - want + 1, (), generator=generator)) for have, want in spans)
            crops.append(clip[:, t : t + phase.frames, y : y + phase.size, x : x + phase.size])
        return VAEBatch(torch.stack(crops), [draw(sample, "posterior") for sample in samples])

    def batch_size(self, given: int, progress: float) -> int:
        """Samples of a step: those of the phase, where it says how many."""
        return self.phase(progress).batch or given

    def phase(self, progress: float) -> Phase:
        return next(phase for phase in self.settings.phases if progress < phase.until or phase is self.settings.phases[-1])

    def losses(self, batch: VAEBatch) -> tuple[Tensor, dict[str, Tensor]]:
        settings, video = self.settings, batch.video.to(self.device)
        output, mean, logvar = self.vae.reconstruct(video, batch.generators)
        difference = (output.float() - video).flatten(1)
        l1, l2 = difference.abs().mean(1), difference.square().mean(1)
        kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).flatten(1).mean(1) if logvar is not None else torch.zeros_like(l1)
        losses = settings.l1 * l1 + settings.l2 * l2 + settings.kl * kl
        return losses, {"l1": l1.detach(), "kl": kl.detach(), "psnr": _psnr(l2.detach())}

    @torch.no_grad()
    def preview(self, modules: dict[str, nn.Module]) -> tuple[Tensor, dict[str, float]]:
        """Validation clips above their reconstructions, and the mean PSNR in dB over whole clips."""
        vae: Any = modules["vae"]
        indices = list(range(len(self.dataset), len(self.dataset) + self.settings.validation))  # never drawn in training
        video = self.dataset.video(indices)
        output = torch.cat([vae.decode(vae.encode(clip[None].to(self.device))).cpu() for clip in video])
        psnr = torch.stack([_psnr((a - b).square().mean()) for a, b in zip(output, video, strict=True)]).mean()
        return torch.cat([video[:3], output[:3]]), {"val_psnr": psnr.item()}

    def export(self, modules: dict[str, nn.Module], folder: str) -> None:
        vae: Any = modules["vae"]
        indices = range(self.settings.statistics)
        vae.fit_normaliser(self.dataset.video([index]).to(self.device) for index in indices)
        vae.half().save_pretrained(Path(folder) / "vae")


def _psnr(mean_square: Tensor) -> Tensor:
    return 10 * torch.log10(4 / mean_square)  # the peak of [-1, 1] is 2

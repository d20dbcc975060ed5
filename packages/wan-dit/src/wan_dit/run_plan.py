"""What a whole run takes, phase by phase: text encoder, backbones and VAE, with each way to offload and quantise. Imports no torch.

The phases are those of `Pipeline`: without offload every part stays once it is loaded, with it the text encoder goes before the
backbone comes, and the backbone before the video is decoded.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from .config import DiTConfig
from .plan import Operations, Weights, context_bytes, operations, parameters, weights, work_bytes

OFFLOADS = ("none", "model", "blocks", "stream")
QUANTISATIONS = (None, "int8", "fp8")
IDLE = 250_000_000  # bytes: what glibc keeps between tensors below 32 MB, which it does not map by themselves, at most as much as they are


@dataclass(frozen=True)
class Rates:
    """Floating-point operations a second of matrix products and of attention."""

    products: float
    attention: float


@dataclass(frozen=True)
class Demand:
    """Bytes that a part takes: its weights, the most beside them while it works, and its weights where they stay in their file.

    streamed: None for a part that has to be read whole
    """

    weights: int = 0
    work: int = 0
    streamed: int | None = None


@dataclass(frozen=True)
class Phase:
    """Bytes in memory in a phase of a run: weights of all parts that are there, keys and values of the context, what the work takes."""

    name: str
    weights: int
    context: int
    work: int

    @property
    def memory(self) -> int:
        return self.weights + self.context + self.work


@dataclass(frozen=True)
class RunPlan:
    """A run of one size and length.

    backbones: one, or two experts of the same architecture
    others: `text_encoder`, `image_encoder`, `vae` -> what they take; those that are known
    count: tokens; guided: whether there is a second forward a step, of the negative prompt; on_cpu: whether it is run on the CPU
    """

    backbones: tuple[DiTConfig, ...]
    others: dict[str, Demand]
    count: int
    dtype: str
    guided: bool
    on_cpu: bool
    offload: str = "none"
    quantise: str | None = None

    def phases(self) -> list[Phase]:
        """In the order in which they come; of two experts the larger one."""
        config = self.backbones[0]
        text, images, vae = (self.others.get(part, Demand()) for part in ("text_encoder", "image_encoder", "vae"))
        if self.offload == "stream" and text.streamed is not None:
            text = replace(text, weights=text.streamed)
        backbone = self.backbone_weights().device
        context = context_bytes(config, self.dtype, guided=self.guided)
        work = work_bytes(config, self.dtype, self.count, quantise=self.quantise)
        work += min(work, IDLE) if self.on_cpu else 0
        stays = self.offload == "none"
        behind = text.weights + images.weights if stays else 0
        found = [Phase("text", text.weights, 0, text.work)]
        if images.weights:
            found.append(Phase("images", images.weights + vae.weights + (text.weights if stays else 0), 0, images.work))
        found.append(Phase("denoising", behind + vae.weights + backbone * (len(self.backbones) if stays else 1), context, work))
        left = behind + (backbone * len(self.backbones) if stays else 0)
        found.append(Phase("decoding", left + vae.weights, 0, vae.work))
        return found

    def backbone_weights(self) -> Weights:
        """Of one backbone."""
        return weights(self.backbones[0], self.dtype, offload=self.offload, quantise=self.quantise, on_cpu=self.on_cpu)

    @property
    def memory(self) -> int:
        """The most bytes on the device."""
        return max(phase.memory for phase in self.phases())

    @property
    def parameters(self) -> int:
        """Of all backbones."""
        return sum(parameters(config).total for config in self.backbones)

    @property
    def brought(self) -> int:
        """Bytes of weights brought to the device in a step."""
        return (1 + self.guided) * self.backbone_weights().brought

    def operations(self) -> Operations:
        """Of one step, and (`context`) of the prompts before the first."""
        once, times = operations(self.backbones[0], self.count), 1 + self.guided
        return Operations(times * once.products, times * once.attention, times * once.context)

    def choices(self) -> list[RunPlan]:
        """The same run with every way to offload and quantise."""
        return [replace(self, offload=offload, quantise=quantise) for offload in OFFLOADS for quantise in QUANTISATIONS]

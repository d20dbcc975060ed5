"""The adversary of a VAE: a discriminator over space and time, and both sides of the game in one loss (report, section 4.1.2)."""

from __future__ import annotations

from itertools import pairwise
from math import gcd
from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

KERNEL, PADDING = (3, 4, 4), (1, 1, 1)
LARGEST = 1e4  # of what the generator's gradient is multiplied by, as in VQGAN


class DiscriminatorSettings(BaseModel):
    """base_dim: width of the first level, doubled at each of `levels`, up to 8 times; scale: share of the learning rate of AdamW.

    judges: `single` clips, each of which it calls real or not; or a `pair`, a clip and its reconstruction in either order, of which it
    says which is which, as the reconstruction GAN of LTX-Video (arXiv 2501.00103)
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    base_dim: int = Field(default=64, gt=0)
    levels: int = Field(default=3, gt=0)
    scale: float = Field(default=1.0, gt=0)
    judges: Literal["single", "pair"] = "single"

    def build(self) -> Discriminator:
        """One with fresh weights; a pair is concatenated over channels."""
        return Discriminator(self.base_dim, self.levels, channels=6 if self.judges == "pair" else 3)


class Discriminator(nn.Module):
    """PatchGAN in 3D: videos `[B, C, T, H, W]` to logits `[B, 1, T', H', W']`, above 0 where the surroundings of a place look real.

    Each level halves height and width, and all but the first halve time; one frame stays one. The norms are of each sample by itself.
    Of a pair, C = 6, the logits are above 0 where the first of it looks like the real one.
    """

    def __init__(self, base_dim: int = 64, levels: int = 3, channels: int = 3) -> None:
        super().__init__()
        widths = [base_dim * min(2**i, 8) for i in range(levels)]
        layers: list[nn.Module] = [nn.Conv3d(channels, base_dim, KERNEL, stride=(1, 2, 2), padding=PADDING), nn.LeakyReLU(0.2)]
        for dim, out_dim in pairwise(widths):
            layers.append(nn.Conv3d(dim, out_dim, KERNEL, stride=2, padding=PADDING, bias=False))
            layers += [nn.GroupNorm(gcd(8, out_dim), out_dim), nn.LeakyReLU(0.2)]
        # one frame at a time: with a kernel of 3 over 2 padded frames, oneDNN gives wrong gradients in bf16
        self.layers = nn.Sequential(*layers, nn.Conv3d(widths[-1], 1, (1, 3, 3), padding=(0, 1, 1)))

    def forward(self, video: Tensor) -> Tensor:
        logits: Tensor = self.layers(video)
        return logits.float()


def adversarial(
    discriminator: nn.Module, video: Tensor, output: Tensor, reconstruction: Tensor, pair: bool = False
) -> tuple[Tensor, Tensor]:
    """The losses of both sides, `[B]` each: of the VAE, -D(output), and of the discriminator, the hinge loss.

    video, output: clips and their reconstructions `[B, 3, T, H, W]`
    reconstruction: the rest of the loss, `[B]`, as far as it depends on `output`
    pair: D is shown both at once, in either order, and says how real the first of them looks. The VAE's loss is then
    (D(video, output) - D(output, video)) / 2, which is 0 where D cannot tell them
    One backward pass serves both: the first has gradients for what made `output` alone, the second for the discriminator alone. The
    first one's gradient is scaled, clip by clip, to the norm of that of `reconstruction`. That is VQGAN's adaptive weight (arXiv
    2012.09841), taken at the pixels as EnCodec's balancer takes it (arXiv 2210.13438), and for each clip, so that it is the same in any
    parallel layout. The value is not scaled: it stays of one order, and a jump in it tells something.
    """
    shown = output.detach().requires_grad_()
    judged = [torch.cat(both, dim=1) for both in ((shown, video), (video, shown))] if pair else [shown, video]
    fake, real = (discriminator(clips).flatten(1) for clips in judged)
    generator = 0.5 * (real - fake).mean(1) if pair else -fake.mean(1)
    (pull,) = torch.autograd.grad(generator.sum(), shown, retain_graph=True)
    (other,) = torch.autograd.grad(reconstruction.sum(), output, retain_graph=True)
    norm, wanted = (gradient.flatten(1).norm(dim=1) for gradient in (pull, other))
    scale = (wanted / norm.clamp_min(1e-12)).clamp_max(LARGEST)
    along = (output * pull).flatten(1).sum(1) * scale  # its gradient is the scaled pull
    return generator.detach() + (along - along.detach()), 0.5 * (F.relu(1 + fake).mean(1) + F.relu(1 - real).mean(1))

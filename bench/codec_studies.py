"""The studies of docs/codecs.md: what is compared, on what data, and how trained VAEs are measured; run by codecs.py."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from wan_train.data.natural import Natural
from wan_vae.metrics import psnr, ssim

RUNS, CLIPS = Path("runs/codecs"), 24
PICTURES, COUNT = RUNS / "pictures", 3000
WAN = {"base_dim": 16, "decoder_base_dim": 16, "z_dim": 32, "num_res_blocks": 1, "latent_space": "study"}
DEEP = {
    "z_dim": 32, "encoder_dims": [16, 32, 64, 64, 64, 64], "decoder_dims": [16, 32, 64, 64, 64, 64], "encoder_depths": [0, 1, 1, 1, 1, 1],
    "decoder_depths": [0, 1, 1, 1, 1, 1], "latent_space": "study",
}  # fmt: skip
DECODER = ["decoder_input", "decoder", "decoder_head"]
OPTIMISER = {"name": "muon", "lr": 1.5e-3, "muon_lr": 0.015, "schedule": "cosine", "hold": 0.2, "final": 0.02, "warmup": 50}
GENTLE = {**OPTIMISER, "lr": 2e-4, "muon_lr": 2e-3}  # for what is trained already
Measure = Callable[[Any, str], dict[str, float]]


@dataclass(frozen=True)
class Study:
    """What is compared: settings of the run, and of each arm besides.

    measure: takes a trained VAE and the name of its arm; reading: what the figures said
    """

    title: str
    question: str
    reading: str
    data: dict[str, Any]
    run: dict[str, Any]
    objective: dict[str, Any]
    arms: dict[str, dict[str, Any]]
    measure: Measure


def films(*lengths: int) -> Measure:
    """PSNR and SSIM of clips of 64 pixels, by length in frames."""
    return lambda vae, arm: {key: value for frames in lengths for key, value in quality(vae, f"{frames} frames", clips(frames, 64)).items()}


def pictures(vae: Any, arm: str) -> dict[str, float]:
    """Of unseen pictures of 256 pixels, and of their middle 64, as training sees them."""
    whole = clips(1, 256)
    return quality(vae, "64 px", whole[..., 96:160, 96:160]) | quality(vae, "256 px", whole)


def with_noise(vae: Any, arm: str) -> dict[str, float]:
    """PSNR where latents are mixed with noise, as those of a backbone are that has not quite arrived.

    A decoder that was trained to be told how much noise there is, is told; others are told 0, which those that were not conditioned do
    not heed.
    """
    given, found = clips(17, 64), {}
    latents = torch.cat([vae.encode(clip[None]) for clip in given])
    noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(0))
    for share in (0.0, 0.05, 0.1, 0.2):
        vae.config = vae.config.model_copy(update={"decode_timestep": share * (arm == "told"), "decode_noise_scale": 0.0})
        made = torch.cat([vae.decode(one[None]) for one in (1 - share) * latents + share * noise])
        found[f"noise {share:g}, dB"] = of_each(psnr, made, given)
    return found


def clips(frames: int, size: int) -> Tensor:
    """Clips that no run has seen, `[N, 3, frames, size, size]`."""
    return Natural(seed=99, frames=frames, size=(size, size)).video(range(CLIPS))


def quality(vae: Any, of: str, given: Tensor) -> dict[str, float]:
    made = torch.cat([vae.decode(vae.encode(clip[None])) for clip in given])
    return {f"{of}, dB": of_each(psnr, made, given), f"{of}, SSIM": of_each(ssim, made, given)}


def draw_pictures() -> None:
    """Stills of `natural` at 256 pixels as files: drawing them anew would take most of a step."""
    made = PICTURES.with_suffix(".part")
    made.mkdir(parents=True, exist_ok=True)
    for index in range(COUNT):
        picture = Natural(frames=1, size=(256, 256)).video([index])[0, :, 0]
        pixels = picture.add(1).mul(127.5).round().byte().permute(1, 2, 0)
        Image.fromarray(pixels.numpy()).save(made / f"{index:05}.png", compress_level=1)
    made.rename(PICTURES)


def of_each(metric: Callable[[Tensor, Tensor], Any], made: Tensor, clips: Tensor) -> float:
    return mean(float(metric(a[None], b[None])) for a, b in zip(made, clips, strict=True))


def phase(until: float, frames: int, size: int, **more: Any) -> dict[str, Any]:
    return {"until": until, "frames": frames, "size": size, **more}


STUDIES = {
    "residual": Study(
        "Residual down- and upsampling, and chunks",
        "16x16x4 pixels to a latent of 32 channels. `residual` adds shortcuts without weights to `plain` (DC-AE, Wan2.2); `chunks` lets "
        "the convolutions of `residual` see both ways within two latents (DC-AE-V).",
        "Neither for nor against: where both learn, `plain` is as good. One of its three runs never left the mean colour; in the next "
        "study that happened to one with shortcuts, so it says nothing of either. `chunks` is ahead of `residual` on clips longer "
        "than those it was trained on, behind on others, by less than seeds differ.",
        {"name": "natural", "settings": {"length": 20_000, "frames": 9}},
        {"steps": 700, "batch_size": 2, "preview_every": 70},
        {"vae": "residual-f16t4", "phases": [phase(1.0, 9, 64)]},
        {
            name: {"architecture": {**WAN, "dim_mult": [1, 2, 2, 2], "temporal_downsample": [False, True, True], "patch_size": 2, **own}}
            for name, own in {
                "plain": {"residual": False}, "residual": {"residual": True}, "chunks": {"residual": True, "chunk": 2},
            }.items()
        },
        films(9, 25),
    ),
    "residual-f32": Study(
        "Residual levels at four times the compression",
        "The same at 32x32x8 pixels to a latent of 64 channels, without chunks: shortcuts are said to matter more the deeper a codec is.",
        "Neither for nor against: the best two runs with shortcuts have 17.2 and 16.8 dB, those without 16.9 and 16.9. One with shortcuts "
        "never left the mean colour, and one without was slow to. What DC-AE shows at such compression takes longer training than this.",
        {"name": "natural", "settings": {"length": 20_000, "frames": 17}},
        {"steps": 700, "batch_size": 1, "preview_every": 70},
        {"vae": "residual-f32t8", "phases": [phase(1.0, 17, 64)]},
        {
            name: {"architecture": {
                **WAN, "z_dim": 64, "dim_mult": [1, 2, 2, 2, 4], "temporal_downsample": [False, True, True, True], "patch_size": 2, **own
            }}
            for name, own in {"plain": {"residual": False}, "residual": {"residual": True}}.items()
        },
        films(17, 33),
    ),
    "adapted": Study(
        "Adaptation to a resolution that was not trained on",
        "A DC-AE, 32x32 pixels to a latent of 32 channels, on pictures of 256 pixels. `low` sees crops of 64 throughout. The others "
        "see them for 70 % of the run. Then `adapted` goes through DC-AE's two other phases: the layers around the latents learn at 256 "
        "pixels, and the last ones at 64 with an adversary, which PSNR and SSIM cannot judge; `no adversary` does so without it. `all of "
        "it` learns at 256 pixels in every layer instead. A step has as many pixels in all phases. Curves are of whole pictures.",
        "The penalty that DC-AE speaks of is there: `low` loses 13 dB from its own pictures to larger ones. Its phases win back 6 dB "
        "of them, and give up 4 dB at 64 pixels. Learning in every layer wins back 10 dB and gives up 3: at this size decoupling is "
        "the weaker cure. What it is for, large batches that fit into memory and an adversary that sees small pictures only, was not "
        "measured here.",
        {"name": "folder", "settings": {"path": str(PICTURES), "size": [256, 256], "frames": 1, "captions": "optional", "holdout": 16}},
        {"steps": 1200, "batch_size": 16, "preview_every": 120},
        {"vae": "dc-ae-f32c32-in-1.0", "architecture": DEEP},
        {
            "low": {"phases": [phase(1.0, 1, 64)]},
            "adapted": {"phases": [
                phase(0.7, 1, 64), phase(0.85, 1, 256, batch=1, trains=["encoder_head", "decoder_input"]),
                phase(1.0, 1, 64, trains=["decoder_head"], adversary=0.5),
            ]},
            "no adversary": {"phases": [
                phase(0.7, 1, 64), phase(0.85, 1, 256, batch=1, trains=["encoder_head", "decoder_input"]),
                phase(1.0, 1, 64, trains=["decoder_head"]),
            ]},
            "all of it": {"phases": [phase(0.7, 1, 64), phase(1.0, 1, 256, batch=1)]},
        },
        pictures,
    ),
    "diffusion": Study(
        "A decoder that takes noise out",
        "The decoder of the built-in VAE goes on learning: `plain` as it is; `noise` with 0 to 0.2 of its latents given way to noise; "
        "`told` the same, and told how much (the report's VAE-D, LTX-Video). All decode latents with shares of noise, of which `told` "
        "alone is told the exact one. The two have more parameters, as a decoder that can be told has; in `noise` those see a constant. "
        "Curves are of the share that `decode` mixes in by itself, 0.025 where there is noise in training.",
        "For it: `told` is ahead of `plain` by 0.5, 1.4 and 2.3 dB at noise of 0.05, 0.1 and 0.2, and 0.2 dB behind without. Noise in "
        "training alone brings 1.3 and 1.7 dB at 0.1 and 0.2, and costs 1.7 dB without: being told is what keeps clean latents clean.",
        {"name": "natural", "settings": {"length": 20_000, "frames": 17}},
        {"steps": 600, "batch_size": 2, "preview_every": 60, "optimiser": GENTLE},
        {"vae": "tiny", "init": "pretrained", "phases": [phase(1.0, 17, 64, trains=DECODER)]},
        {"plain": {}, "noise": {"vae": "untold_vae:untold"}, "told": {"architecture": {"timestep_conditioning": True}}},
        with_noise,
    ),
}  # fmt: skip

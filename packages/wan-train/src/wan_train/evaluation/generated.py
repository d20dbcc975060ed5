"""What a model makes of the shapes prompts, read from the pixels of its clips, and what bounds it: the evaluator and the VAE."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from tqdm import tqdm

from ..data.captions import evaluation_prompts
from ..data.shapes import Shapes
from ..plugins import find, plugin_manager
from .shapes import Report, accuracy_on_true_clips, evaluate

if TYPE_CHECKING:
    from wan_dit.setup import BackboneSetup

    from ..plugins import PluginManager

Row = dict[str, Any]


def evaluate_model(
    model: str, count: int = 200, seed: int = 0, pm: PluginManager | None = None, setup: BackboneSetup | None = None, **parts: Any
) -> list[Row]:
    """Rates over `count` prompts, half of them of held-out combinations, each generated with the model's default settings.

    setup, parts: what is done to the backbone, and parts in place of the model's own, as `wan_dit.Pipeline` takes them

    The seeds of the clips are seed, seed + 1, ... Prompts never change: they are those of `evaluation_prompts` with seed 0.
    Raises ValueError where count is below 2, LookupError for an unknown model.
    """
    from wan_dit import Pipeline

    if count < 2:
        raise ValueError(f"count is {count}: give 2 or more, one of a seen and one of a held-out combination")
    pipe = Pipeline(model, pm=pm, setup=setup, **parts)
    prompts = [*evaluation_prompts(count - count // 2), *evaluation_prompts(count // 2, held_out=True)]
    clips = [pipe(prompt, seed=seed + i).video for i, prompt in enumerate(tqdm(prompts, desc="clips", disable=None))]
    return list(_rows(evaluate(torch.cat(clips), prompts)))


def evaluate_vae(vae: str = "tiny", count: int = 240, pm: PluginManager | None = None) -> list[Row]:
    """The evaluator on true clips and on their reconstructions, and the mean PSNR in dB, on clips of held-out combinations.

    Raises ValueError where count is below 1.
    """
    if count < 1:
        raise ValueError(f"count is {count}: give 1 or more")
    model = find("wan_vaes", vae, pm or plugin_manager()).load()
    dataset = Shapes(split="heldout", seed=7)
    video, prompts = dataset.video(range(count)), [_named(dataset, index) for index in range(count)]
    output = torch.cat([model.decode(model.encode(clip[None])) for clip in tqdm(video, desc="clips", disable=None)])
    psnr = (10 * torch.log10(4 / (output - video).square().mean(dim=(1, 2, 3, 4)))).mean().item()
    true, coded = accuracy_on_true_clips(count).overall, evaluate(output, prompts).overall
    rows = [{"clips": "true", **_shares(true)}, {"clips": "reconstructed", **_shares(coded)}]
    return [{**row, "psnr": value} for row, value in zip(rows, ("inf", round(psnr, 2)), strict=True)]


def _named(dataset: Shapes, index: int) -> str:
    scene = dataset.scenes([index])[0]
    return f"a {scene.colour} {scene.shape} moving {scene.motion} on a {scene.background} background"


def _rows(report: Report) -> Iterator[Row]:
    for name, rates in (("all", report.overall), ("seen", report.seen), ("held out", report.held_out)):
        if rates:
            yield {"prompts": name, **_shares(rates)}


def _shares(rates: Any) -> Row:
    shares = {"count": rates.count}
    for name in ("colour", "shape", "motion", "background", "all_right"):
        value = getattr(rates, name)
        shares[name] = None if value is None else round(value, 4)
    return shares

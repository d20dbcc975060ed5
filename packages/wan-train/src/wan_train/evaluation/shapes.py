"""What a clip of the shapes world shows, read from its pixels: colour, shape, motion and background, against what its prompt asks for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from ..data.captions import Wanted, caption, parse
from ..data.scenes import BACKGROUNDS, COLOURS, MOTIONS, PROMPT, SHAPES, generator, held_out, sample_scenes
from ..data.shapes import coverage, render

_CHUNK = 32
_PATCH = 56  # side in pixels of the square that shapes are compared in, at 64 pixels a side of the frame
_CONTRAST = 0.3  # RGB distance (0 to sqrt 3) from the background below which nothing is seen
_GROUND = 0.4  # RGB distance from a background's colour beyond which it is none
_PALETTE = 0.35  # the same for colours
_STEP = 0.09  # shortest path of a moving shape between the means of the first and last third, as a share of the shorter side
_LIKENESS = 0.75  # least overlap (intersection over union) with an outline
_INK = 0.97  # this share of all pixels is farther from ink than the shape's core: the smallest star covers 5 %
_FAINT = 0.2  # share of ink below which a pixel is background


@dataclass(frozen=True)
class Reading:
    """What a clip shows; None where it shows none of the known ones."""

    colour: str | None
    shape: str | None
    motion: str | None
    background: str | None


@dataclass(frozen=True)
class Rates:
    """Shares of `count` clips that are right; `background` counts the `named` prompts that name one and is None without any.

    `all_right` takes colour, shape, motion and, where named, background.
    """

    count: int
    named: int
    colour: float
    shape: float
    motion: float
    background: float | None
    all_right: float


@dataclass(frozen=True)
class Report:
    """Rates over all clips, over those of trained and those of held-out combinations (None without any), and every reading."""

    overall: Rates
    seen: Rates | None
    held_out: Rates | None
    readings: tuple[Reading, ...]

    def figures(self) -> dict[str, float]:
        """The rates as one flat table, for a log."""
        parts = {"": self.overall, "seen_": self.seen, "held_out_": self.held_out}
        names = ("colour", "shape", "motion", "background", "all_right")
        table = {prefix + name: getattr(rates, name) for prefix, rates in parts.items() if rates for name in names}
        return {name: value for name, value in table.items() if value is not None}


def evaluate(videos: Tensor | Sequence[Tensor], prompts: Sequence[str]) -> Report:
    """How many clips show what their prompts ask for.

    `videos`: [N, 3, T, H, W] or N clips [3, T, H, W] or [T, 3, H, W], float in [-1, 1]. ValueError where the counts differ or a
    prompt does not name one colour, shape and motion.
    """
    if len(videos) != len(prompts) or not prompts:
        raise ValueError(f"as many clips as prompts are needed, and at least one: got {len(videos)} clips and {len(prompts)} prompts")
    wanted = [parse(prompt) for prompt in prompts]
    readings = read(videos)
    pairs = list(zip(wanted, readings, strict=True))
    unseen = [held_out(want["colour"], want["shape"], want["motion"]) for want in wanted]
    seen_pairs = [pair for pair, out in zip(pairs, unseen, strict=True) if not out]
    unseen_pairs = [pair for pair, out in zip(pairs, unseen, strict=True) if out]
    return Report(
        overall=_rates(pairs),
        seen=_rates(seen_pairs) if seen_pairs else None,
        held_out=_rates(unseen_pairs) if unseen_pairs else None,
        readings=tuple(readings),
    )


def accuracy_on_true_clips(n: int = 480, seed: int = 0) -> Report:
    """The evaluator on rendered clips, whose content is known: every rate would be 1 if it never erred."""
    scenes = sample_scenes(n, seed, "all")
    prompts = [caption(scene, generator(seed, i, PROMPT), background=True) for i, scene in enumerate(scenes)]
    return evaluate(render(scenes), prompts)


def _rates(pairs: Sequence[tuple[Wanted, Reading]]) -> Rates:
    colour = [want["colour"] == got.colour for want, got in pairs]
    shape = [want["shape"] == got.shape for want, got in pairs]
    motion = [want["motion"] == got.motion for want, got in pairs]
    background = [want["background"] in (None, got.background) for want, got in pairs]
    named = [want["background"] is not None for want, _ in pairs]
    right = [all(parts) for parts in zip(colour, shape, motion, background, strict=True)]
    count = len(pairs)
    return Rates(
        count=count,
        named=sum(named),
        colour=sum(colour) / count,
        shape=sum(shape) / count,
        motion=sum(motion) / count,
        background=1 - background.count(False) / sum(named) if any(named) else None,
        all_right=sum(right) / count,
    )


def read(videos: Tensor | Sequence[Tensor]) -> list[Reading]:
    """What each clip shows. `videos` as for `evaluate`; clips of one call have one shape."""
    readings: list[Reading] = []
    for start in range(0, len(videos), _CHUNK):
        readings += _read(torch.stack([_channels_first(clip) for clip in videos[start : start + _CHUNK]]))
    return readings


def _channels_first(clip: Tensor) -> Tensor:
    if clip.ndim == 4 and clip.shape[0] == 3:
        return clip.detach().float().cpu()
    if clip.ndim == 4 and clip.shape[1] == 3:
        return clip.detach().float().cpu().transpose(0, 1)
    raise ValueError(f"a clip must be [3, T, H, W] or [T, 3, H, W], got {list(clip.shape)}")


def _read(video: Tensor) -> list[Reading]:
    """Readings of clips [N, 3, T, H, W]."""
    rgb = ((video + 1) / 2).nan_to_num().clamp(0, 1)
    ground = _border_median(rgb)
    offset = rgb - ground[..., None, None, None]
    distance = offset.square().sum(1).sqrt()
    peak = distance.flatten(1).quantile(_INK, dim=1)
    core = (distance > 0.8 * peak[:, None, None, None]).float()[:, None]
    ink = (rgb * core).sum((2, 3, 4)) / core.sum((2, 3, 4)).clamp(min=1)
    mask = _mask(offset, ink - ground)
    weight, centre = _centroids(mask)
    colour, background = _nearest(ink, COLOURS, _PALETTE), _nearest(ground, BACKGROUNDS, _GROUND)
    shape, motion = _shapes(mask, weight, centre), _motions(weight, centre, min(video.shape[-2:]))
    return [
        Reading(colour[i], shape[i], motion[i], background[i]) if seen else Reading(None, None, None, background[i])
        for i, seen in enumerate((peak > _CONTRAST).tolist())
    ]


def _border_median(rgb: Tensor) -> Tensor:
    """[N, 3]: the median over the outermost pixels of all frames."""
    edges = (rgb[..., 0, :], rgb[..., -1, :], rgb[..., :, 0], rgb[..., :, -1])
    return torch.cat([edge.flatten(2) for edge in edges], 2).median(2).values


def _nearest(rgb: Tensor, palette: dict[str, tuple[int, int, int]], limit: float) -> list[str | None]:
    distance, index = torch.cdist(rgb, torch.tensor(list(palette.values())) / 255).min(1)
    names = list(palette)
    return [names[i] if d <= limit else None for i, d in zip(index.tolist(), distance.tolist(), strict=True)]


def _mask(offset: Tensor, ink: Tensor) -> Tensor:
    """[N, T, H, W] in [0, 1]: how much of each pixel is ink rather than background; faint traces are taken as background."""
    share = torch.einsum("nc...,nc->n...", offset, ink) / ink.square().sum(1).clamp(min=1e-6)[:, None, None, None]
    return torch.where(share > _FAINT, share.clamp(max=1), 0.0)


def _centroids(mask: Tensor) -> tuple[Tensor, Tensor]:
    """The area of each frame's mask, [N, T], and its centre of gravity (x, y) in pixels, [N, T, 2]."""
    weight = mask.sum((2, 3))
    x = (mask.sum(2) * (torch.arange(mask.shape[3]) + 0.5)).sum(2)
    y = (mask.sum(3) * (torch.arange(mask.shape[2]) + 0.5)).sum(2)
    return weight, torch.stack((x, y), -1) / weight.clamp(min=1e-6)[..., None]


def _motions(weight: Tensor, centre: Tensor, side: int) -> list[str | None]:
    """From the mean centre of the first third of frames to that of the last; None where it is lost or moves askew."""
    third = max(1, weight.shape[1] // 3)
    ends = [slice(0, third), slice(weight.shape[1] - third, None)]
    typical = weight.median(1).values
    lost = torch.stack([weight[:, end].mean(1) < typical / 4 for end in ends]).any(0)
    first, last = ((centre[:, end] * weight[:, end, None]).sum(1) / weight[:, end, None].sum(1).clamp(min=1e-6) for end in ends)
    steps = {axis: motion for motion, axis in MOTIONS.items()}
    motions: list[str | None] = []
    for (dx, dy), gone in zip(((last - first) / side).tolist(), lost.tolist(), strict=True):
        large, small = max(abs(dx), abs(dy)), min(abs(dx), abs(dy))
        if gone:
            motions.append(None)
        elif large < _STEP:
            motions.append("still")
        elif small > large / 2:
            motions.append(None)
        else:
            motions.append(steps[(round(dx / large), 0) if abs(dx) == large else (0, round(dy / large))])
    return motions


def _shapes(mask: Tensor, weight: Tensor, centre: Tensor) -> list[str | None]:
    """The outline that overlaps most with the mask, averaged over frames along the motion."""
    side = min(mask.shape[-2:])
    present = (weight > weight.median(1).values[:, None] / 4).float()
    patches = (_centred(mask, centre, side) * present[..., None, None]).sum(1) / present.sum(1).clamp(min=1)[:, None, None]
    names, outlines = _templates(side)
    patches = patches.flatten(1)
    total = patches.sum(1)[:, None] + outlines.sum(1)
    apart = torch.cdist(patches, outlines, p=1)
    overlap, index = ((total - apart) / (total + apart).clamp(min=1e-6)).max(1)  # sum of minima over sum of maxima
    return [names[i] if like >= _LIKENESS else None for i, like in zip(index.tolist(), overlap.tolist(), strict=True)]


def _centred(mask: Tensor, centre: Tensor, side: int) -> Tensor:
    """Squares around the centres, [N, T, P, P], from masks [N, T, H, W]: bilinear, zero outside the frame."""
    size = torch.tensor([mask.shape[3], mask.shape[2]])
    reach = round(side * _PATCH / 64) // 2
    steps = torch.arange(-reach, reach) + 0.5
    window = torch.stack(torch.meshgrid(steps, steps, indexing="xy"), -1)
    grid = 2 * (centre[:, :, None, None] + window) / size - 1
    return F.grid_sample(mask.flatten(0, 1)[:, None], grid.flatten(0, 1), align_corners=False).unflatten(0, mask.shape[:2])[:, :, 0]


@lru_cache(maxsize=8)
def _templates(side: int) -> tuple[list[str], Tensor]:
    """Names and outlines [K, P * P] of every shape at radii around those of the scenes, cut out like the masks they are compared with."""
    sizes = [radius * side / 64 for radius in torch.arange(9, 18.5, 0.5).tolist()]
    names = [shape for shape in SHAPES for _ in sizes]
    middle = torch.full((len(names), 1), side / 2)
    masks = coverage(names, middle, middle, torch.tensor(sizes * len(SHAPES)), (side, side))
    return names, _centred(masks, _centroids(masks)[1], side)[:, 0].flatten(1)

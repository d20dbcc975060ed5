"""Numbers of the official transformer, through our official-layout loader."""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from wan_dit import attention, layers, model, rope
from wan_dit.checkpoint import config_of
from wan_dit.contracts import Conditioning
from wan_dit.layouts import names
from wan_dit.model import WanDiT

pytestmark = pytest.mark.golden
FOLDER = Path(os.environ.get("WAN_GOLDEN") or Path(__file__).parent / "golden")
CASES = (
    *("dit_t2v_21", "dit_t2v_22", "dit_t2v_hd128", "dit_i2v_22"),
    *("dit_i2v_21", "dit_i2v_21_clip1280", "dit_flf2v_21", "dit_vace_21"),
)


def hashed(name: str, shape: tuple[int, ...], scale: float, offset: float) -> Tensor:
    """A tensor that is not stored, from the integer hash of its name."""
    x = np.arange(np.prod(shape), dtype=np.uint32) + np.uint32(zlib.crc32(name.encode()))
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):
        x = (x ^ (x >> np.uint32(shift))) * np.uint32(factor)
    k = (x ^ (x >> np.uint32(16))) >> np.uint32(8)
    return torch.from_numpy((offset + scale * (k / 2.0**23 - 1)).astype(np.float32).reshape(shape))


class Case:
    """One golden case: its JSON, its tensors and the model loaded from an official folder with its weights."""

    def __init__(self, name: str, folder: Path) -> None:
        self.about = json.loads((FOLDER / f"{name}.json").read_text())
        self.tensors = load_file(FOLDER / f"{name}.safetensors")
        (folder / "config.json").write_text(json.dumps({"_class_name": "WanModel", **self.about["config"]}))
        weights = {key.removeprefix("weights/"): value for key, value in self.tensors.items() if key.startswith("weights/")}
        if recipe := self.about.get("recipe"):
            with torch.device("meta"):
                bare = WanDiT(config_of(folder, {key: tuple(value.shape) for key, value in weights.items()}))
            shapes = {names(bare.config, "official")[key]: tuple(value.shape) for key, value in bare.state_dict().items()}
            weights |= {key: hashed(key, shapes[key], *numbers) for key, numbers in recipe["tensors"].items()}
        for key, given in self.about.get("recipe_inputs", {}).items():
            self.tensors[key] = hashed(key, tuple(given["shape"]), given["scale"], given["offset"])
        save_file(weights, folder / "diffusion_pytorch_model.safetensors")
        self.model = WanDiT.from_pretrained(folder)

    def value(self, argument: Any) -> Any:
        if isinstance(argument, list):
            return [self.value(item) for item in argument]
        return self.tensors[argument] if isinstance(argument, str) else argument

    def calls(self) -> list[tuple[str, dict[str, Any]]]:
        return [(call["name"], {key: self.value(argument) for key, argument in call["args"].items()}) for call in self.about["calls"]]

    def per_frame(self, t: Tensor, grid: tuple[int, int, int]) -> Tensor | None:
        """Times of tokens `[seq_len]` as one a frame; None where tokens of a frame differ."""
        frames, height, width = grid
        tokens = t[: frames * height * width].view(frames, -1)
        return tokens[:, 0] if bool((tokens == tokens[:, :1]).all()) else None

    def excess(self, velocity: Tensor, name: str) -> float:
        """Largest error as a multiple of what the case tolerates; above 1 fails."""
        expected = self.tensors[name]
        allowed = self.about["tolerance"]["atol"] + self.about["tolerance"]["rtol"] * expected.abs()
        return float(((velocity - expected).abs() / allowed).max())

    @torch.no_grad()
    def worst(self) -> float:
        """The largest excess over all calls whose times are constant in each frame, sample by sample and, on equal grids, as a batch."""
        excesses = []
        for call, args in self.calls():
            grids = [self.model.grid(x[None]) for x in args["x"]]
            t = args["t"].expand(len(grids)) if args["t"].ndim == 1 else args["t"]
            times = [t[i] if t.ndim == 1 else self.per_frame(t[i], grid) for i, grid in enumerate(grids)]
            if any(time is None for time in times):
                continue
            batches = [[i] for i in range(len(grids))] + ([list(range(len(grids)))] if len(set(grids)) == 1 < len(grids) else [])
            for batch in batches:
                velocity = self.run(args, batch, torch.stack([times[i] for i in batch]))
                excesses += [self.excess(velocity[row], f"outputs/{call}/{i}") for row, i in enumerate(batch)]
        assert excesses, "no call of the case was run"
        return max(excesses)

    def run(self, args: dict[str, Any], batch: list[int], timestep: Tensor) -> Tensor:
        stacked = {name: torch.stack([args[name][i] for i in batch]) for name in ("y", "vace_context") if name in args}
        images = None
        if "clip_fea" in args:  # FLF2V has two images a sample
            images = args["clip_fea"].unflatten(0, (len(args["x"]), -1)).flatten(1, 2)[batch]
        given = Conditioning(
            extra_latents=stacked.get("y"),
            image_context=images,
            vace=stacked.get("vace_context"),
            vace_scale=args.get("vace_context_scale", 1.0),
        )
        context = self.model.encode_context([args["context"][i] for i in batch], given)
        return self.model(torch.stack([args["x"][i] for i in batch]), timestep, context, given)


def test_the_integer_recipe_gives_its_check_values() -> None:
    expected = [0.9992163181304932, -0.8565101623535156, -0.4031338691711426, -0.45627450942993164]
    assert hashed("check", (4,), 1.0, 0.0).tolist() == expected


@pytest.mark.parametrize("name", CASES)
def test_velocity_equals_the_official_model(name: str, tmp_path: Path) -> None:
    assert Case(name, tmp_path).worst() <= 1


def test_a_time_for_every_frame_equals_the_official_model(tmp_path: Path) -> None:
    case = Case("dit_ti2v_22", tmp_path)
    differing = [name for name, args in case.calls() if args["t"].ndim == 2 and len(args["x"]) == 1 and args["t"].unique().numel() > 1]
    assert differing, "no call with frames at different times"
    assert case.worst() <= 1


def drop_padding(case: Case, patch: pytest.MonkeyPatch) -> None:
    def without_pads(lengths: list[int], rows: int, text_len: int, device: torch.device) -> Tensor:
        pads = torch.arange(rows) >= torch.tensor(lengths)[:, None]
        return torch.zeros(pads.shape).masked_fill(pads, -torch.inf)[:, None, None]

    patch.setattr(model, "pad_bias", without_pads)


def count_pads_once(case: Case, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(model, "pad_bias", lambda *_: None)


def exact_gelu(case: Case, patch: pytest.MonkeyPatch) -> None:
    case.model.trunk.blocks[0].ffn[1] = nn.GELU()


def norm_per_head(case: Case, patch: pytest.MonkeyPatch) -> None:
    def forward(self: layers.RMSNorm, x: Tensor) -> Tensor:
        heads = x.unflatten(-1, (case.model.config.num_heads, -1))
        return nn.functional.rms_norm(heads, heads.shape[-1:], eps=self.eps).flatten(-2) * self.weight

    patch.setattr(layers.RMSNorm, "forward", forward)


def wrong_rope_split(case: Case, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(rope, "axis_widths", lambda head_dim: (head_dim // 6 * 2, head_dim // 6 * 2, head_dim - head_dim // 6 * 4))


def rotated_halves(case: Case, patch: pytest.MonkeyPatch) -> None:
    def forward(x: Tensor, table: Tensor) -> Tensor:
        real, imag = x.chunk(2, dim=-1)
        return torch.view_as_real(torch.complex(real, imag) * table[:, None]).transpose(-1, -2).flatten(-2)

    patch.setattr(attention, "rotate", forward)


def swapped_sinusoid(case: Case, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(model, "time_sinusoid", lambda t, width: layers.time_sinusoid(t, width).roll(width // 2, -1))


def floored_time(case: Case, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(model, "time_sinusoid", lambda t, width: layers.time_sinusoid(t.floor(), width))


def bf16_time(case: Case, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(model, "time_sinusoid", lambda t, width: layers.time_sinusoid(t.bfloat16(), width))


def no_norm3_bias(case: Case, patch: pytest.MonkeyPatch) -> None:
    nn.init.zeros_(case.model.trunk.blocks[0].norm3.bias)


BUGS = (
    *(drop_padding, count_pads_once, exact_gelu, norm_per_head, wrong_rope_split, rotated_halves),
    *(swapped_sinusoid, floored_time, bf16_time, no_norm3_bias),
)


@pytest.mark.parametrize("plant", BUGS, ids=lambda plant: plant.__name__)
def test_a_planted_bug_breaks_the_golden_case(plant: Callable[..., None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # the case whose head width splits unevenly over the axes, so that a wrong split shows
    case = Case("dit_t2v_22" if plant is wrong_rope_split else "dit_t2v_21", tmp_path)
    plant(case, monkeypatch)
    rope.rope_table.cache_clear()
    try:
        assert case.worst() > 2
    finally:
        rope.rope_table.cache_clear()

"""Rows of the parity page for wan-dit: what the tests of the package assert, measured."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from package_tests import load
from torch import Tensor
from wan_dit.schedulers import DPMpp, UniPC
from wan_dit.sizes import area_size, best_output_size
from wan_vae.testing import difference

Row = list[str]
Pairs = list[tuple[Tensor, Tensor]]
SOLVERS = (("unipc", "UniPC"), ("dpmpp", "DPM-Solver++"))
CONDITIONING = {  # end of an output's name -> what it is
    "y": "masks and latents of I2V and FLF2V",
    "context": "context of VACE, with and without references",
    "model_input_first": "first frame of TI2V in the noise",
    "final_latent": "final latents of the official loops",
}
TRANSFORMERS = (  # test, its parameters, what is compared
    ("test_image_tokens_equal_diffusers", (None, 257), "image tokens (I2V)", "WanTransformer3DModel"),
    ("test_image_tokens_equal_diffusers", (514, 514), "image tokens of two pictures (FLF2V)", "WanTransformer3DModel"),
    ("test_a_time_of_each_token_equals_diffusers", (), "a time of each frame (TI2V)", "WanTransformer3DModel"),
    ("test_vace_equals_diffusers", ((1.0, 1.0),), "VACE", "WanVACETransformer3DModel"),
    ("test_vace_equals_diffusers", ((0.7, 0.2),), "VACE, strengths by block", "WanVACETransformer3DModel"),
)
PIPELINES = (
    ("test_text_to_video", {}, "text to video", "WanPipeline"),
    ("test_two_experts", {}, "text to video, two experts", "WanPipeline"),
    ("test_image_to_video_with_image_tokens", {"last": False}, "image to video with image tokens", "WanImageToVideoPipeline"),
    ("test_image_to_video_with_image_tokens", {"last": True}, "first and last frame to video", "WanImageToVideoPipeline"),
    ("test_image_to_video_of_two_experts", {}, "image to video, two experts", "WanImageToVideoPipeline"),
    ("test_a_first_frame_whose_time_is_zero", {}, "TI2V from a first frame", "WanImageToVideoPipeline"),
    ("test_vace", {"references": 0}, "VACE, video and mask", "WanVACEPipeline"),
    ("test_vace", {"references": 2}, "VACE, video, mask and two references", "WanVACEPipeline"),
)


@dataclass
class Recorded:
    """What tests compare: tensors that are to be near each other, and how many were to be equal."""

    near: list[tuple[Tensor, Tensor, float, float]] = field(default_factory=list)
    equal: int = 0
    wrong: int = 0


@contextmanager
def recorded() -> Iterator[Recorded]:
    """Note every comparison of `torch.testing.assert_close` and `torch.equal`, which compare as before."""
    found, close, equal = Recorded(), torch.testing.assert_close, torch.equal

    def note_close(actual: Tensor, expected: Tensor, *, atol: float, rtol: float) -> None:
        found.near.append((actual, expected, atol, rtol))
        close(actual, expected, atol=atol, rtol=rtol)

    def note_equal(one: Tensor, other: Tensor) -> bool:
        same = equal(one, other)
        found.equal, found.wrong = found.equal + 1, found.wrong + (not same)
        return same

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.testing, "assert_close", note_close)
        patch.setattr(torch, "equal", note_equal)
        yield found


def official_row(name: str, what: str, pairs: Pairs, atol: float, rtol: float) -> Row:
    worst = max(difference(got, expected) for got, expected in pairs)
    used = max(float(((got - expected).abs() / (atol + rtol * expected.abs())).max()) for got, expected in pairs)
    allowed = f"atol {atol:.0e}, rtol {rtol:.0e}" if rtol else f"atol {atol:.0e}"
    return [name, what, f"{worst:.1e}", allowed, f"{used:.0%}"]


def exact_row(name: str, what: str, wrong: int) -> Row:
    return [name, what, f"{wrong} wrong", "exact", "-"]


def golden() -> Iterator[Row]:
    """One row a case of the official code."""
    module = load("wan-dit", "test_dit_golden")
    for name in (*module.CASES, "dit_ti2v_22"):
        with tempfile.TemporaryDirectory() as folder:
            yield official_row(name, "velocity", *velocities(module, name, Path(folder)))
    yield from schedulers()
    yield from conditioning()
    yield from output_sizes()


def velocities(module: ModuleType, name: str, folder: Path) -> tuple[Pairs, float, float]:
    pairs: Pairs = []

    class Noted(module.Case):  # type: ignore[misc, name-defined]
        def excess(self, velocity: Tensor, name: str) -> float:
            pairs.append((velocity, self.tensors[name]))
            return float(super().excess(velocity, name))

    case = Noted(name, folder)
    case.worst()
    return pairs, case.about["tolerance"]["atol"], case.about["tolerance"]["rtol"]


def schedulers() -> Iterator[Row]:
    module = load("wan-dit", "test_dit_scheduler_golden")
    tensors, near = module.TENSORS, module.CASE["tolerance"]
    for solver, label in SOLVERS:
        runs, made = [run for run in module.CASE["runs"] if run["solver"] == solver], module.SOLVERS[solver]()
        wrong = 0
        for run in runs:
            schedule = made.schedule(run["steps"], run["shift"])
            wrong += sum(
                not torch.equal(getattr(schedule, name), tensors[f"outputs/{run['name']}/{name}"]) for name in ("sigmas", "timesteps")
            )
        yield exact_row("schedulers", f"{label}: sigmas and timesteps of {len(runs)} grids", wrong)
        pairs = [(module.trajectory(run), tensors[f"outputs/{run['name']}/trajectory"]) for run in runs]
        yield official_row(
            "schedulers", f"{label}: trajectories of {len(runs)} grids", pairs, near["trajectory_atol"], near["trajectory_rtol"]
        )
    with recorded() as found:
        for run in runs:
            module.test_euler_runs_on_the_official_sampling_sigmas(run)
    pairs = [(got, expected) for got, expected, _, _ in found.near]
    yield official_row("schedulers", f"Euler: sampling sigmas of {len(pairs)} grids", pairs, near["sigmas_atol"], 0)


def conditioning() -> Iterator[Row]:
    """The tests of the case `conditioning`, run with their comparisons noted."""
    module = load("wan-dit", "test_dit_conditioning")
    with recorded() as found:
        for name in ("i2v21_F5", "i2v21_F13", "i2v21_F81"):
            module.test_image_to_video(name)
        module.test_first_and_last_frame()
        module.test_two_experts_from_an_image()
        module.test_two_experts_from_text()
        for name in ("ti2v22_F5", "ti2v22_F13"):
            module.test_a_first_frame_stays_as_it_is(name)
        module.test_the_model_of_first_frames_from_text_alone()
        for name, count in (("vace_norefs", 0), ("vace_2refs", 2)):
            module.test_the_context_of_vace(name, count)
        for name, frames, known in (("animate_mask_1", 17, 1), ("animate_mask_5", 13, 5), ("animate_mask_0", 9, 0)):
            module.test_masks_of_several_known_frames(name, frames, known)
    names = {tensor.untyped_storage().data_ptr(): name for name, tensor in module.TENSORS.items()}
    groups: dict[tuple[str, float, float], Pairs] = {}
    for got, expected, atol, rtol in found.near:
        output = names[expected.untyped_storage().data_ptr()].rpartition("/")[2]
        groups.setdefault((output, atol, rtol), []).append((got, expected))
    yield exact_row("conditioning", f"masks, first noise, times of frames and tokens, pictures: {found.equal} tensors", found.wrong)
    for (output, atol, rtol), pairs in groups.items():
        rounded = "; through a task, whose pictures have 8 bits" if atol > 1e-3 else ""
        yield official_row("conditioning", f"{CONDITIONING[output]}: {len(pairs)}{rounded}", pairs, atol, rtol)


def output_sizes() -> Iterator[Row]:
    module = load("wan-dit", "test_dit_scheduler_golden")
    first, image = module.SIZES["best_output_size"], module.SIZES["i2v_latent_size"]
    wrong = sum(best_output_size((row["w"], row["h"]), row["area"], (row["dw"], row["dh"])) != tuple(row["out_wh"]) for row in first)
    yield exact_row("sizes", f"size of a TI2V video by its picture: {len(first)}", wrong)
    wrong = sum(area_size((row["w"], row["h"]), row["area"], (16, 16)) != (8 * row["lat_w"], 8 * row["lat_h"]) for row in image)
    yield exact_row("sizes", f"size of an I2V video by its picture: {len(image)}", wrong)
    pairs = []
    for case in module.SIZES["get_sampling_sigmas"]:
        sigmas = module.shift_sigmas(module.linear_sigmas(case["steps"]), case["shift"])
        pairs.append((torch.as_tensor(sigmas), torch.tensor(case["sigmas"], dtype=torch.float64)))
    yield official_row("sizes", f"sampling sigmas: {len(pairs)}", pairs, module.SIZES["tolerance"]["sigmas_atol"], 0)


def libraries() -> Iterator[Row]:
    """One row a class of diffusers, or what it is used for."""
    module = load("wan-dit", "test_dit_diffusers")
    worst = max(measured(module, "apart", partial(module.test_velocity_equals_diffusers, seed)) for seed in range(len(module.CONFIGS)))
    yield l2_row("backbone", f"WanTransformer3DModel, {len(module.CONFIGS)} configurations", worst, "1e-05")
    for test, given, what, reference in TRANSFORMERS:
        yield l2_row(f"backbone: {what}", reference, measured(module, "apart", partial(getattr(module, test), *given)), "1e-05")
    yield ["UniPC", "diffusers UniPCMultistepScheduler on the official grid, 36 grids", f"{unipc_difference():.1e}", "0"]
    yield ["DPM-Solver++", "diffusers DPMSolverMultistepScheduler on the official grid, 36 grids", f"{dpm_difference():.1e}", "0"]
    module = load("wan-dit", "test_dit_diffusers_pipelines")
    for test, given, what, reference in PIPELINES:
        worst = measured(module, "off", partial(whole_pipeline, module, test, given))
        yield l2_row(f"final latents: {what}", f"{reference}, same noise, official grid", worst, "1e-04")


def l2_row(part: str, reference: str, worst: float, limit: str) -> Row:
    return [part, f"diffusers {reference}", f"{worst:.1e} (relative L2)", limit]


def measured(module: ModuleType, compare: str, test: Callable[[Path], None]) -> float:
    """The first distance that a test takes with the function `compare` of its module; the later ones are of planted faults."""
    taken: list[float] = []
    original = getattr(module, compare)

    def note(got: Tensor, expected: Tensor) -> float:
        taken.append(original(got, expected))
        return taken[-1]

    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, compare, note)
        test(Path(folder))
    return taken[0]


def whole_pipeline(module: ModuleType, test: str, options: Mapping[str, Any], folder: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        extra = {"monkeypatch": patch} if "last" in options else {}
        getattr(module, test)(module.Models(folder), **options, **extra)


def unipc_difference() -> float:
    module = load("wan-dit", "test_dit_scheduler_adapter")
    worst = 0.0
    for steps, shift in module.GRIDS:
        solver = module.theirs.UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=shift)
        solver.set_timesteps(sigmas=np.linspace(module.SIGMA_MAX, 0, steps + 1)[:-1])
        pairs = zip(module.trajectory(UniPC(), steps, shift), module.plain_trajectory(solver), strict=True)
        worst = max(worst, *(difference(got, expected) for got, expected in pairs))
    return worst


def dpm_difference() -> float:
    module, worst = load("wan-dit", "test_dit_scheduler_adapter"), 0.0
    for steps, shift in module.GRIDS:
        schedule = DPMpp().schedule(steps, shift)
        theirs = module.DiffusersScheduler(module.theirs.DPMSolverMultistepScheduler)  # runs on the schedule that it is started with
        pairs = zip(*(module.along(solver, schedule) for solver in (DPMpp(), theirs)), strict=True)
        worst = max(worst, *(difference(got, expected) for got, expected in pairs))
    return worst

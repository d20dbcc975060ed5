"""Caches keep their contract, leave out what they say, and change little; caches that are wrong in one way each are found out."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from wan_dit import Pipeline, load_backbone
from wan_dit.caching import (
    CacheRun,
    CfgGate,
    FirstBlockCache,
    MagCache,
    TeaCache,
    Trial,
    calibrate,
    find_cache,
    measured_error,
    measured_run,
    relative_error,
    write_ratios,
)
from wan_dit.caching.tables import MAGCACHE, TEACACHE
from wan_dit.config import TINY
from wan_dit.contracts import Conditioning
from wan_dit.guidance import guided_velocity
from wan_dit.model import WanDiT
from wan_dit.plugins import CacheSpec, PluginManager, find, hookimpl
from wan_dit.testing import CacheContract


class TestTeaCache(CacheContract):
    plugin = "teacache:threshold=0.3,first=2"
    off = "teacache:threshold=0,coefficients=wan2.1-i2v-14b-720p"  # whose estimate is below zero for small changes


class TestMagCache(CacheContract):
    plugin, off = "magcache:ratios=wan2.1-t2v-1.3b,most=3", "magcache:ratios=wan2.1-t2v-1.3b,threshold=0"


class TestEasyCache(CacheContract):
    plugin, off = "easycache:threshold=0.6,first=3", "easycache:threshold=0,first=3"


class TestFirstBlock(CacheContract):
    plugin, off = "first-block:threshold=0.3", "first-block:threshold=0"


class TestAttention(CacheContract):
    plugin, off = "attention:every=3,first=2", "attention:every=1"


class TestCfgGate(CacheContract):
    plugin, off = "cfg-gate:after=0.25,every=4", "cfg-gate:after=1"


class TestCachesOfTheReport(CacheContract):
    plugin, off = "cfg-gate:after=0.2,every=2+attention:every=2,first=3", "attention:every=1+cfg-gate:after=1"


@pytest.fixture(scope="module")
def trial() -> Trial:
    """The built-in model as its users run it: 15 steps of the official solver, prompt and empty prompt."""
    backbone, solver = load_backbone("tiny"), find("wan_schedulers", "unipc").load()
    encoder = find("wan_text_encoders", "tiny").load()
    with torch.no_grad():
        context, negative = (backbone.encode_context(encoder.encode([prompt])) for prompt in ("a red circle moves left", ""))
    noise = torch.randn(1, 16, 5, 8, 8, generator=torch.Generator().manual_seed(1))
    return Trial(backbone, solver, solver.schedule(15, 2.0), noise, context, negative, 2.0)


@pytest.fixture(scope="module")
def ratios(trial: Trial, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("ratios") / "tiny.json"
    write_ratios(calibrate(trial), path)
    return path


# cache with a {} for the setting, values from careful to bold, largest error of the boldest
CURVES = {
    "teacache:first=3,threshold={}": ((0.06, 0.12, 0.3), 0.3),
    "magcache:ratios=RATIOS,most=4,threshold={}": ((0.06, 0.15, 0.4), 0.4),
    "easycache:first=3,threshold={}": ((0.05, 0.1, 0.2), 0.35),
    "first-block:threshold={}": ((0.11, 0.15), 0.4),
    "attention:first=3,every={}": ((2, 3, 4), 0.5),
    "cfg-gate:after={}": ((0.8, 0.6, 0.3), 0.3),
    "attention:every=2,first=3+cfg-gate:after={}": ((0.8, 0.3), 0.4),
}


@pytest.fixture(scope="module")
def uncached(trial: Trial) -> Tensor:
    return trial.latents()


@pytest.mark.parametrize(("ref", "curve"), CURVES.items(), ids=list(CURVES))
def test_bolder_settings_skip_more_and_err_more(
    ref: str, curve: tuple[tuple[float, ...], float], trial: Trial, ratios: Path, uncached: Tensor
) -> None:
    skipped, errors = [0], [0.0]
    for value in curve[0]:
        run = find_cache(ref.format(value).replace("RATIOS", str(ratios))).start(trial.schedule.timesteps)
        errors.append(relative_error(trial.latents(run), uncached))
        skipped.append(run.report()["skipped"])
    assert skipped == sorted(set(skipped)), skipped
    assert all(now <= 1.3 * bolder for now, bolder in pairwise(errors)), errors
    assert 0 < errors[-1] < curve[1], errors


def test_errors_are_measured_against_the_uncached_run(trial: Trial, uncached: Tensor) -> None:
    cache = find_cache("teacache:threshold=0.2,first=3")
    measured = measured_error(cache, trial)
    cached = trial.latents(cache.start(trial.schedule.timesteps))
    assert measured.error == pytest.approx(float((cached - uncached).norm() / uncached.norm()), rel=1e-5)
    assert measured.seconds > 0
    assert measured.uncached_seconds > 0


def test_a_whole_pipeline_is_measured_too() -> None:
    pipe = Pipeline("tiny")
    measured = measured_run(pipe, "teacache:threshold=0.2,first=3", "a red circle moves left", seed=1, steps=8)
    assert measured.report["evaluations"] == 16
    assert measured.report["skipped"] > 0
    assert 0 < measured.error < 0.5
    assert measured_run(pipe, "teacache:threshold=0", "a red circle moves left", seed=1, steps=8).error == 0


def counted(trial: Trial) -> tuple[Trial, list[int]]:
    """The trial, and a list that grows with every block that runs."""
    calls: list[int] = []
    backbone = load_backbone("tiny")
    for i, block in enumerate(backbone.trunk.blocks):
        block.register_forward_hook(lambda *_, i=i: calls.append(i))
    return replace(trial, backbone=backbone), calls


@pytest.mark.parametrize(
    "ref", ["teacache:first=3", "easycache:first=3", "first-block:threshold=0.15", "cfg-gate", "easycache:first=3+cfg-gate"]
)
def test_what_is_reported_as_skipped_did_not_run(ref: str, trial: Trial) -> None:
    observed, calls = counted(trial)
    run = find_cache(ref).start(trial.schedule.timesteps)
    observed.latents(run)
    report = run.report()
    assert report["skipped"] > 0
    assert calls.count(5) == report["evaluations"] - report["skipped"]
    assert calls.count(0) == (report["evaluations"] if ref.startswith("first") else calls.count(5))


def test_attention_is_skipped_and_put_back(trial: Trial) -> None:
    backbone, calls = load_backbone("tiny"), []
    for block in backbone.trunk.blocks:
        attend = block.self_attn.attend
        block.self_attn.attend = lambda *qkv, attend=attend: (calls.append(1), attend(*qkv))[1]
    attends = [block.self_attn.attend for block in backbone.trunk.blocks]
    run = find_cache("attention:every=3,first=2").start(trial.schedule.timesteps)
    replace(trial, backbone=backbone).latents(run)
    assert len(calls) == 6 * (run.report()["evaluations"] - run.report()["skipped"]) < 6 * 30
    assert [block.self_attn.attend for block in backbone.trunk.blocks] == attends

    def fail(*_: Any) -> Tensor:
        raise RuntimeError("out of memory")

    backbone.trunk.blocks[3].self_attn.attend = fail
    with pytest.raises(RuntimeError, match="out of memory"):
        replace(trial, backbone=backbone).latents(find_cache("attention").start(trial.schedule.timesteps))
    assert backbone.trunk.blocks[0].self_attn.attend is attends[0]


def test_without_guidance_there_is_one_branch(trial: Trial) -> None:
    alone = replace(trial, negative_context=None, scale=1.0)
    for ref in ("teacache:first=3", "cfg-gate", "attention+cfg-gate"):
        report = measured_error(find_cache(ref), alone).report
        assert report["branches"]["negative"] == {"evaluations": 0, "skipped": 0}
        assert report["evaluations"] == 15
    assert measured_error(find_cache("cfg-gate"), alone).error == 0


@pytest.mark.parametrize("scale", [0.0, 1.0, 0.5, 7.0])
def test_the_gate_keeps_the_difference_of_the_two_forwards(scale: float, trial: Trial) -> None:
    run = CfgGate(after=0.0).start(trial.schedule.timesteps)
    given = trial.context, trial.negative_context, scale
    with torch.no_grad():
        for step, time in enumerate((900.0, 880.0)):
            latents, timestep = trial.noise * (1 + 0.01 * step), torch.tensor([time])
            got = run.velocity(trial.backbone, latents, timestep, *given, step=step)
            positive, negative = (trial.backbone(latents, timestep, context) for context in given[:2])
            if step == 0:
                assert torch.equal(got, guided_velocity(trial.backbone, latents, timestep, *given))
                difference = positive - negative
            else:
                expected = positive if scale == 1 else negative if scale == 0 else positive + (scale - 1) * difference
                assert torch.allclose(got, expected, atol=1e-5)
    assert run.report()["skipped"] == (scale not in (0, 1))


def test_a_branch_that_sat_out_starts_anew(trial: Trial) -> None:
    """As that of the prompt does on a process that has run the negative prompt meanwhile."""
    run = TeaCache(threshold=1e9, first=0).start(trial.schedule.timesteps)
    with torch.no_grad():
        for step, computed in ((0, 1), (1, 1), (2, 1), (4, 2), (5, 2)):
            run.velocity(
                trial.backbone, trial.noise, trial.schedule.timesteps[step].float().reshape(1), trial.context, None, 1.0, step=step
            )
            counts = run.report()["branches"]["positive"]
            assert counts["evaluations"] - counts["skipped"] == computed, step


def test_each_expert_has_its_own_first_evaluations() -> None:
    timesteps = torch.tensor([999.0, 950, 900, 875, 800, 600, 300, 100])
    run = CacheRun(timesteps, boundary=0.875)
    assert [run.position(step).index for step in range(8)] == [0, 1, 2, 3, 0, 1, 2, 3]
    assert [run.position(step).last for step in range(8)] == 7 * [False] + [True]
    assert {run.position(step).count for step in range(8)} == {4}
    assert [CacheRun(timesteps).position(step).count for step in range(8)] == 8 * [8]


def test_hints_of_vace_are_made_of_the_first_tokens(trial: Trial) -> None:
    """First-block runs the first block by itself, and hints depend on the tokens before it."""
    config = TINY.model_copy(update={"vace_layers": (0, 2), "vace_in_dim": 6})
    backbone, generator = WanDiT(config).eval(), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in backbone.parameters():
            weight.copy_(torch.randn(weight.shape, generator=generator) * (0.3 if weight.ndim == 1 else weight[0].numel() ** -0.5))
        context = backbone.encode_context([torch.randn(3, 96, generator=generator)])
    given = Conditioning(vace=torch.randn(1, 6, 5, 8, 8, generator=generator), vace_scale=0.7)
    vace = replace(trial, backbone=backbone, context=context, negative_context=None, scale=1.0, conditioning=given)
    assert measured_error(FirstBlockCache(threshold=0), vace).error == 0
    for ref in ("first-block:threshold=9", "attention:first=2", "teacache:first=2,threshold=9"):
        measured = measured_error(find_cache(ref), vace)
        assert measured.report["skipped"] > 5, ref
        assert 0 < measured.error < 2, ref


def test_estimates_are_the_published_polynomials(trial: Trial) -> None:
    timesteps = trial.schedule.timesteps
    for name, coefficients in TEACACHE.items():
        expected = sum(coefficient * 0.05 ** (4 - i) for i, coefficient in enumerate(coefficients))
        assert TeaCache(coefficients=name).start(timesteps).estimate(0.05) == pytest.approx(expected)
    run = TeaCache().start(timesteps)
    trial.latents(run)
    assert run.report()["coefficients"] == "raw", "the built-in model has none of its own"

    class Named(WanDiT):
        spec = SimpleNamespace(name="wan2.1-t2v-1.3b")

    run = TeaCache().start(timesteps)
    replace(trial, backbone=Named.from_pretrained("pkg:wan_dit/weights/tiny")).latents(run)
    assert run.report()["coefficients"] == "wan2.1-t2v-1.3b"


def test_ratios_are_measured_saved_and_stretched(trial: Trial, ratios: Path) -> None:
    measured = calibrate(trial)
    assert {branch: len(values) for branch, values in measured.items()} == {"positive": 15, "negative": 15}
    assert measured["positive"] != measured["negative"]
    read = MagCache(str(ratios))
    assert read.table == measured
    stretched = read.start(torch.linspace(1000, 10, 30)).ratios["positive"]
    assert (stretched[0], stretched[-1], len(stretched)) == (measured["positive"][0], measured["positive"][-1], 30)
    unguided = calibrate(replace(trial, negative_context=None, scale=1.0))
    assert unguided["negative"] == unguided["positive"] != measured["positive"]
    assert {name: {len(values) for values in table.values()} for name, table in MAGCACHE.items()} == {
        "wan2.1-t2v-1.3b": {50}, "wan2.1-t2v-14b": {50}, "wan2.1-i2v-14b-480p": {40}, "wan2.1-i2v-14b-720p": {40},
    }  # fmt: skip
    first = trial.noise.new_tensor(measured["positive"][1:])
    assert first.min() > 0.5
    assert first.max() < 1.5


@pytest.mark.parametrize(
    ("ref", "error", "message"),
    [
        ("teacahe", LookupError, r"no cache named 'teacahe' \(installed: attention, cfg-gate, .*; did you mean 'teacache'\?"),
        ("teacache:thresh=1", ValueError, r"cache 'teacache' has no setting 'thresh': it has threshold, coefficients, first"),
        ("teacache:threshold=much", ValueError, r"threshold=much is no float; its default is 0\.2"),
        ("teacache:first=1.5", ValueError, r"first=1\.5 is no int"),
        ("teacache:coefficients=x", ValueError, r"no coefficients 'x': use one of auto, raw, wan2\.1-t2v-1\.3b"),
        ("magcache", ValueError, r"cache 'magcache' needs ratios: write 'magcache:ratios=\.\.\.'"),
        ("magcache:ratios=none.json", ValueError, r"no ratios 'none\.json': use one of wan2\.1-t2v-1\.3b, .*, or a file that calibrate"),
        ("teacache+easycache", ValueError, r"TeaCache and EasyCache do not go together: .* such as cfg-gate"),
        ("cfg-gate+cfg-gate", ValueError, r"do not go together"),
        ("teacache+cfg-gate+easycache", ValueError, r"do not go together"),
        ("", LookupError, r"no cache named ''"),
    ],
)
def test_what_no_cache_is_meant_by_is_told(ref: str, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        find_cache(ref)


def test_files_that_hold_no_ratios_are_refused(tmp_path: Path) -> None:
    for text in ("", "[]", '{"positive": [1.0]}', '{"positive": ["a"], "negative": [1]}', '{"positive": [], "negative": []}'):
        path = tmp_path / "ratios.json"
        path.write_text(text)
        with pytest.raises(ValueError, match="holds no ratios, expected"):
            find_cache(f"magcache:ratios={path}")
    path.write_text(json.dumps({"positive": [1, 0.5], "negative": [1, 0.5]}))
    assert find_cache(f"magcache:ratios={path}").table["positive"] == (1.0, 0.5)


def test_a_backbone_without_a_trunk_is_told(trial: Trial) -> None:
    class Plain:
        def __call__(self, latents: Tensor, timestep: Tensor, context: Any, conditioning: Any = None) -> Tensor:
            return 0.1 * latents

    plain = replace(trial, backbone=Plain())
    with pytest.raises(ValueError, match="Plain has no `trunk` of blocks that a cache could leave out: use easycache or cfg-gate"):
        plain.latents(TeaCache().start(trial.schedule.timesteps))
    assert measured_error(find_cache("easycache:first=3,threshold=0.5"), plain).report["skipped"] > 0


# --- caches of others, and wrong ones ---


class TestOfAnotherPackage(CacheContract):
    plugin, off = "caching_tasks:EveryOther", "caching_tasks:EveryOther:first=99"


DEFECTS = {
    "branches mixed": "test_branches_of_guidance_do_not_meet",
    "no reset at the switch": "test_another_expert_starts_anew",
    "shared by requests": "test_requests_of_one_cache_do_not_meet",
    "state that is not saved": "test_a_saved_run_goes_on_to_the_same_bits",
    "not counted": "test_something_is_left_out_and_counted",
}


@pytest.fixture(scope="module")
def small() -> Trial:
    return CacheContract.make_trial()


@pytest.mark.parametrize(("defect", "method"), DEFECTS.items(), ids=list(DEFECTS))
def test_a_defect_is_found(defect: str, method: str, small: Trial) -> None:
    broken = type("Broken", (TestOfAnotherPackage,), {"plugin": f"caching_tasks:EveryOther:defect={defect}"})
    check: Callable[[Any, Trial], None] = getattr(CacheContract, method)
    check(TestOfAnotherPackage(), small)
    with pytest.raises(AssertionError):
        check(broken(), small)


def test_a_registered_cache_is_found_by_name_with_its_settings(trial: Trial) -> None:
    class Plugin:
        @hookimpl
        def wan_caches(self) -> list[CacheSpec]:
            return [CacheSpec("every-other", "caching_tasks:EveryOther")]

    pm = PluginManager()
    pm.register(Plugin(), name="acme-caches")
    for ref in ("every-other:first=4", "acme-caches:every-other:first=4"):
        report = measured_error(find_cache(ref, pm), trial).report
        assert report["skips"] == "trunk"
        assert report["branches"]["positive"] == {"evaluations": 15, "skipped": 5}
    with pytest.raises(LookupError, match=r"no cache named 'teacache' \(installed: every-other\)"):
        find_cache("teacache", pm)

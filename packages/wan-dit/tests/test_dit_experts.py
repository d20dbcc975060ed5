"""Models of two experts: which takes a step, what each is given, and what of them is in memory."""

from __future__ import annotations

import json
import shutil
import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from wan_dit.caching.base import CacheRun
from wan_dit.cli import main
from wan_dit.events import Done, Loading, Step
from wan_dit.lora import LoraSpec
from wan_dit.pipeline import Pipeline
from wan_dit.plugins import find
from wan_dit.setup import BackboneSetup

PROMPT = "a red circle moves left"
SMALL: dict[str, Any] = {"steps": 4, "frames": 5, "size": (32, 32), "seed": 2}
OPTIONS = ["--steps", "4", "--frames", "5", "--size", "32x32", "--seed", "2", "--device", "cpu"]
LoraFile = Callable[..., Path]


PAIR = """
from dataclasses import replace
from wan_dit.plugins import find, hookimpl

@hookimpl
def wan_models():
    return [replace(find("wan_models", "tiny"), name="pair", backbone="pair-high", low_noise_backbone="pair-low", boundary=0.8)]

@hookimpl
def wan_backbones():
    from wan_dit.checkpoint import describe
    return [replace(describe(path), name=name, weights=path)
            for name, path in (("pair-high", {backbone!r}), ("pair-low", {low_noise_backbone!r}))]
"""


@pytest.fixture(scope="module")
def experts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The built-in model as the expert of high noise, and another, much changed, as that of low noise."""
    folder = tmp_path_factory.mktemp("experts")
    for name, factor in (("high", 1.0), ("low", 0.7)):
        backbone = find("wan_backbones", "tiny").load()
        with torch.no_grad():
            backbone.head.proj.weight.mul_(factor)
        backbone.save_pretrained(folder / name)
    model = replace(find("wan_models", "tiny"), name="pair", low_noise_backbone="x", boundary=0.8, guidance=(1.5, 3.0))
    return {"model": model, "backbone": str(folder / "high"), "low_noise_backbone": str(folder / "low")}


def test_two_experts_take_the_steps_of_their_noise(experts: dict[str, Any]) -> None:
    kinds = [(event.part if isinstance(event, Loading) else event.i) for event in Pipeline(**experts).stream(PROMPT, **SMALL)
             if isinstance(event, Loading | Step)]  # fmt: skip
    assert kinds == ["text_encoder", "backbone", "low_noise_backbone", "vae", 1, 2, 3, 4], "both are read before the first step"
    lazy = Pipeline(**experts, setup=BackboneSetup(offload="model"))
    seen = []
    for event in lazy.stream(PROMPT, **SMALL):
        if isinstance(event, Step):
            seen.append([lazy.parts.is_loaded(part) for part in lazy.parts.experts])
    assert [True, False] in seen
    assert [False, True] in seen
    assert not any(all(pair) for pair in seen), "one at a time"
    whole = Pipeline(**experts)(PROMPT, **SMALL)
    assert torch.equal(lazy(PROMPT, **SMALL).video, whole.video)
    assert (whole.manifest["guidance"], whole.manifest["parts"]["low_noise_backbone"]["name"]) == (
        [1.5, 3.0],
        experts["low_noise_backbone"],
    )


@pytest.mark.parametrize("cache", [None, "teacache:threshold=0.3"])
def test_an_expert_is_gone_from_memory_before_the_next_takes_a_step(experts: dict[str, Any], cache: str | None) -> None:
    lazy = Pipeline(**experts, setup=BackboneSetup(offload="model"))
    first = None
    for event in lazy.stream(PROMPT, **SMALL, cache=cache):
        if isinstance(event, Step) and lazy.parts.is_loaded("backbone"):
            first = weakref.ref(lazy.parts["backbone"])
        elif isinstance(event, Step):
            assert first is not None
            assert first() is None


def test_offload_lets_go_what_a_stream_that_was_closed_has_left(experts: dict[str, Any]) -> None:
    lazy = Pipeline(**experts, setup=BackboneSetup(offload="model"))
    stream = lazy.stream(PROMPT, **SMALL)
    assert next(event for event in stream if isinstance(event, Step) and lazy.parts.is_loaded("low_noise_backbone"))
    stream.close()  # type: ignore[attr-defined]
    large = ("text_encoder", "backbone", "low_noise_backbone")
    for _ in lazy.stream("a blue star moves up", **SMALL):
        assert sum(lazy.parts.is_loaded(part) for part in large) <= 1


def test_interleaved_streams_under_offload(experts: dict[str, Any]) -> None:
    lazy, prompts = Pipeline(**experts, setup=BackboneSetup(offload="model")), (PROMPT, "a blue star moves up")
    streams = [lazy.stream(prompt, **SMALL) for prompt in prompts]
    next(streams[0])
    made = {}
    while len(made) < 2:
        for i, stream in enumerate(streams):
            if isinstance(event := next(stream, None), Done):
                made[i] = event.result.video
    whole = Pipeline(**experts)
    assert all(torch.equal(made[i], whole(prompt, **SMALL).video) for i, prompt in enumerate(prompts))


def test_a_state_is_of_its_run_whatever_the_pipeline_made_before(experts: dict[str, Any], tmp_path: Path) -> None:
    """The second expert's weights are known in a pipeline that has read them, and not in a new one."""
    lazy = Pipeline(**experts, setup=BackboneSetup(offload="model"))
    whole = lazy(PROMPT, **SMALL).video
    for state in [event.state for event in lazy.stream(PROMPT, **SMALL) if isinstance(event, Step)]:
        again = Pipeline(**experts, setup=BackboneSetup(offload="model"))(PROMPT, **SMALL, resume=state)
        assert torch.equal(again.video, whole)
    high, moved = experts["backbone"], shutil.copytree(experts["low_noise_backbone"], tmp_path / "moved")
    state = next(event.state for event in Pipeline(**experts).stream(PROMPT, **SMALL) if isinstance(event, Step))
    assert torch.equal(Pipeline(**{**experts, "low_noise_backbone": str(moved)})(PROMPT, **SMALL, resume=state).video, whole)
    with pytest.raises(ValueError, match=r"the saved state is of another run: .*parts.low_noise_backbone"):
        Pipeline(**{**experts, "low_noise_backbone": high})(PROMPT, **SMALL, resume=state)


def test_a_cache_is_told_of_the_experts(experts: dict[str, Any]) -> None:
    seen: list[Any] = []

    class Watching(CacheRun):
        needs_trunk = False

        def evaluate(self, state: Any, branch: str, position: Any, forward: Any, latents: Tensor) -> tuple[Tensor, bool]:
            seen.append((branch, state["expert"], position.index, position.count, "known" in state))
            state["known"] = True
            return forward(), True

    class Policy:
        def start(self, timesteps: Tensor, boundary: float | None = None, group: Any = None) -> CacheRun:
            return Watching(timesteps, boundary, group)

    plain, pipe = Pipeline(**experts)(PROMPT, **SMALL), Pipeline(**experts)
    assert torch.equal(pipe(PROMPT, **SMALL, cache=Policy()).video, plain.video)
    high, low = ("backbone", 2), ("low_noise_backbone", 2)
    expected = [(expert, i, count, i > 0) for expert, count in (high, low) for i in range(count)]
    for branch in ("positive", "negative"):
        assert [rest for name, *rest in seen if name == branch] == [list(row) for row in expected]


def test_both_experts_have_to_fit(experts: dict[str, Any]) -> None:
    other = replace(find("wan_backbones", "tiny"), name="other", latent_space="another")
    with pytest.raises(ValueError, match="vae 'tiny' does not fit backbone 'other': its latent_space is tiny-2"):
        Pipeline(**{**experts, "low_noise_backbone": other})


@pytest.mark.parametrize(
    "options",
    [
        ["--quantise", "int8", "--lora", "style.safetensors:0.5:low", "--lora", "style.safetensors:-0.25:high"],
        ["--precision", "fast", "--dtype", "bf16", "--attention", "sdpa-math"],
        ["--cache", "first-block:threshold=0.4", "--offload", "model", "--guidance", "1.5,1"],
    ],
    ids=lambda options: options[0],
)
def test_a_replay_repeats_every_option(experts: dict[str, Any], options: list[str], here: Path, lora_file: LoraFile, install: Any) -> None:
    lora_file(here / "style.safetensors")
    install("wan-pair", PAIR.format(**{name: path for name, path in experts.items() if name != "model"}))
    assert main(["generate", PROMPT, "--model", "pair", *OPTIONS, *options, "--output", "a.mp4"]) == 0
    assert main(["generate", PROMPT, "--model", "pair", *OPTIONS, "--output", "plain.mp4"]) == 0
    hashes = [json.loads(Path(file).read_text())["frames_sha256"] for file in ("a.json", "plain.json")]
    assert hashes[0] != hashes[1], "they matter"
    assert main(["replay", "a.json"]) == 0


def test_a_lora_for_one_expert_leaves_the_other(experts: dict[str, Any], here: Path, lora_file: LoraFile) -> None:
    path = lora_file(here / "style.safetensors")

    def latents(*loras: LoraSpec) -> list[Tensor]:
        pipe = Pipeline(**experts, setup=BackboneSetup(loras=loras))
        return [event.state.latents for event in pipe.stream(PROMPT, **SMALL) if isinstance(event, Step) and event.state]

    plain, low, high, both = latents(), latents(LoraSpec(path, 1, "low")), latents(LoraSpec(path, 1, "high")), latents(LoraSpec(path))
    assert torch.equal(plain[0], low[0]), "the first step is of high noise"
    assert not torch.equal(plain[-1], low[-1])
    assert not torch.equal(plain[0], high[0])
    assert torch.equal(high[0], both[0])


def test_a_pair_of_guidance_needs_two_experts() -> None:
    with pytest.raises(ValueError, match="guidance 3,4 is a pair for two experts, and model 'tiny' is one"):
        Pipeline("tiny").stream(PROMPT, guidance=(3.0, 4.0))


def test_a_pair_of_guidance_may_come_from_json(experts: dict[str, Any]) -> None:
    pipe = Pipeline(**experts)
    assert pipe.settings(PROMPT, guidance=[3.0, 4]).guidance == (3.0, 4)
    with pytest.raises(ValueError, match=r"guidance is one number, or a pair \(low, high\) for two experts, got \[3.0\]"):
        pipe.stream(PROMPT, guidance=[3.0])


def test_guidance_1_of_one_expert_runs_it_once(experts: dict[str, Any]) -> None:
    calls = []
    pipe = Pipeline(**experts)
    for part in pipe.parts.experts:
        pipe.parts[part].register_forward_hook(lambda module, *_: calls.append(module))
    pipe(PROMPT, **SMALL, guidance=(1.0, 3.0))
    assert [calls.count(pipe.parts[part]) for part in ("backbone", "low_noise_backbone")] == [4, 2]


def test_the_second_expert_is_read_ahead_during_the_last_step_of_the_first(
    experts: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[int, str]] = []
    monkeypatch.setattr("wan_dit.parts._read_ahead", lambda weights: asked.append((len(steps), weights)))
    steps: list[Step] = []
    pipe = Pipeline(**experts, setup=BackboneSetup(offload="model"))
    first_low = 0
    for event in pipe.stream(PROMPT, **SMALL):
        if isinstance(event, Step):
            first_low = first_low or (len(steps) if pipe.parts.is_loaded("low_noise_backbone") else 0)
            steps.append(event)
    assert asked == [(first_low - 1, experts["low_noise_backbone"])]

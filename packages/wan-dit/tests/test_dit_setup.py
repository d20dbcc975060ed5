"""How a backbone is set up for a run: experts, LoRAs, offload, 8 bits, attention, processes; models on disk."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from wan_dit.caching.base import CacheRun
from wan_dit.cli import main
from wan_dit.config import TINY
from wan_dit.events import Done, Loading, Step
from wan_dit.lora import LoraSpec
from wan_dit.model import WanDiT
from wan_dit.pipeline import Pipeline
from wan_dit.plugins import VideoModelSpec, find
from wan_dit.setup import BackboneSetup

PROMPT = "a red circle moves left"
SMALL: dict[str, Any] = {"steps": 4, "frames": 5, "size": (32, 32), "seed": 2}
OPTIONS = ["--steps", "4", "--frames", "5", "--size", "32x32", "--seed", "2", "--device", "cpu"]


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
def plain() -> Tensor:
    return Pipeline("tiny")(PROMPT, **SMALL).video


def lora_file(path: Path, scale: float = 0.3) -> Path:
    """A LoRA of the built-in model in the names of ComfyUI."""
    generator, name = torch.Generator().manual_seed(0), "diffusion_model.blocks.5.self_attn.o"
    down, up = torch.randn(2, TINY.dim, generator=generator), torch.randn(TINY.dim, 2, generator=generator) * scale
    save_file({f"{name}.lora_A.weight": down, f"{name}.lora_B.weight": up}, path)
    return path


def make(setup: BackboneSetup, **options: Any) -> Tensor:
    return Pipeline("tiny", setup=setup, **options)(PROMPT, **SMALL).video


def off(got: Tensor, expected: Tensor) -> float:
    return float((got - expected).norm() / expected.norm())


@pytest.mark.parametrize("offload", ["model", "blocks", "stream"])
def test_offload_changes_no_bit(offload: Any, plain: Tensor) -> None:
    assert torch.equal(make(BackboneSetup(offload=offload)), plain)


def test_streaming_leaves_the_text_encoder_in_its_file_too() -> None:
    pipe = Pipeline("tiny", setup=BackboneSetup(offload="stream"))
    pipe.parts.load("text_encoder")
    assert type(pipe.parts["text_encoder"]).__name__ == "StreamingTextEncoder"


def test_offload_of_parts_keeps_one_at_a_time() -> None:
    pipe = Pipeline("tiny", setup=BackboneSetup(offload="model"))
    for event in pipe.stream(PROMPT, **SMALL):
        if isinstance(event, Step):
            assert not pipe.parts.is_loaded("text_encoder")
    assert not pipe.parts.is_loaded("backbone")
    again = [event.part for event in pipe.stream(PROMPT, **SMALL) if isinstance(event, Loading)]
    assert again == ["backbone"], "prompts that were encoded need no encoder"


@pytest.mark.parametrize("quantise", ["int8", "fp8"])
def test_eight_bits_change_the_video_a_little(quantise: Any, plain: Tensor) -> None:
    assert 0 < off(make(BackboneSetup(quantise=quantise)), plain) < 0.2


@pytest.mark.parametrize("precision", ["official", "diffusers", "fast"])
def test_precision_matters_in_16_bits_alone(precision: Any, plain: Tensor) -> None:
    assert torch.equal(make(BackboneSetup(precision=precision)), plain)
    assert 0 < off(make(BackboneSetup(precision=precision), dtype="bf16"), plain) < 0.2


def test_another_attention_is_used(plain: Tensor) -> None:
    assert 0 <= off(make(BackboneSetup(attention="sdpa-math")), plain) < 1e-4
    with pytest.raises(LookupError, match="no attention named 'flush'"):
        make(BackboneSetup(attention="flush"))


@pytest.mark.parametrize("how", [{}, {"offload": "stream"}, {"quantise": "int8"}], ids=str)
def test_a_lora_of_strength_zero_is_none_and_of_one_is_some(here: Path, how: dict[str, Any]) -> None:
    path, without = lora_file(here / "style.safetensors"), make(BackboneSetup(**how))
    assert torch.equal(make(BackboneSetup(loras=[LoraSpec(path, 0.0)], **how)), without)
    assert off(make(BackboneSetup(loras=[LoraSpec(path, 1.0)], **how)), without) > 1e-3


def test_a_lora_is_recorded_and_replayed(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lora_file(here / "style.safetensors")
    assert main(["generate", PROMPT, *OPTIONS, "--lora", "style.safetensors:0.5", "--output", "a.mp4"]) == 0
    record = json.loads((here / "a.json").read_text())
    assert [(lora["path"], lora["strength"]) for lora in record["loras"]] == [(str(here / "style.safetensors"), 0.5)]
    assert main(["replay", "a.json"]) == 0
    lora_file(here / "style.safetensors", scale=0.4)
    assert main(["replay", "a.json"]) == 2
    assert "the LoRA of the run, " in capsys.readouterr().err


BAD = [
    (["--lora", "none.safetensors"], "none.safetensors"),
    (["--lora", "wide.safetensors"], "wide.safetensors"),
    (["--lora", "style.safetensors:1:high"], "a LoRA is for one expert of Wan2.2 A14B, and this model is not said to be any"),
    (["--lora", "style.safetensors:x"], "'x' is no strength"),
    (["--cache", "teacache:threshold=x"], "threshold=x is no float"),
    (["--guidance", "3;4"], "guidance '3;4' is not a number such as 5, or LOW,HIGH such as 3,4"),
    (["--guidance", "3,4"], "guidance 3,4 is a pair for two experts, and model 'tiny' is one backbone: give one number"),
    (["--context-embedder", "none.safetensors"], "none.safetensors"),
    (["--preset", "wan2.1-t2v-14b"], "preset is for a model on disk"),
    (["--model", "empty"], "'{here}/empty' is no model: expected an official release"),
    (["--ulysses", "2"], "not set: start several processes by torchrun"),
    (["--preview", "p.bmp"], "cannot write a preview to 'p.bmp'"),
]


@pytest.mark.parametrize(("options", "message"), BAD, ids=["".join(options) for options, _ in BAD])
def test_bad_options_are_one_line(here: Path, options: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    lora_file(here / "style.safetensors")
    save_file({"diffusion_model.blocks.5.self_attn.o.lora_A.weight": torch.zeros(2, 999)}, here / "wide.safetensors")
    (here / "empty").mkdir()
    before = sorted(here.rglob("*"))
    assert main(["generate", PROMPT, *OPTIONS, *options, "--output", "a.mp4"]) == 2
    err = capsys.readouterr().err.splitlines()
    assert err[-1].startswith("wan-dit: error: ")
    assert message.format(here=here) in err[-1]
    assert sorted(here.rglob("*")) == before


@pytest.mark.parametrize("field", ["precision", "offload", "quantise"])
def test_unknown_choices_are_refused(field: str) -> None:
    with pytest.raises(ValueError, match=f"{field} 'x' is not one of "):
        BackboneSetup(**{field: "x"})


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
    with pytest.raises(ValueError, match="vae 'tiny' does not fit backbone 'other': its latent_space is tiny-1"):
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
def test_a_replay_repeats_every_option(experts: dict[str, Any], options: list[str], here: Path, install: Any) -> None:
    lora_file(here / "style.safetensors")
    install("wan-pair", PAIR.format(**{name: path for name, path in experts.items() if name != "model"}))
    assert main(["generate", PROMPT, "--model", "pair", *OPTIONS, *options, "--output", "a.mp4"]) == 0
    assert main(["generate", PROMPT, "--model", "pair", *OPTIONS, "--output", "plain.mp4"]) == 0
    hashes = [json.loads(Path(file).read_text())["frames_sha256"] for file in ("a.json", "plain.json")]
    assert hashes[0] != hashes[1], "they matter"
    assert main(["replay", "a.json"]) == 0


def test_a_lora_for_one_expert_leaves_the_other(experts: dict[str, Any], here: Path) -> None:
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


def test_a_model_folder_is_used_and_told(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["convert", "tiny", "mine", "--to", "own"]) == 0
    assert main(["generate", PROMPT, *OPTIONS, "--model", "mine", "--output", "a.mp4"]) == 0
    err = capsys.readouterr().err
    assert "wan-dit: model: an official release, used with the settings of tiny" in err
    assert f"wan-dit: backbone: {here / 'mine'}" in err
    assert "wan-dit: vae: none in" in err
    assert main(["replay", "a.json"]) == 2
    assert "which no package offers: give it again with --backbone or --model" in capsys.readouterr().err
    assert main(["replay", "a.json", "--model", "mine"]) == 0
    assert main(["replay", "a.json", "--backbone", "mine"]) == 0
    assert main(["generate", PROMPT, *OPTIONS, "--output", "b.mp4"]) == 0
    assert json.loads(Path("a.json").read_text())["frames_sha256"] == json.loads(Path("b.json").read_text())["frames_sha256"]


def test_many_prompts_one_load(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (here / "p.jsonl").write_text(
        f'\ufeff{{"prompt": "{PROMPT}", "seed": 7}}\n\n# a remark\n{{"prompt": "a blue star moves up", "size": "48x32", "guidance": 1}}\n'
    )
    assert main(["generate", "--prompts", "p.jsonl", *OPTIONS, "--output", "many/"]) == 0
    assert capsys.readouterr().err.count("loading backbone") == 1
    records = {file.stem: json.loads(file.read_text()) for file in Path("many").glob("*.json")}
    assert {name: (record["seed"], record["size"], record["guidance"]) for name, record in records.items()} == {
        "a-red-circle-moves-left-7": (7, [32, 32], 2.0),
        "a-blue-star-moves-up-2": (2, [48, 32], 1.0),
    }
    for text, message in (
        ('{"prompt": "a star", "steps": 0}', "prompt 1 of 'p.jsonl': steps must be"),
        ('{"prompt": 3}', "line 1 of 'p.jsonl' is not a prompt with settings: prompt: Input should be a valid string"),
        ('# a\n{"seed": 3}', "line 2 of 'p.jsonl' is not a prompt with settings: prompt: Field required"),
        ('{"prompt": "a star", "sed": 0}', "sed: Extra inputs are not permitted; known are prompt, "),
        ('{"prompt": "a star", "seed": "1"}', "seed: Input should be a valid integer"),
        ('{"prompt": "a star", "frames": true}', "frames: Input should be a valid integer"),
        ('{"prompt": "a star", "size": [64]}', "size.1: Field required"),
        ('{"prompt": "a star", "size": "64"}', "size: size '64' is not WIDTHxHEIGHT, such as 64x64"),
        ('{"prompt": "a star", "guidance": [3, 4]}', "prompt 1 of 'p.jsonl': guidance 3,4 is a pair for two experts"),
        ("[", "line 1 of 'p.jsonl' is not a prompt with settings: content: Invalid JSON"),
        ("caf\udce9", "'p.jsonl' is no text in UTF-8: "),
        ("# nothing", "'p.jsonl' holds no prompts"),
    ):
        (here / "p.jsonl").write_text(text, encoding="utf-8", errors="surrogateescape")
        assert main(["generate", "--prompts", "p.jsonl", "--output", "more"]) == 2
        err = capsys.readouterr().err
        assert message in err
        assert len(err.splitlines()) == 1
    assert not Path("more").exists()
    assert main(["generate", PROMPT, "--prompts", "p.jsonl"]) == 2
    assert main(["generate", "--prompts", "p.jsonl", "--output", "a.mp4"]) == 2


def test_previews_are_written_as_it_runs(here: Path) -> None:
    assert main(["generate", PROMPT, *OPTIONS, "--preview", "p.png", "--output", "a.gif"]) == 0
    assert {file.name for file in here.iterdir()} == {"a.gif", "a.json", "a.png", "p.png"}


def test_a_cache_tells_its_error(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert (
        main(["generate", PROMPT, *OPTIONS, "--steps", "10", "--cache", "teacache:threshold=0.4", "--cache-error", "--output", "a.mp4"])
        == 0
    )
    assert "evaluations skipped (trunk); the video is off by" in capsys.readouterr().out
    record = json.loads((here / "a.json").read_text())
    assert 0 < record["cache"]["error"] < 1
    assert record["cache"]["skipped"] > 0
    assert main(["replay", "a.json"]) == 0


@pytest.mark.xdist_group("distributed")
@pytest.mark.parametrize(
    "options",
    [
        ["--ulysses", "2", "--fsdp"],
        pytest.param(["--ulysses", "2"], marks=pytest.mark.slow),
        pytest.param(["--ring", "2"], marks=pytest.mark.slow),
        pytest.param(["--cfg-parallel"], marks=pytest.mark.slow),
    ],
    ids=" ".join,
)
def test_two_processes_make_the_same_video(options: list[str], here: Path) -> None:
    assert main(["generate", PROMPT, *OPTIONS, "--output", "one.gif"]) == 0
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "wan_dit", "generate"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, PROMPT, *OPTIONS, *options, "--output", "two/%02d.png"], env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("took: ") == 1, "one process reports"
    assert len(list(Path("two").iterdir())) == 5
    record = json.loads(Path("two.json").read_text())
    assert record["options"]["processes"]["cfg" if "--cfg-parallel" in options else options[0][2:]] == 2
    from PIL import Image

    one = Pipeline("tiny")(PROMPT, **SMALL).video
    for i, file in enumerate(sorted(Path("two").iterdir())):
        with Image.open(file) as frame:
            pixels = torch.tensor(list(frame.getdata())).view(32, 32, 3).permute(2, 0, 1) / 127.5 - 1
        assert (pixels - one[0, :, i]).abs().max() < 2 / 127.5, "within a level of 8 bits"


@pytest.mark.slow
def test_a_compiled_block_computes_the_same(plain: Tensor) -> None:
    assert off(make(BackboneSetup(compile=True)), plain) < 1e-4


def test_a_loaded_backbone_is_used_as_it_is() -> None:
    backbone = find("wan_backbones", "tiny").load()
    with pytest.raises(ValueError, match="is an object, used as it is: set it up before it is given"):
        Pipeline("tiny", backbone=backbone, setup=BackboneSetup(attention="sdpa-math"))
    Pipeline("tiny", backbone=backbone, setup=BackboneSetup(offload="model"))


def test_five_lines() -> None:
    """As the README has it: a backbone of one's own in a pipeline, everything else by name."""
    backbone = WanDiT.from_pretrained(find("wan_backbones", "tiny").weights)
    model = VideoModelSpec("mine", "b", "wan-vae:tiny", "wan-text:tiny", steps=2, shift=2.0, guidance=2.0, size=(32, 32), frames=5)
    assert Pipeline(model, backbone=backbone)(PROMPT).video.shape == (1, 3, 5, 32, 32)


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

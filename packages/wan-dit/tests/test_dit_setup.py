"""How a backbone is set up for a run: LoRAs, offload, 8 bits, attention, processes; models on disk."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from wan_dit.cli import main
from wan_dit.events import Loading, Step
from wan_dit.lora import LoraSpec
from wan_dit.model import WanDiT
from wan_dit.pipeline import Pipeline
from wan_dit.plugins import VideoModelSpec, find
from wan_dit.setup import BackboneSetup

PROMPT = "a red circle moves left"
SMALL: dict[str, Any] = {"steps": 4, "frames": 5, "size": (32, 32), "seed": 2}
OPTIONS = ["--steps", "4", "--frames", "5", "--size", "32x32", "--seed", "2", "--device", "cpu"]
LoraFile = Callable[..., Path]


@pytest.fixture(scope="module")
def plain() -> Tensor:
    return Pipeline("tiny")(PROMPT, **SMALL).video


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
def test_a_lora_of_strength_zero_is_none_and_of_one_is_some(here: Path, lora_file: LoraFile, how: dict[str, Any]) -> None:
    path, without = lora_file(here / "style.safetensors"), make(BackboneSetup(**how))
    assert torch.equal(make(BackboneSetup(loras=[LoraSpec(path, 0.0)], **how)), without)
    assert off(make(BackboneSetup(loras=[LoraSpec(path, 1.0)], **how)), without) > 1e-3


def test_a_lora_is_recorded_and_replayed(here: Path, lora_file: LoraFile, capsys: pytest.CaptureFixture[str]) -> None:
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
    (["--preview", "p.bmp", "--model", "empty"], "cannot write a preview to 'p.bmp'"),  # before the model is looked at
]


@pytest.mark.parametrize(("options", "message"), BAD, ids=["".join(options) for options, _ in BAD])
def test_bad_options_are_one_line(
    here: Path, lora_file: LoraFile, options: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
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

"""The commands `wan-train validate` and `wan-train cache` over all data sets and stages of a recipe: what a run of it sees."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from wan_train import cli
from wan_train.config import TrainConfig
from wan_train.data.folder import held_out
from wan_train.data.shapes import Shapes
from wan_train.data.tensor_files import TensorFiles
from wan_train.trainer import Trainer
from wan_vae.video import VideoWriter

BASE = """
name = "mixed"
output = "{output}"
steps = 6
batch_size = 10
threads = 1
preview_every = 0
save_every = 0

[data]
name = "shapes"
settings = {{frames = 5, size = [16, 16], length = 4}}

[more_data.web]
name = "folder"
settings = {{path = "{clips}", fps = 8, frames = 9, min_frames = 5}}

[more_data.unused]
name = "shapes"
settings = {{frames = 1, size = [16, 16], length = 3, seed = 9}}

[[stages]]
name = "pictures"
until = 2
video = [16, 16]
frames = [5]
weights = {{video = 0.0, unused = 0.0}}

[[stages]]
name = "joint"
until = 6
video = [16, 24]
image = [24, 24]
frames = [5]
weights = {{unused = 0.0}}

[objective]
"""
BRIGHTNESS = 'name = "staged_objective:Brightness"\n'
FLOW = """
name = "rectified-flow"

[objective.settings]
vae = "{vae}"
architecture = {{dim = 32, ffn_dim = 32, num_heads = 2, num_layers = 1, in_dim = 4, out_dim = 4, patch_size = [1, 1, 1]}}
precache = false
"""

Command = Callable[..., tuple[int, Any]]


@pytest.fixture
def recipe(tmp_path: Path, clips: Path) -> Path:
    path = tmp_path / "mixed.toml"
    path.write_text(BASE.format(output=tmp_path / "run", clips=clips) + BRIGHTNESS)
    return path


@pytest.fixture
def flow(tmp_path: Path, clips: Path, micro_vae: Path) -> Path:
    """Rectified flow whose tokens are of 8x8 pixels: shapes of 16x24 are no multiples of the usual ones."""
    path = tmp_path / "flow.toml"
    path.write_text(BASE.format(output=tmp_path / "run", clips=clips) + FLOW.format(vae=micro_vae))
    return path


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str]) -> Command:
    """The exit code, and what is told as JSON."""

    def run(*words: object) -> tuple[int, Any]:
        capsys.readouterr()
        code = cli.main([*map(str, words), "--json"])
        return code, json.loads(capsys.readouterr().out)

    return run


def film(path: Path, frames: int) -> None:
    rng = np.random.default_rng(0)
    with VideoWriter(path, fps=8, size=(64, 64)) as writer:
        for _ in range(frames):
            writer.write(rng.integers(0, 256, (64, 64, 3), np.uint8))
    path.with_suffix(".txt").write_text("noise")


def files(folder: Path, kind: str = "") -> dict[str, tuple[int, int]]:
    """The tensors of a cache, and what tells whether one was written again."""
    cache = TensorFiles(folder / "cache")
    stats = {key: cache.path(key).stat() for key in cache.keys() if kind in cache.facts(key)["kind"]}  # noqa: SIM118
    return {key: (stat.st_ino, stat.st_mtime_ns) for key, stat in stats.items()}


def rows(told: list[dict[str, Any]]) -> dict[str, int]:
    return {row["state"]: row["files"] for row in told}


def test_a_run_finds_all_sets_and_stages_in_the_cache(flow: Path, tmp_path: Path, command: Command) -> None:
    shapes = Shapes(frames=5, size=(16, 16), length=4)
    prompts = {"", "the same", "caption 3", "caption 4", "and another", *(text for index in range(4) for text in shapes.captions(index))}
    count = 5 + (4 + 5) + len(prompts)  # one of 6 pictures is there twice
    assert command("cache", flow, "--status") == (
        0,
        [{"state": "present", "files": 0, "why": ""}, {"state": "missing", "files": count, "why": ""}],
    )
    assert command("cache", flow)[1][0] == {"made": count, "present": 0, "failed": 0, "failures": []}
    made = files(tmp_path / "run")
    assert len(made) == count
    assert command("cache", flow)[1][0]["made"] == 0
    assert rows(command("cache", flow, "--prune")[1]) == {"present": count, "missing": 0, "removed": 0}
    Trainer(TrainConfig.from_toml(flow)).run()
    assert files(tmp_path / "run") == made, "nothing is made, nor made again"
    Trainer(TrainConfig.from_toml(flow, [f"output={tmp_path / 'other'}"])).run()
    assert files(tmp_path / "other", "latents").keys() == files(tmp_path / "run", "latents").keys(), "and nothing too many"


def test_what_only_a_stage_that_is_gone_has_seen_is_stale(flow: Path, command: Command) -> None:
    stages = 'stages=[{name="joint", until=6, video=[16,24], image=[24,24], frames=[5], weights={unused=0.0, data=0.0}}]'
    words = ["cache", flow, "--text-encoder", "none"]
    assert command(*words)[1][0]["made"] == 14
    assert rows(command(*words, "--verify")[1]) == {"present": 14, "missing": 0}
    (_, told) = command("cache", flow, stages, "--text-encoder", "none", "--prune")
    assert rows(told) == {"present": 5, "missing": 0, "stale": 9, "removed": 9}
    assert rows(command(*words, "--status")[1]) == {"present": 5, "missing": 9}


def test_sets_of_a_recipe_without_stages_have_the_shape_of_the_first(flow: Path, tmp_path: Path, command: Command) -> None:
    other = "more_data={b={name='shapes', settings={frames=9, size=[32,32], length=3, seed=3}}}"
    words = [other, "stages=[]", "objective.settings.precache=true", "batch_size=7"]
    assert command("cache", flow, *words, "--text-encoder", "none")[1][0]["made"] == 4 + 3
    made = files(tmp_path / "run")
    Trainer(TrainConfig.from_toml(flow, words)).run()
    assert {**files(tmp_path / "run", "latents")} == made


def test_validate_tells_the_shapes_of_all_stages_by_set(recipe: Path, clips: Path, command: Command) -> None:
    film(clips / "z.mp4", 9)
    code, told = command("validate", recipe)
    assert (code, told["counts"]) == (0, {"files": 7, "samples": 4 + 7 + 3, "problems": {}})
    found = {(row["set"], row["file"]): (row["samples"], row["buckets"]) for row in told["files"]}
    assert found["data", "shapes"] == (4, "5x16x24")
    assert found["web", "z.mp4"] == (1, "5x16x24")
    assert found["web", "3.png"] == (1, "1x16x16, 1x24x24")
    assert found["unused", "shapes"] == (3, ""), "no stage draws it"
    _, told = command("validate", recipe, "--size", "32x32", "--frames", "5")
    assert {row["buckets"] for row in told["files"]} == {"1x32x32", "5x32x32"}, "in place of the stages"


def ends(recipe: Path, words: list[str], message: str) -> None:
    """A run says what validate says."""
    with pytest.raises(ValueError) as error:  # noqa: PT011
        Trainer(TrainConfig.from_toml(recipe, words)).run()
    assert str(error.value) == message


def stages(last: str) -> str:
    first = 'name="first", until=2, video=[16,16], frames=[5], weights={image=0.0}'
    return f'stages=[{{{first}}}, {{name="last", until=6, video=[16,16], {last}}}]'


def test_a_sample_that_ends_a_stage_is_a_problem_that_names_it(recipe: Path, clips: Path, command: Command) -> None:
    film(clips / "a.mp4", 6)
    film(clips / "b.mp4", 9)
    words = [stages("frames=[9], weights={data=0.0, image=0.0}")]
    code, told = command("validate", recipe, *words)
    message = "stage 'last': a clip has 6 frames, the shortest bucket 9"
    assert (code, told["problems"]) == (2, [{"set": "web", "file": "a.mp4", "kind": "short", "message": message}])
    ends(recipe, words, message)
    words = [stages("frames=[9], weights={data=0.0, 'web/video'=0.0}")]
    assert command("validate", recipe, *words)[0] == 0, "the stage does not draw it"
    Trainer(TrainConfig.from_toml(recipe, words)).run(overwrite=True)
    assert cli.main(["cache", str(recipe), stages("frames=[9]"), "--vae", "none", "--text-encoder", "none"]) == 2


def test_a_set_that_is_rendered_has_each_problem_once(recipe: Path, command: Command) -> None:
    words = [stages("frames=[9]"), "more_data={}"]
    code, told = command("validate", recipe, *words)
    message = "stage 'last': a clip has 5 frames, the shortest bucket 9"
    assert (code, told["problems"]) == (2, [{"file": "shapes", "kind": "short", "message": f"4 samples: {message}"}])
    ends(recipe, words, message)


def test_a_sample_over_the_budget_of_a_stage_is_a_problem(recipe: Path, command: Command) -> None:
    words = [stages("frames=[5], tokens=7, weights={image=0.0}")]
    code, told = command("validate", recipe, *words)
    message = "stage 'last': one sample of 5x16x16 (frames, height, width) has 8 tokens, more than the budget of 7 tokens"
    assert (code, told["counts"]["problems"]) == (2, {"budget": 1})
    assert told["problems"][0] == {"set": "data", "file": "shapes", "kind": "budget", "message": f"4 samples: {message}"}
    ends(recipe, words, message)


def test_a_sample_that_is_held_out_ends_no_stage(recipe: Path, clips: Path, command: Command) -> None:
    (held,) = held_out({clips / "a.mp4", clips / "b.mp4"}, 1)
    for name in ("a.mp4", "b.mp4"):
        film(clips / name, 6 if name == held.name else 9)
    for picture in clips.glob("*.png"):
        picture.unlink()
    words = [stages("frames=[9], weights={data=0.0, image=0.0}"), "more_data.web.settings.holdout=1"]
    code, told = command("validate", recipe, *words)
    assert (code, {row["file"]: row["buckets"] for row in told["files"]}[held.name]) == (0, "")
    Trainer(TrainConfig.from_toml(recipe, words)).run()
    assert command("validate", recipe, words[0])[0] == 2


def test_data_that_leave_a_stage_empty_are_told_with_it(recipe: Path, clips: Path, command: Command) -> None:
    for text in clips.glob("*.txt"):
        text.unlink()
    code, told = command("validate", recipe)
    assert (code, told["counts"]["problems"]) == (2, {"caption": 6, "stage": 1})
    assert told["problems"][-1]["message"] == "stage 'pictures': no sample to draw: there are none, or all weights are 0"


@pytest.mark.parametrize("name", ["validate", "cache"])
def test_stages_that_cannot_be_are_told(recipe: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([name, str(recipe), stages("frames=[5], weights={sounds=1.0}")]) == 2
    assert "stage 'last': weights of sounds, which are no group of the data" in capsys.readouterr().err

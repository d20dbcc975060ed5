"""Stages: shapes, mixes and batches from when to when, whatever the number of processes, and after a resume."""

from __future__ import annotations

import json
from collections.abc import Callable
from itertools import groupby
from pathlib import Path
from typing import Any

import pytest
from staged_objective import SEEN
from wan_train.config import TrainConfig
from wan_train.curriculum import Curriculum
from wan_train.data.buckets import Bucket
from wan_train.data.mix import Mix
from wan_train.data.shapes import Shapes
from wan_train.trainer import Trainer

GRID = (4, 8, 8)
RECIPE = """
name = "stages"
output = "{output}"
steps = 9
batch_size = 4
log_every = 1
preview_every = 0
save_every = 2
threads = 1

[objective]
name = "staged_objective:Brightness"

[data]
name = "shapes"
settings = {{frames = 1, size = [16, 16], length = 40}}

[more_data.films]
name = "shapes"
settings = {{frames = 9, size = [16, 16], length = 24, seed = 1}}

[optimiser]
lr = 1e-2

[[stages]]
name = "images"
until = 3
video = [16, 16]
frames = [5, 9]
weights = {{video = 0.0}}

[[stages]]
name = "joint"
until = 6
video = [16, 16]
frames = [5, 9]
tokens = 48
micro_batches = 2
lr = 0.5

[[stages]]
name = "larger"
until = 9
video = [16, 24]
image = [24, 24]
frames = [5, 9]
samples = 2
"""


@pytest.fixture
def recipe(tmp_path: Path) -> Callable[..., TrainConfig]:
    path = tmp_path / "stages.toml"
    path.write_text(RECIPE.format(output=tmp_path / "run"))
    SEEN.clear()
    return lambda *overrides: TrainConfig.from_toml(path, list(overrides))


def log(config: TrainConfig) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in (config.output / "log.jsonl").read_text().splitlines()]
    return [{name: value for name, value in row.items() if name != "seconds"} for row in rows]


def test_shapes_take_turns_where_a_micro_batch_could_hold_many_steps(recipe: Callable[..., TrainConfig]) -> None:
    mix = Mix({"data": Shapes(frames=1, size=(16, 16), length=400), "films": Shapes(frames=9, size=(16, 16), length=240)})
    curriculum = Curriculum(recipe('stages=[{name="a", until=9, video=[16,16], frames=[9]}]'), mix, len(mix), GRID)
    shapes = [micro.bucket for _ in range(160) for micro in curriculum.take(4)[:1]]
    longest = max(sum(1 for _ in same) for _, same in groupby(shapes))
    assert set(shapes) == {Bucket(1, 16, 16), Bucket(9, 16, 16)}
    assert longest < 20


def test_each_stage_has_its_shapes_and_its_mix(recipe: Callable[..., TrainConfig]) -> None:
    config = recipe()
    Trainer(config).run()
    rows = log(config)
    assert [row["frames"] for row in rows[:3]] == [1, 1, 1], "images alone"
    assert all(1 <= row["frames"] <= 9 for row in rows[3:])
    assert any(row["frames"] > 1 for row in rows[3:])
    shapes = {bucket for bucket, _ in SEEN}
    assert shapes <= {Bucket(1, 16, 16), Bucket(9, 16, 16), Bucket(1, 24, 24), Bucket(9, 16, 16), Bucket(9, 16, 24)}
    assert Bucket(9, 16, 16) in shapes
    assert Bucket(1, 24, 24) in shapes
    assert all(len(samples) * (1 + (bucket.frames - 1) // 4) * bucket.height * bucket.width // 64 <= 48 for bucket, samples in SEEN[3:7])
    assert [row["lr_share"] for row in rows] == [1, 1, 1, 0.5, 0.5, 0.5, 1, 1, 1]


def test_a_resume_in_a_stage_sees_what_an_undisturbed_run_sees(recipe: Callable[..., TrainConfig], tmp_path: Path) -> None:
    whole, half = recipe(f"output={tmp_path / 'whole'}"), recipe(f"output={tmp_path / 'half'}")
    Trainer(whole).run()
    seen = list(SEEN)
    for until in (2, 4, 5, 8, 9):
        SEEN.clear()
        Trainer(half).run(until=until, resume=until > 2)
    assert log(whole) == log(half)
    assert seen[-len(SEEN) :] == SEEN


def curriculum(config: TrainConfig) -> Curriculum:
    films = Shapes(frames=9, size=(16, 16), length=24, seed=1)
    mix = Mix({"data": Shapes(frames=1, size=(16, 16), length=40), "films": films})
    return Curriculum(config, mix, len(mix), GRID)


def test_an_epoch_of_a_stage_takes_each_of_its_samples_once(recipe: Callable[..., TrainConfig]) -> None:
    stages = curriculum(recipe())
    images = [sample for _ in range(10) for micro in stages.take(4) for sample in micro.samples]
    assert sorted(images) == list(range(40))
    assert stages.advance(3, spent=False)
    assert stages.position.index == 0


def test_a_stage_ends_at_its_step_or_on_a_plateau_where_it_may(recipe: Callable[..., TrainConfig]) -> None:
    stages = curriculum(recipe())
    assert [stages.advance(step, spent=True) for step in (0, 1, 2)] == [False] * 3
    assert stages.advance(3, spent=False)
    assert stages.stage is not None
    assert stages.stage.name == "joint"
    shapes = "video=[16,16], frames=[9]"
    early = recipe(f'stages=[{{name="a", until=5, {shapes}, may_end_early=true}}, {{name="b", until=9, {shapes}}}]')
    stages = curriculum(early)
    assert not stages.advance(2, spent=False)
    assert stages.advance(2, spent=True)
    assert not stages.advance(9, spent=True), "the last one ends the run"


def test_a_micro_batch_holds_no_more_samples_than_the_stage_says(recipe: Callable[..., TrainConfig]) -> None:
    stage = 'name="a", until=9, video=[16,16], frames=[9], weights={video=0.0}, tokens=40, micro_batches=2'
    free, bound = (curriculum(recipe(f"stages=[{{{stage}{more}}}]")).take(4) for more in ("", ", samples=3"))
    assert [len(micro.samples) for micro in free] == [10, 10], "what 40 tokens hold"
    assert [len(micro.samples) for micro in bound] == [3, 3]


def test_the_noise_levels_of_a_stage_have_its_shift(flow_recipe: Callable[..., TrainConfig]) -> None:
    def sigmas(trainer: Trainer) -> list[tuple[float, float]]:
        found: list[tuple[float, float]] = []
        losses = trainer.objective.losses

        def watched(batch: Any) -> Any:
            found.append((float(batch.sigma.min()), float(batch.sigma.max())))
            return losses(batch)

        trainer.objective.losses = watched  # type: ignore[method-assign]
        return found

    shape = "video=[16,16], frames=[5]"
    ends = ("until=2, shift=1e-4", "until=4, shift=1e4", "until=6")
    stages = ", ".join(f'{{name="{end}", {end}, {shape}}}' for end in ends)
    recipe = [f"stages=[{stages}]", "objective.settings.precache=false", "objective.settings.shift=1.0"]
    whole = Trainer(flow_recipe(*recipe))
    seen = sigmas(whole)
    whole.run()
    assert max(high for _, high in seen[:2]) < 0.1 < 0.9 < min(low for low, _ in seen[2:4])
    assert 0.01 < min(low for low, _ in seen[4:]) < max(high for _, high in seen[4:]) < 0.99
    Trainer(flow_recipe(*recipe)).run(overwrite=True, until=3)
    resumed = Trainer(flow_recipe(*recipe))
    again = sigmas(resumed)
    resumed.run(resume=True)
    assert again == seen[3:], "in the middle of a stage"


def test_a_shift_is_refused_where_the_objective_draws_no_noise_levels(recipe: Callable[..., TrainConfig]) -> None:
    with pytest.raises(ValueError, match=r"stages\.shift: objective 'staged_objective:Brightness' takes none"):
        Trainer(recipe('stages=[{name="a", until=9, video=[16,16], frames=[9], shift=3.0}]'))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ('[{name="a", until=8, video=[16,16]}]', "stages end at steps 8: they must rise, and the last one end the run, at 9"),
        ('[{name="a", until=4, video=[16,16]}, {name="a", until=9, video=[16,16]}]', "stages must differ in name: a, a"),
        ('[{name="a", until=9, video=[16,20], frames=[9]}]', "a bucket's size is .* in multiples of 8 and 8"),
        ('[{name="a", until=9, video=[16,16], frames=[9], weights={"sounds"=1.0}}]', "weights of sounds, which are no group of the data"),
    ],
)
def test_stages_that_cannot_be_are_told(recipe: Callable[..., TrainConfig], change: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        curriculum(recipe(f"stages={change}")).take(4)

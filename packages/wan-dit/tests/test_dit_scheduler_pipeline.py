"""Schedulers within the pipeline: settings that a list brings along, scaled noise, fresh noise."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from wan_dit.pipeline import Pipeline
from wan_dit.plugin import wan_schedulers
from wan_dit.plugins import find
from wan_dit.schedulers import Euler

PROMPT = "a red circle moves left"
SMALL: dict[str, Any] = {"frames": 5, "size": (32, 16), "guidance": 1}


@pytest.mark.parametrize("name", [spec.name for spec in wan_schedulers()])
def test_every_scheduler_makes_the_same_video_twice(name: str) -> None:
    pipe = Pipeline("tiny", scheduler=name)
    steps = getattr(find("wan_schedulers", name).load(), "steps", 2)
    first, again, other = (pipe(PROMPT, **SMALL, seed=seed, steps=steps).video for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_a_list_brings_its_steps_and_shift(recorder: Any) -> None:
    made = Pipeline("tiny", backbone=recorder, scheduler="lightx2v-4step")(PROMPT, **SMALL).manifest
    assert (made["steps"], made["shift"]) == (4, 5.0)  # not the model's 15 and 2
    assert torch.equal(torch.cat(recorder.timesteps), Euler().schedule(4, 5.0).timesteps)
    with pytest.warns(UserWarning, match="made for shift 5; the run's shift 8 is used"):
        made = Pipeline("tiny", scheduler="lightx2v-4step")(PROMPT, **SMALL, shift=8).manifest
    assert made["shift"] == 8.0


def test_steps_that_a_list_does_not_have_are_refused_before_anything_runs() -> None:
    pipe = Pipeline("tiny", scheduler="fastwan-3step")
    with pytest.raises(ValueError, match="steps is 50; this scheduler runs the 3 timesteps"):
        pipe.stream(PROMPT, **SMALL, steps=50)


@pytest.mark.parametrize(("name", "scale"), [("rcm-4step", 80 / 81), ("euler", 1.0)])
def test_the_first_noise_is_scaled_as_the_schedule_says(name: str, scale: float, recorder: Any) -> None:
    Pipeline("tiny", backbone=recorder, scheduler=name)(PROMPT, **SMALL, steps=2, seed=7)
    noise = torch.randn(recorder.latents[0].shape, generator=torch.Generator().manual_seed(7))
    assert torch.equal(recorder.latents[0], noise * scale)

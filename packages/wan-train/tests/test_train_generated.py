"""Figures of generated and of reconstructed clips: what is counted, and that a good codec and a bad one differ."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from torch import Tensor
from wan_train.data.captions import evaluation_prompts
from wan_train.data.shapes import Shapes
from wan_train.evaluation import generated
from wan_train.evaluation.generated import evaluate_model, evaluate_vae
from wan_train.evaluation.shapes import accuracy_on_true_clips
from wan_train.plugins import PluginManager, hookimpl, plugin_manager
from wan_vae.plugins import VAESpec

FIELDS = ("count", "colour", "shape", "motion", "background", "all_right")


class Faithful:
    """A VAE whose latents are the pixels; decodes them off by a constant."""

    offset = 0.02

    def encode(self, video: Tensor) -> Tensor:
        return video

    def decode(self, latents: Tensor, *, generator: Any = None) -> Tensor:
        return latents + self.offset


class Blank(Faithful):
    """Decodes grey."""

    def decode(self, latents: Tensor, *, generator: Any = None) -> Tensor:
        return torch.zeros_like(latents)


@pytest.fixture
def pm() -> PluginManager:
    """The installed plugins and one with the two VAEs."""

    class Spec(VAESpec):
        def load(self, weights: str | None = None, *, dtype: Any = None, device: Any = None) -> Any:
            return {"faithful": Faithful, "blank": Blank}[self.name]()

    class Plugin:
        @hookimpl
        def wan_vaes(self) -> list[VAESpec]:
            facts = {"target": "nowhere:Nothing", "latent_space": "pixels", "latent_channels": 3, "stride": (1, 1, 1)}
            return [Spec("faithful", **facts), Spec("blank", **facts)]

    pm = plugin_manager()
    pm.register(Plugin(), name="third-party")
    return pm


def test_a_faithful_vae_is_read_as_the_truth_is(pm: PluginManager) -> None:
    true, coded = evaluate_vae("faithful", 12, pm)
    assert list(true) == list(coded) == ["clips", *FIELDS, "psnr"]
    assert (true["clips"], coded["clips"], coded["count"]) == ("true", "reconstructed", 12)
    assert coded["psnr"] == pytest.approx(40, abs=0.01)  # 10 log10(2^2 / 0.02^2)
    assert [coded[name] for name in FIELDS[1:]] == [1.0] * 5
    assert true["all_right"] == accuracy_on_true_clips(12).overall.all_right


def test_a_blank_vae_is_not(pm: PluginManager) -> None:
    _, coded = evaluate_vae("blank", 6, pm)
    assert coded["colour"] == coded["shape"] == coded["all_right"] == 0
    assert coded["psnr"] < 10


def test_prompts_say_what_the_clips_show() -> None:
    dataset = Shapes(split="heldout", seed=7)
    figures = dataset.evaluate(dataset.video(range(8)), [generated._named(dataset, index) for index in range(8)])
    assert set(figures.values()) == {1.0}


def test_the_built_in_model_is_measured_on_seen_and_held_out_prompts(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[list[str]] = []
    evaluate = generated.evaluate
    monkeypatch.setattr(generated, "evaluate", lambda clips, prompts: asked.append(list(prompts)) or evaluate(clips, prompts))
    rows = evaluate_model("tiny", count=3, seed=4)
    assert [list(row) for row in rows] == [["prompts", *FIELDS]] * 3
    assert [(row["prompts"], row["count"]) for row in rows] == [("all", 3), ("seen", 2), ("held out", 1)]
    assert asked == [[*evaluation_prompts(2), *evaluation_prompts(1, held_out=True)]]
    shares = [row[name] for row in rows for name in FIELDS[1:] if row[name] is not None]
    assert all(0 <= share <= 1 for share in shares)
    assert json.loads(json.dumps(rows)) == rows


@pytest.mark.parametrize(("call", "count"), [(evaluate_model, 1), (evaluate_vae, 0)])
def test_too_few_clips_are_refused(call: Any, count: int) -> None:
    with pytest.raises(ValueError, match=rf"count is {count}: give [12] or more"):
        call("tiny", count)


@pytest.mark.parametrize(
    ("call", "message"), [(evaluate_model, "no model named 'tinny'.*did you mean 'tiny'"), (evaluate_vae, "no vae named")]
)
def test_an_unknown_name_says_what_is_installed(call: Any, message: str) -> None:
    with pytest.raises(LookupError, match=message):
        call("tinny", 2)

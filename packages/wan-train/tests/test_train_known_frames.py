"""Known frames as extra channels or a VACE context: the layout of `wan_dit.tasks`, what is drawn, and inputs that are added at zero."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from wan_dit import load_backbone
from wan_dit.config import DiTConfig
from wan_dit.model import WanDiT
from wan_dit.plugins import find
from wan_dit.tasks import Continuation, ImageToVideo
from wan_dit.tasks.conditioning import known_channels, vace_context
from wan_dit.tasks.task import Encoders, Target
from wan_train.config import TrainConfig
from wan_train.data.mix import Mix
from wan_train.data.shapes import Shapes
from wan_train.objectives import conditioning
from wan_train.objectives.conditioning import KNOWN, conditioning_of, known_frames, only, vace_inputs, with_input_channels
from wan_train.objectives.flow import RectifiedFlow
from wan_train.plugins import plugin_manager
from wan_train.randomness import generator
from wan_train.trainer import Trainer

Make = Callable[..., RectifiedFlow]
STRIDE = (4, 8, 8)
MICRO = {"dim": 32, "ffn_dim": 32, "freq_dim": 32, "num_heads": 2, "num_layers": 2, "in_dim": 12, "out_dim": 4}
VACE = {**MICRO, "in_dim": 4, "vace_layers": [0], "vace_in_dim": 72}


@pytest.fixture
def make(tmp_path: Path, micro_vae: Path) -> Make:
    def build(**settings: Any) -> RectifiedFlow:
        torch.manual_seed(0)
        fields = {"vae": str(micro_vae), "architecture": MICRO, "clips": 3, "preview_prompts": 2, "preview_steps": 2, **settings}
        objective = RectifiedFlow(fields, Shapes(frames=9, size=(16, 16), length=4), tmp_path, "cpu", plugin_manager())
        objective.prepare()
        nn.init.normal_(objective.backbone.head.proj.weight, std=0.1)
        return objective

    return build


def draw(sample: int, stream: str) -> torch.Generator:
    return generator(0, 0, sample, stream)


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def encode(micro_vae: Path) -> Callable[[Tensor], Tensor]:
    vae = find("wan_vaes", str(micro_vae)).load()
    return lambda frames: vae.encode(frames[None])


@pytest.fixture(scope="module")
def clip() -> Tensor:
    return Shapes(frames=9, size=(16, 16), length=1).video([0])[0]


@pytest.mark.parametrize("task", ["i2v", "flf2v", "continuation"])
def test_the_channels_are_those_that_a_generation_is_given(encode: Callable[[Tensor], Tensor], clip: Tensor, task: Any) -> None:
    """The tasks of wan-dit are asked with the frames of the clip themselves."""
    backbone = DiTConfig(**MICRO, latent_space="tiny-2", embedding_space="tiny-2").spec()
    target = Target(find("wan_models", "tiny"), backbone, (16, 16), 9)
    known = known_frames(task, 9, 4, seeded(1))
    count = int(known.sum())
    asked: Any = {
        "i2v": ImageToVideo(clip[:, 0]),
        "flf2v": ImageToVideo(clip[:, 0], clip[:, -1]),
        "continuation": Continuation(clip[:, :count], overlap=count),
    }[task]
    expected = asked.prepare(target, Encoders(encode, lambda pictures: torch.empty(0))).conditioning.extra_latents
    own = conditioning_of(task, clip, STRIDE, encode, seeded(1)).extra_latents
    assert own.shape == (1, 4 + 4, 3, 2, 2)
    torch.testing.assert_close(own, expected, atol=2e-2, rtol=0)  # a picture goes through 8 bits
    assert torch.equal(own[:, :4], expected[:, :4])
    assert torch.equal(own, known_channels(only(clip, known), known, STRIDE, encode))


@pytest.mark.parametrize("task", [*KNOWN, "mixed"])
def test_an_inverted_mask_is_found(encode: Callable[[Tensor], Tensor], clip: Tensor, task: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The planted bug, at either place: in the channels, or in what is left of the frames."""
    known = known_frames(task, 9, 4, seeded(2))
    expected = known_channels(only(clip, known), known, STRIDE, encode)
    assert torch.equal(conditioning_of(task, clip, STRIDE, encode, seeded(2)).extra_latents, expected)
    with monkeypatch.context() as planted:
        planted.setattr(conditioning, "known_channels", lambda frames, known, *rest: known_channels(frames, ~known, *rest))
        assert not torch.equal(conditioning_of(task, clip, STRIDE, encode, seeded(2)).extra_latents, expected)
    with monkeypatch.context() as planted:
        planted.setattr(conditioning, "only", lambda clip, known: only(clip, ~known))
        assert not torch.equal(conditioning_of(task, clip, STRIDE, encode, seeded(2)).extra_latents, expected)


@settings(deadline=None, max_examples=100)
@given(task=st.sampled_from([*KNOWN, "mixed"]), k=st.integers(0, 20), seed=st.integers(0, 10_000))
def test_known_frames_leave_something_to_make_and_are_what_the_task_says(task: str, k: int, seed: int) -> None:
    frames = 1 + 4 * k
    known = known_frames(task, frames, 4, seeded(seed))
    assert known.shape == (frames,)
    assert not known.all()
    assert torch.equal(known, known_frames(task, frames, 4, seeded(seed)))
    places = known.nonzero().flatten().tolist()
    if frames == 1:
        assert places == []
    elif task == "i2v":
        assert places == [0]
    elif task == "flf2v":
        assert places == [0, frames - 1]
    elif task == "continuation":
        assert places == list(range(len(places)))
        assert len(places) % 4 == 1


def test_mixed_has_all_tasks_and_continuations_of_every_length() -> None:
    drawn = [tuple(known_frames("mixed", 17, 4, seeded(seed)).nonzero().flatten().tolist()) for seed in range(400)]
    assert drawn.count((0,)) > 60
    assert drawn.count((0, 16)) > 60
    assert {5, 9, 13} <= {len(places) for places in drawn if places == tuple(range(len(places)))}
    assert any(len(places) > 2 and places[0] > 0 for places in drawn), "interpolation"


def test_vace_hides_what_is_to_be_made_and_shows_the_rest(clip: Tensor) -> None:
    """But for a control, which is the clip in grey."""
    kinds = set()
    for seed in range(80):
        frames, mask = vace_inputs(clip, 4, seeded(seed))
        assert mask.shape == (1, 9, 16, 16)
        assert set(mask.unique().tolist()) <= {0.0, 1.0}
        assert mask.any()
        grey = bool(mask.all()) and bool(frames.any())
        if grey:
            assert torch.equal(frames[0], frames[2])
        else:
            assert torch.equal(frames, clip * (1 - mask))
        per_frame = mask.flatten(2).mean(2)[0]
        kinds.add("grey" if grey else "nothing" if mask.all() else "area" if 0 < per_frame[0] < 1 else "frames")
    assert kinds == {"grey", "nothing", "area", "frames"}


def test_a_vace_context_is_that_of_a_generation_and_an_inverted_mask_is_found(encode: Callable[[Tensor], Tensor], clip: Tensor) -> None:
    frames, mask = vace_inputs(clip, 4, seeded(3))
    own = conditioning_of("vace", clip, STRIDE, encode, seeded(3)).vace
    assert own.shape == (1, 2 * 4 + 64, 3, 2, 2)
    assert torch.equal(own, vace_context(frames, mask, (), STRIDE, encode))
    assert not torch.equal(own, vace_context(clip * mask, 1 - mask, (), STRIDE, encode))


@pytest.mark.parametrize(("task", "architecture"), [("mixed", MICRO), ("i2v", MICRO), ("vace", VACE)])
def test_the_loss_sees_the_known_frames_and_their_draws_are_the_samples_own(make: Make, task: str, architecture: dict[str, Any]) -> None:
    objective = make(task=task, architecture=architecture)
    for block in objective.backbone.trunk.vace_blocks:
        nn.init.normal_(block.before_proj.weight, std=0.1)  # zero at first, as `after_proj` is
        nn.init.normal_(block.after_proj.weight, std=0.1)
    batch = objective.batch([0, 1, 2], draw, 0.0)
    alone = objective.batch([1], draw, 0.0)
    field = "vace" if task == "vace" else "extra_latents"
    whole, single = getattr(batch.conditioning, field), getattr(alone.conditioning, field)
    assert whole.device.type == "cpu"
    torch.testing.assert_close(whole[1:2], single)
    losses, facts = objective.losses(batch)
    assert torch.equal(facts["sigma"], batch.sigma)
    losses.mean().backward()
    backbone = objective.backbone
    gradient = backbone.vace_patch_embedding.weight.grad if task == "vace" else backbone.patch_embedding.weight.grad[:, 4:]
    assert gradient.any()
    assert objective.preview(objective.modules, [0, 1]).shape == (2, 3, 9, 16, 16)


def test_a_pretrained_backbone_gets_inputs_of_weight_zero_and_computes_what_it_did(make: Make, tmp_path: Path) -> None:
    torch.manual_seed(1)
    model = WanDiT(DiTConfig(**{**MICRO, "in_dim": 4, "text_dim": 96, "text_len": 32}, latent_space="tiny-2", embedding_space="tiny-2"))
    model.init_weights()
    nn.init.normal_(model.head.proj.weight, std=0.1)
    model.save_pretrained(tmp_path / "t2v")
    plain = load_backbone(str(tmp_path / "t2v"))
    torch.manual_seed(0)
    objective = make(backbone=str(tmp_path / "t2v"), init="pretrained", architecture={"in_dim": 12}, task="mixed")
    grown = objective.backbone
    grown.head.load_state_dict(plain.head.state_dict())
    assert (grown.spec.in_channels, grown.patch_embedding.weight.shape[1]) == (12, 12)
    latents, timestep, tokens = torch.randn(1, 4, 3, 2, 2), torch.tensor([500.0]), [torch.randn(5, 96)]
    with torch.no_grad():
        own = grown(torch.cat([latents, torch.randn(1, 8, 3, 2, 2)], 1), timestep, grown.encode_context(tokens))
        torch.testing.assert_close(own, plain(latents, timestep, plain.encode_context(tokens)), atol=1e-6, rtol=1e-5)
    objective.losses(objective.batch([0, 1], draw, 0.0))[0].mean().backward()
    assert grown.patch_embedding.weight.grad[:, 4:].any(), "and they learn"
    grown.save_pretrained(tmp_path / "i2v")
    assert load_backbone(str(tmp_path / "i2v")).spec.in_channels == 12
    with pytest.raises(ValueError, match=r"can only grow: it has 12, got 4"):
        with_input_channels(grown, 4)


def test_previews_over_a_mix_know_frames_of_its_first_data_set(make: Make) -> None:
    objective = make(task="mixed")
    own = objective.preview(objective.modules, [0, 1])
    objective.dataset = Mix({"data": objective.dataset, "stills": Shapes(frames=1, size=(16, 16), length=4)})
    assert torch.equal(objective.preview(objective.modules, [0, 1]), own)
    mixed = RectifiedFlow(objective.settings.model_dump(exclude={"lora"}), objective.dataset, objective.folder, "cpu", plugin_manager())
    assert mixed.shown is objective.shown


def test_a_run_trains_known_frames(flow_recipe: Callable[..., TrainConfig]) -> None:
    folder = Trainer(
        flow_recipe("steps=2", "objective.settings.task=mixed", "objective.settings.architecture.in_dim=12", "micro_batch=1")
    ).run()
    assert load_backbone(str(folder / "backbone")).spec.in_channels == 12


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"task": "t2v"}, r"task = 't2v': backbone 'wan-dit' takes 8 channels of known frames: use i2v, flf2v or mixed"),
        ({"task": "i2v", "architecture": {**MICRO, "in_dim": 4}}, r"needs 8 channels .* takes 0: set architecture.in_dim = 12"),
        ({"task": "vace"}, r"takes no VACE context"),
        ({"task": "i2v", "architecture": VACE}, r"train it with task = 'vace'"),
        ({"task": "mixed", "architecture": {**MICRO, "image_dim": 8}}, r"reads image tokens"),
        ({"task": "v2v"}, r"task: .*'t2v', 'i2v'"),
    ],
)
def test_a_task_that_the_backbone_has_no_inputs_for_is_refused(make: Make, given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        make(**given)
    assert "\n" not in str(caught.value)

"""Tasks against the official pipelines (case `conditioning`): masks, layouts, noise, times, experts and final latents."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor
from wan_dit.contracts import Conditioning
from wan_dit.events import Step
from wan_dit.pipeline import Pipeline
from wan_dit.plugins import BackboneSpec, VideoModelSpec
from wan_dit.sizes import area_size, best_output_size, keeps_shape
from wan_dit.tasks import Continuation, ImageToVideo, Target, TextToVideo, Vace
from wan_dit.tasks.conditioning import known_channels, vace_context
from wan_dit.tasks.pictures import as_tensor, covered, stretched
from wan_dit.tasks.task import Encoders

GOLDEN = Path(__file__).parent / "golden"
RUNS = {run["name"]: run for run in json.loads((GOLDEN / "conditioning.json").read_text())["runs"]}
TENSORS = load_file(GOLDEN / "conditioning.safetensors")
SIZES = json.loads((GOLDEN / "sizes.json").read_text())
POSITIVE, NEGATIVE = "positive", "negative"


class FakeVAE:
    """The fake of the golden case: block means of the colours; keeps the latents that it is to decode."""

    def __init__(self, stride: tuple[int, int, int], channels: int) -> None:
        self.channels, self.stride = channels, stride
        self.spec = SimpleNamespace(name="fake", latent_space="x", latent_channels=channels, stride=stride)
        self.decoded: Tensor | None = None

    def encode(self, video: Tensor) -> Tensor:
        side = self.stride[1]
        groups = [video[:, :, :1], *video[:, :, 1:].split(4, dim=2)] if video.shape[2] > 1 else [video]
        means = torch.stack([F.avg_pool2d(group.mean(2), side) for group in groups], dim=2)
        c = torch.arange(self.channels)
        gain = (1 + c / 16)[None, :, None, None, None]
        return means[:, c % 3] * gain + 0.01 * c[None, :, None, None, None]

    def decode(self, latents: Tensor, *, generator: Any = None) -> Tensor:
        self.decoded = latents
        t, h, w = latents.shape[2:]
        return torch.zeros(1, 3, 1 + (t - 1) * 4, h * self.stride[1], w * self.stride[2])


class FakeBackbone:
    """The fake of the golden case, which remembers what it was given."""

    def __init__(self, spec: BackboneSpec) -> None:
        self.spec = spec
        self.calls: list[SimpleNamespace] = []

    def encode_context(self, text: list[Tensor], conditioning: Conditioning | None = None) -> Any:
        return float(text[0][0, 0])

    def __call__(self, latents: Tensor, timestep: Tensor, context: float, conditioning: Conditioning | None = None) -> Tensor:
        self.calls.append(SimpleNamespace(latents=latents, timestep=timestep, conditioning=conditioning))
        t = timestep.max()
        return torch.sin(3 * latents) * (0.5 + t / 1000) + 0.1 * latents + 0.05 * context


class FakeText:
    spec = SimpleNamespace(name="fake", embedding_space="x", embed_dim=1, max_tokens=9)

    def encode(self, prompts: list[str]) -> list[Tensor]:
        return [torch.full((1, 1), 1.0 if prompt == POSITIVE else -0.5) for prompt in prompts]


class FakeImages:
    spec = SimpleNamespace(name="fake", image_space="x", image_dim=4, tokens=3)

    def __init__(self) -> None:
        self.seen: list[Tensor] = []

    def encode(self, pictures: list[Tensor]) -> Tensor:
        self.seen = pictures
        return torch.ones(len(pictures), 3, 4)


def spec(stride: tuple[int, int, int] = (4, 8, 8), channels: int = 16, **facts: Any) -> BackboneSpec:
    return BackboneSpec("fake", "nowhere:X", "x", channels, stride, "x", 1, 9, **facts)


def model(**facts: Any) -> VideoModelSpec:
    return VideoModelSpec("fake", "b", "v", "t", negative_prompt=NEGATIVE, **facts)


def run_golden(run: dict[str, Any], task: Any, facts: dict[str, Any], backbone: BackboneSpec, size: tuple[int, int] | None = None) -> Any:
    """The pipeline on the fakes with the settings of a golden run; returns its parts."""
    guidance = run["guide_scale"]
    area = run.get("max_area")
    own = model(
        steps=run["sampling_steps"], shift=run["shift"], guidance=tuple(guidance) if isinstance(guidance, list) else guidance,
        size=tuple(run["size"]) if area is None else (area, 1), frames=run["frame_num"], **facts,
    )  # fmt: skip
    parts = {"vae": FakeVAE(backbone.stride, backbone.latent_channels), "text_encoder": FakeText(), "backbone": FakeBackbone(backbone)}
    if own.low_noise_backbone:
        parts["low_noise_backbone"] = FakeBackbone(backbone)
    if backbone.image_dim:
        parts["image_encoder"] = FakeImages()
    solver = {"unipc": "wan-dit:unipc", "dpm++": "wan-dit:dpm++"}[run["sample_solver"]]
    Pipeline(own, **parts, scheduler=solver, compat="official")(POSITIVE, task=task, seed=run["seed"], size=size)
    return SimpleNamespace(**parts)


def golden(name: str) -> Tensor:
    return TENSORS[name]


def image(name: str) -> Image.Image:
    return Image.fromarray(golden(name).numpy())


def check_loop(name: str, parts: Any) -> None:
    """Times, first noise and final latents."""
    calls = parts.backbone.calls + (parts.low_noise_backbone.calls if hasattr(parts, "low_noise_backbone") else [])
    assert len(calls) == RUNS[name]["model_calls"]
    times = torch.stack([call.timestep.max() for call in calls[::2]]).long()
    assert torch.equal(times, golden(f"outputs/{name}/timesteps"))
    torch.testing.assert_close(parts.vae.decoded[0], golden(f"outputs/{name}/final_latent"), atol=5e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["i2v21_F5", "i2v21_F13", "i2v21_F81"])
def test_image_to_video(name: str) -> None:
    parts = run_golden(RUNS[name], ImageToVideo(image(f"inputs/{name}/image")), {"task": "i2v"}, spec(in_channels=36, image_dim=4))
    check_loop(name, parts)
    first = parts.backbone.calls[0]
    assert torch.equal(first.latents[0], golden(f"outputs/{name}/noise"))
    y = golden(f"outputs/{name}/y")
    assert torch.equal(first.conditioning.extra_latents[0, :4], y[:4]), "the mask is exact"
    torch.testing.assert_close(first.conditioning.extra_latents[0], y, atol=2e-5, rtol=0)
    assert all(torch.equal(call.conditioning.extra_latents, first.conditioning.extra_latents) for call in parts.backbone.calls)
    assert torch.equal(parts.image_encoder.seen[0], as_tensor(image(f"inputs/{name}/image"))), "the encoder sees it at its own size"


def test_first_and_last_frame() -> None:
    name = "flf2v21_F81"
    task = ImageToVideo(image(f"inputs/{name}/first_image"), image(f"inputs/{name}/last_image"))
    parts = run_golden(RUNS[name], task, {"task": "flf2v"}, spec(in_channels=36, image_dim=4, image_tokens=514))
    check_loop(name, parts)
    y = golden(f"outputs/{name}/y")
    found = parts.backbone.calls[0].conditioning
    assert torch.equal(found.extra_latents[0, :4], y[:4])
    torch.testing.assert_close(found.extra_latents[0], y, atol=2e-5, rtol=0)
    assert found.image_context.shape == (1, 6, 4), "tokens of both images in one row"


def test_two_experts_from_an_image() -> None:
    name = "i2v22_F9"
    facts = {"task": "i2v", "low_noise_backbone": "l", "boundary": 0.9}
    parts = run_golden(RUNS[name], ImageToVideo(image(f"inputs/{name}/image")), facts, spec(in_channels=36))
    check_loop(name, parts)
    torch.testing.assert_close(parts.backbone.calls[0].conditioning.extra_latents[0], golden(f"outputs/{name}/y"), atol=2e-5, rtol=0)
    check_experts(name, parts)


def test_two_experts_from_text() -> None:
    name = "t2v22"
    parts = run_golden(RUNS[name], TextToVideo(), {"low_noise_backbone": "l", "boundary": 0.875}, spec())
    check_loop(name, parts)
    check_experts(name, parts)


def check_experts(name: str, parts: Any) -> None:
    high, low = (len(part.calls) // 2 for part in (parts.backbone, parts.low_noise_backbone))
    assert high * "H" + low * "L" == RUNS[name]["experts"]


@pytest.mark.parametrize("name", ["ti2v22_F5", "ti2v22_F13"])
def test_a_first_frame_stays_as_it_is(name: str) -> None:
    picture = image(f"inputs/{name}/image")
    parts = run_golden(RUNS[name], ImageToVideo(picture), {"task": "ti2v"}, spec((4, 16, 16), 48))
    check_loop(name, parts)
    first = parts.backbone.calls[0].latents
    torch.testing.assert_close(first[0], golden(f"outputs/{name}/model_input_first"), atol=2e-5, rtol=0)
    tokens = first.shape[3] * first.shape[4] // 4
    times = torch.stack([call.timestep[0].repeat_interleave(tokens) for call in parts.backbone.calls[::2]])
    assert torch.equal(times, golden(f"outputs/{name}/token_timesteps"))
    size = tuple(RUNS[name]["output_size_wh"])
    assert best_output_size(picture.size, RUNS[name]["max_area"], (32, 32)) == size
    resized = ((as_tensor(covered(picture, size)) + 1) * 127.5).round().byte().permute(1, 2, 0)
    assert torch.equal(resized, golden(f"outputs/{name}/resized_image"))


def test_the_model_of_first_frames_from_text_alone() -> None:
    name = "ti2v22_text"
    parts = run_golden(RUNS[name], TextToVideo(), {"task": "ti2v"}, spec((4, 16, 16), 48))
    check_loop(name, parts)
    assert torch.equal(parts.backbone.calls[0].latents[0], golden(f"outputs/{name}/noise"))
    times = torch.cat([call.timestep for call in parts.backbone.calls[::2]])[:, None].expand(-1, 12)
    assert torch.equal(times, golden(f"outputs/{name}/token_timesteps"))


@pytest.mark.parametrize(("name", "count"), [("vace_norefs", 0), ("vace_2refs", 2)])
def test_the_context_of_vace(name: str, count: int) -> None:
    vae = FakeVAE((4, 8, 8), 16)
    references = [golden(f"inputs/{name}/refs/{i}")[:, 0] for i in range(count)]
    frames, mask = golden(f"inputs/{name}/frames"), golden(f"inputs/{name}/mask")
    context = vace_context(frames, mask, references, vae.stride, lambda video: vae.encode(video[None]))
    expected = golden(f"outputs/{name}/context")
    torch.testing.assert_close(context[0, :32], expected[:32], atol=2e-5, rtol=0)
    assert torch.equal(context[0, 32:], expected[32:]), "the mask is exact"
    # and the same through the task
    high, wide = frames.shape[2:]
    target = Target(model(task="vace"), spec(vace=True), (wide, high), frames.shape[1])
    prepared = Vace(frames, mask, tuple(references)).prepare(target, Encoders(lambda video: vae.encode(video[None]), NotImplemented))
    torch.testing.assert_close(prepared.conditioning.vace[0], expected, atol=1.2e-2, rtol=0)  # references pass 8-bit pictures
    assert prepared.front == count


@pytest.mark.parametrize(("name", "frames", "known"), [("animate_mask_1", 17, 1), ("animate_mask_5", 13, 5), ("animate_mask_0", 9, 0)])
def test_masks_of_several_known_frames(name: str, frames: int, known: int) -> None:
    vae, expected = FakeVAE((4, 8, 8), 16), golden(f"outputs/{name}")
    video = torch.zeros(3, frames, expected.shape[2] * 8, expected.shape[3] * 8)
    channels = known_channels(video, torch.arange(frames) < known, vae.stride, lambda video: vae.encode(video[None]))
    assert torch.equal(channels[0, :4], expected)


@pytest.mark.parametrize("row", SIZES["best_output_size"], ids=lambda row: f"{row['w']}x{row['h']}-{row['area']}")
def test_the_size_of_a_first_frame(row: dict[str, Any]) -> None:
    assert best_output_size((row["w"], row["h"]), row["area"], (row["dw"], row["dh"])) == tuple(row["out_wh"])


@pytest.mark.parametrize("row", SIZES["i2v_latent_size"], ids=lambda row: f"{row['w']}x{row['h']}-{row['area']}")
def test_the_size_of_an_image(row: dict[str, Any]) -> None:
    size = area_size((row["w"], row["h"]), row["area"], (16, 16))
    assert size == (8 * row["lat_w"], 8 * row["lat_h"])
    assert keeps_shape((row["w"], row["h"]), size, (16, 16)), "the picture is stretched to it, as the official code does"


def test_a_video_is_continued_by_every_scheme() -> None:
    vae = FakeVAE((4, 8, 8), 16)
    video = torch.rand(3, 12, 32, 32) * 2 - 1
    encoders = Encoders(lambda frames: vae.encode(frames[None]), lambda pictures: torch.ones(1, 3, 4))
    task = Continuation(video, overlap=5)
    for backbone, kind in ((spec(in_channels=36, image_dim=4), "i2v"), (spec(vace=True), "vace"), (spec(), "ti2v")):
        target = Target(model(task=kind), backbone, (32, 32), 13)
        task.check(target)
        made = task.prepare(target, encoders)
        known = vae.encode(video[None, :, -5:])
        if kind == "ti2v":
            assert made.known is not None
            assert torch.equal(made.known, known)
            continue
        assert made.conditioning is not None
        context = made.conditioning.vace if kind == "vace" else made.conditioning.extra_latents
        assert context is not None
        latents = context[:, :16] if kind == "vace" else context[:, 4:]
        assert torch.equal(latents[:, :, :2], known)
        assert torch.equal(latents[:, :, 2:], vae.encode(torch.zeros(1, 3, 13, 32, 32))[:, :, 2:])
    with pytest.raises(ValueError, match="takes no video to continue: it makes videos from text alone"):
        task.check(Target(model(), spec(), (32, 32), 13))
    with pytest.raises(ValueError, match="overlap must be 1 \\+ a multiple of 4, got 6; nearest: 5"):
        replace(task, overlap=6).check(target)
    with pytest.raises(ValueError, match="leaves nothing to make"):
        replace(task, overlap=13).check(target)


def test_known_frames_are_put_back_and_their_time_is_zero() -> None:
    """Of a video that is continued more than one latent frame is known."""
    video = torch.rand(3, 12, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    backbone, vae = FakeBackbone(spec((4, 16, 16), 48)), FakeVAE((4, 16, 16), 48)
    own = model(task="ti2v", steps=3, shift=5.0, guidance=2.0, size=(64, 64), frames=13)
    pipe = Pipeline(own, backbone=backbone, vae=vae, text_encoder=FakeText())
    predicted = [step.denoised for step in pipe.stream(POSITIVE, task=Continuation(video, overlap=5)) if isinstance(step, Step)]
    known = vae.encode(video[None, :, -5:])
    assert len(backbone.calls) == 6
    for call in backbone.calls:
        assert torch.equal(call.latents[:, :, :2], known)
        assert not torch.equal(call.latents[:, :, 2:], torch.zeros_like(call.latents[:, :, 2:]))
        assert call.timestep.tolist() == [[0, 0, call.timestep.max(), call.timestep.max()]]
    assert all(torch.equal(latents[:, :, :2], known) for latents in (*predicted, vae.decoded))
    first = pipe.parts["scheduler"].schedule(3, 5.0)
    calls = [backbone(call.latents, call.timestep, context) for call, context in zip(backbone.calls[:2], (1.0, -0.5), strict=True)]
    expected = backbone.calls[0].latents - first.sigmas[0] * (calls[1] + 2 * (calls[0] - calls[1]))
    torch.testing.assert_close(predicted[0][:, :, 2:], expected[:, :, 2:])


@pytest.mark.parametrize("references", [0, 2])
def test_the_frames_of_references_are_dropped_at_the_front(references: int) -> None:
    backbone, vae = FakeBackbone(spec(vace=True)), FakeVAE((4, 8, 8), 16)
    own = model(task="vace", steps=2, shift=5.0, guidance=2.0, size=(32, 32), frames=9)
    pipe = Pipeline(own, backbone=backbone, vae=vae, text_encoder=FakeText())
    task = Vace(references=tuple(torch.full((3, 32, 32), 0.5 + i / 4) for i in range(references)))
    last = [step.state for step in pipe.stream(POSITIVE, task=task) if isinstance(step, Step)][-1]
    assert last.latents.shape[2] == 3 + references
    assert torch.equal(vae.decoded, last.latents[:, :, references:])


def test_outpainting_keeps_the_middle_and_makes_what_is_around() -> None:
    vae, clip = FakeVAE((4, 8, 8), 16), torch.full((3, 5, 16, 32), 0.5)
    target = Target(model(task="vace"), spec(vace=True), (64, 64), 5)
    made = Vace(clip, outpaint=True).prepare(target, Encoders(lambda video: vae.encode(video[None]), NotImplemented))
    middle = torch.zeros(8, 8, dtype=torch.bool)
    middle[2:6] = True  # 64 x 32 pixels
    inside = torch.zeros(3, 5, 64, 64)
    inside[:, :, 16:48] = 0.5
    torch.testing.assert_close(made.conditioning.vace[:, :16], vae.encode(inside[None]))
    assert torch.equal(made.conditioning.vace[:, 16:32], vae.encode(torch.zeros_like(inside)[None])), "grey is made anew"
    assert torch.equal(made.conditioning.vace[0, 32:] == 0, middle.expand(64, 2, 8, 8))


def test_known_frames_are_kept_by_vace() -> None:
    vae, first = FakeVAE((4, 8, 8), 16), torch.full((3, 32, 32), 0.5)
    target = Target(model(task="vace"), spec(vace=True), (32, 32), 9)
    made = ImageToVideo(first, -first).prepare(target, Encoders(lambda video: vae.encode(video[None]), NotImplemented))
    frames = torch.zeros(1, 3, 9, 32, 32)
    assert torch.equal(made.conditioning.vace[:, 16:32], vae.encode(frames)), "all that is made anew is grey"
    frames[:, :, 0], frames[:, :, -1] = 0.5, -0.5
    torch.testing.assert_close(made.conditioning.vace[:, :16], vae.encode(frames), atol=1e-2, rtol=0)
    assert (made.conditioning.vace[0, 32:] == 1).all(), "as in the official code: none of the frames 1, 4 and 7 is known"


@pytest.mark.parametrize("compat", ["fixed", "official"])
def test_a_picture_of_another_shape_is_cropped_and_not_stretched(compat: Any) -> None:
    """The official code takes no size of one's own: there every picture is stretched to a size of its shape."""
    generator = torch.Generator().manual_seed(0)
    first, last = (torch.rand(3, *size, generator=generator).mul(255).round() / 127.5 - 1 for size in ((32, 64), (64, 64)))
    seen: list[Tensor] = []
    encoders = Encoders(lambda video: seen.append(video) or torch.zeros(1, 16, 21, 4, 4), NotImplemented)
    target = Target(model(task="flf2v"), spec(in_channels=36), (32, 32), 81, compat)
    ImageToVideo(first, last).prepare(target, encoders)
    expected = first[:, :, 16:48] if compat == "fixed" else stretched(first, (32, 32))
    torch.testing.assert_close(seen[0][:, 0], expected, atol=1e-6, rtol=0)
    assert not seen[0][:, 1:-1].any()
    if compat == "fixed":  # brought to the shape of the first, whose middle is taken
        torch.testing.assert_close(seen[0][:, -1], last[:, 16:48, 16:48], atol=1e-6, rtol=0)


def test_a_model_that_lacks_its_image_encoder_is_told_at_once() -> None:
    backbone = FakeBackbone(spec(in_channels=36, image_dim=4))
    pipe = Pipeline(model(task="i2v"), backbone=backbone, vae=FakeVAE((4, 8, 8), 16), text_encoder=FakeText())
    with pytest.raises(ValueError, match="backbone 'fake' reads image tokens, and the model has no image encoder: give one"):
        pipe.stream(POSITIVE, task=ImageToVideo(torch.zeros(3, 32, 32)), size=(32, 32))


def test_the_image_encoder_sees_the_first_known_frame() -> None:
    video, seen = torch.rand(3, 12, 32, 32) * 2 - 1, []
    encoders = Encoders(lambda video: torch.zeros(1, 16, 4, 4, 4), lambda pictures: seen.extend(pictures) or torch.ones(1, 3, 4))
    Continuation(video, overlap=5).prepare(Target(model(task="i2v"), spec(in_channels=36, image_dim=4), (32, 32), 13), encoders)
    assert len(seen) == 1
    assert torch.equal(seen[0], video[:, -5])

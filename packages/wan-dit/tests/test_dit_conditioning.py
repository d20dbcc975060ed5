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
from wan_dit.pipeline import Pipeline
from wan_dit.plugins import BackboneSpec, VideoModelSpec
from wan_dit.sizes import area_size, best_output_size, keeps_shape
from wan_dit.tasks import Continuation, ImageToVideo, Target, TextToVideo, Vace
from wan_dit.tasks.conditioning import known_channels, vace_context
from wan_dit.tasks.pictures import as_tensor, covered
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

"""Tasks from files to videos: small random models of every scheme beside the built-in VAE and text encoder."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from wan_dit.cli import main
from wan_dit.config import DiTConfig
from wan_dit.events import Step
from wan_dit.manifest import Manifest
from wan_dit.media import write_video
from wan_dit.model import WanDiT
from wan_dit.pipeline import Pipeline
from wan_dit.plugins import VideoModelSpec, find
from wan_dit.tasks import Continuation, ImageToVideo, TextToVideo, Vace, task_of
from wan_dit.tasks.pictures import on_white
from wan_dit.tasks.record import from_record, recorded

PROMPT = "a red circle moves left"
Install = Callable[..., None]
KINDS: dict[str, dict[str, Any]] = {
    "i2v": {"in_dim": 36},
    "vace": {"vace_layers": (0,), "vace_in_dim": 96},
    "ti2v": {},
}
PLUGIN = """
from wan_dit.plugins import BackboneSpec, VideoModelSpec, hookimpl

@hookimpl
def wan_models():
    shared = dict(vae="wan-vae:tiny", text_encoder="wan-text:tiny", steps=2, shift=2.0, guidance=2.0, size=(64, 64), frames=9, fps=8)
    return [VideoModelSpec(f"small-{{kind}}", backbone=f"wan-small:small-{{kind}}", task=kind, **shared) for kind in {kinds!r}]

@hookimpl
def wan_backbones():
    from wan_dit.checkpoint import describe
    from dataclasses import replace
    return [replace(describe({folder!r} + "/" + kind), name=f"small-{{kind}}", weights={folder!r} + "/" + kind) for kind in {kinds!r}]
"""


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A backbone of every scheme, random, on disk."""
    folder = tmp_path_factory.mktemp("backbones")
    for seed, (kind, architecture) in enumerate(KINDS.items()):
        config = DiTConfig(
            dim=32, ffn_dim=64, num_heads=2, num_layers=2, text_dim=96, text_len=32, freq_dim=32,
            **{"in_dim": 16, "out_dim": 16, "latent_space": "tiny-2", "embedding_space": "tiny-2", **architecture},
        )  # fmt: skip
        model, generator = WanDiT(config), torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in model.parameters():
                scale = 0.4 if parameter.ndim == 1 else parameter[0].numel() ** -0.5
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)
        model.save_pretrained(folder / kind)
    return folder


@pytest.fixture
def small(folders: Path, install: Install) -> list[str]:
    """The models small-i2v, small-vace and small-ti2v, installed by another package."""
    install("wan-small", PLUGIN.format(folder=str(folders), kinds=list(KINDS)))
    return [f"small-{kind}" for kind in KINDS]


def draw(path: Path, size: tuple[int, int] = (96, 64), colour: tuple[int, int, int] = (220, 30, 30)) -> Path:
    """A picture with a disc."""
    wide, high = size
    inside = (np.arange(wide) - wide / 2) ** 2 + (np.arange(high)[:, None] - high / 2) ** 2 < (high / 4) ** 2
    Image.fromarray(np.where(inside[..., None], colour, (0, 0, 0)).astype(np.uint8)).save(path)
    return path


def film(path: Path, frames: int = 24, size: tuple[int, int] = (96, 64), fps: int = 8) -> Path:
    wide, high = size
    x, y, t = torch.arange(wide)[None, None], torch.arange(high)[None, :, None], torch.arange(frames)[:, None, None]
    disc = ((x - 10 - 3 * t) ** 2 + (y - high / 2) ** 2 < 15**2).float() * 2 - 1
    write_video(torch.stack([disc, -torch.ones_like(disc), -disc])[None], path, fps)
    return path


def test_an_image_becomes_a_video_of_its_shape(small: list[str], here: Path) -> None:
    draw(here / "disc.png")
    run = ["generate", PROMPT, "--model", "small-i2v", "--image", "disc.png", "--output", "a.mp4", "--device", "cpu"]
    assert main(run) == 0
    record = json.loads((here / "a.json").read_text())
    assert record["size"] == [64, 48], "about as many pixels as the model's own size, in the shape of the picture"
    assert record["task"]["name"] == "i2v"
    assert record["task"]["inputs"]["image"]["path"] == str(here / "disc.png")
    assert main(["replay", "a.json", "--device", "cpu"]) == 0
    draw(here / "disc.png", colour=(0, 200, 0))
    assert main(["replay", "a.json"]) == 2, "the picture is another"


def test_a_changed_or_lost_input_is_told(small: list[str], here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    draw(here / "disc.png")
    assert main(["generate", PROMPT, "--model", "small-ti2v", "--image", "disc.png", "--output", "a.mp4", "--device", "cpu"]) == 0
    capsys.readouterr()
    (here / "disc.png").rename(here / "other.png")
    assert main(["replay", "a.json"]) == 2
    assert capsys.readouterr().err == f"wan-dit: error: the image of the run, '{here / 'disc.png'}', is gone\n"
    draw(here / "disc.png", colour=(0, 0, 250))
    assert main(["replay", "a.json"]) == 2
    assert "disc.png', has changed since" in capsys.readouterr().err


def videos(model: str, folder: Path, *tasks: Any, **settings: Any) -> list[Tensor]:
    pipe = Pipeline(model, **settings)
    return [pipe(PROMPT, task=task, size=(64, 48), frames=9).video for task in tasks]


@pytest.mark.parametrize("kind", KINDS)
def test_the_first_frame_matters_and_so_does_the_seed(small: list[str], here: Path, kind: str) -> None:
    red, green = draw(here / "a.png"), draw(here / "b.png", colour=(0, 200, 0))
    one, again, other = videos(f"small-{kind}", here, ImageToVideo(red), ImageToVideo(str(red)), ImageToVideo(green))
    assert torch.equal(one, again)
    assert not torch.allclose(one, other, atol=1e-2)


def test_a_first_frame_that_stays_is_what_is_decoded(small: list[str], here: Path) -> None:
    """With latent frame 0 put back after every step, frame 0 is the picture as the VAE sees it, whatever the model does."""
    picture = draw(here / "a.png", size=(64, 64))
    pipe = Pipeline("small-ti2v")
    video = pipe(PROMPT, task=ImageToVideo(picture), size=(64, 64), frames=9).video
    pixels = torch.from_numpy(np.array(Image.open(picture))).permute(2, 0, 1).float() / 127.5 - 1
    vae = pipe.parts["vae"]
    expected = vae.decode(vae.encode(pixels[None, :, None]))
    assert torch.allclose(video[:, :, :1], expected, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_a_video_is_continued(small: list[str], here: Path, kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    film(here / "film.mp4")
    run = ["generate", PROMPT, "--model", f"small-{kind}", "--video", "film.mp4", "--overlap", "5", "--output", "a.mp4"]
    assert main([*run, "--device", "cpu"]) == 0
    record = Manifest.model_validate_json((here / "a.json").read_bytes())
    assert (record.task.name, record.task.settings, record.size) == (
        "continuation",
        {"overlap": 5},
        (80, 48) if kind == "ti2v" else (64, 48),
    )
    assert main(["replay", "a.json"]) == 0
    assert main([*run[:-4], "--overlap", "6", "--overwrite", "--output", "a.mp4"]) == 2
    assert "overlap must be 1 + a multiple of 4, got 6; nearest: 5" in capsys.readouterr().err


def test_vace_edits_follows_outpaints_and_takes_references(small: list[str], here: Path) -> None:
    source, mask = film(here / "film.mp4"), here / "mask.png"
    Image.fromarray((np.arange(96) > 48)[None].repeat(64, 0).astype(np.uint8) * 255).save(mask)
    reference = draw(here / "r.png", size=(40, 80))
    tasks = [
        Vace(), Vace(source), Vace(source, mask), Vace(source, outpaint=True), Vace(source, mask, (reference,)),
        Vace(source, mask, (reference,), scale=0.5), Vace(references=(reference, reference)), ImageToVideo(reference), TextToVideo(),
    ]  # fmt: skip
    made = videos("small-vace", here, *tasks)
    assert all(video.shape == (1, 3, 9, 48, 64) for video in made), "frames of references are no frames of the video"
    assert torch.equal(made[0], made[-1]), "text alone is a context that is made anew everywhere"
    assert not any(torch.allclose(made[i], made[j], atol=1e-3) for i in range(8) for j in range(i))


def test_a_video_gives_its_length_and_shape_to_what_vace_makes(small: list[str], here: Path) -> None:
    film(here / "film.mp4", frames=7)
    assert main(["generate", PROMPT, "--model", "small-vace", "--video", "film.mp4", "--output", "a.mp4", "--device", "cpu"]) == 0
    record = json.loads((here / "a.json").read_text())
    assert (record["frames"], record["size"]) == (5, [64, 48])


BAD: list[tuple[str, list[str], str]] = [
    ("tiny", ["--image", "disc.png"], "model 'tiny' takes no image: it makes videos from text alone"),
    ("tiny", ["--video", "film.mp4"], "model 'tiny' takes no video to continue"),
    ("tiny", ["--reference", "disc.png"], "model 'tiny' takes no mask, reference image or video to edit"),
    ("small-i2v", [], "model 'small-i2v' takes no text alone: it makes videos from an image (--image;"),
    ("small-i2v", ["--image", "nowhere.png"], "no image at 'nowhere.png'"),
    ("small-i2v", ["--image", "film.mp4"], "'film.mp4' is not an image that can be read"),
    ("small-i2v", ["--last-image", "disc.png"], "a last image needs a first one (--image)"),
    ("small-i2v", ["--image", "disc.png", "--video", "film.mp4"], "give an image, or a video with what belongs to it, not both"),
    ("small-i2v", ["--video", "film.mp4", "--mask", "disc.png"], "takes no mask, reference image or video to edit"),
    ("small-i2v", ["--image", "disc.png", "--overlap", "5"], "overlap is for a video that is continued"),
    ("small-ti2v", ["--image", "disc.png", "--last-image", "disc.png"], "takes a first image alone"),
    ("small-i2v", ["--video", "short.mp4"], "the video has 2 frames at 8 a second, 5 are needed"),
    ("small-vace", ["--mask", "disc.png"], "a mask needs the video that it is for (--video)"),
    ("small-vace", ["--video", "film.mp4", "--mask", "disc.png", "--outpaint"], "give a mask or outpaint, not both"),
    ("small-vace", ["--video", "film.mp4", "--frames", "81"], "has 24 frames at 8 a second, 81 are needed"),
    ("small-vace", ["--video", "disc.txt"], "disc.txt"),
    ("small-i2v", ["--image", "nowhere.png", "--size", "64x64"], "no image at 'nowhere.png'"),
    ("small-i2v", ["--image", "disc.png", "--last-image", "nowhere.png"], "no image at 'nowhere.png'"),
    ("small-vace", ["--reference", "nowhere.png"], "no image at 'nowhere.png'"),
    ("small-vace", ["--video", "film.mp4", "--mask", "nowhere.png"], "no mask at 'nowhere.png'"),
    ("small-vace", ["--video", "film.mp4", "--mask", "short.mp4"], "the mask has 2 frames at 8 a second, 9 are needed: give a longer mask"),
    ("small-vace", ["--video", "film.mp4", "--mask", "tall.png"], "the mask is 40x80, the video 96x64: give a mask in the shape of"),
    ("small-vace", ["--vace-scale", "nan"], "the scale of VACE must be a number such as 1, got nan"),
]


@pytest.mark.parametrize(("model", "options", "message"), BAD, ids=[f"{model}-{'-'.join(options)}" for model, options, _ in BAD])
def test_what_a_model_does_not_take_is_one_line(
    small: list[str], here: Path, capsys: pytest.CaptureFixture[str], model: str, options: list[str], message: str
) -> None:
    draw(here / "disc.png"), film(here / "film.mp4"), film(here / "short.mp4", frames=2), (here / "disc.txt").write_text("x")
    draw(here / "tall.png", size=(40, 80))
    before = sorted(here.iterdir())
    assert main(["generate", PROMPT, "--model", model, *options, "--output", "a.mp4", "--device", "cpu"]) == 2
    err = capsys.readouterr().err.splitlines()
    assert message in err[-1]
    assert err[-1].startswith("wan-dit: error: ")
    assert not any("loading" in line for line in err), "said before anything is read"
    assert sorted(here.iterdir()) == before


def test_an_input_that_goes_while_the_run_is_on_does_not_end_it(small: list[str], here: Path) -> None:
    picture = draw(here / "disc.png")
    for event in Pipeline("small-i2v").stream(PROMPT, task=ImageToVideo(picture), frames=5, size=(32, 32)):
        if isinstance(event, Step):
            picture.unlink(missing_ok=True)
    assert event.result.manifest["task"]["inputs"]["image"]["path"] == str(picture)


def test_a_name_that_is_no_text_is_recorded_all_the_same(small: list[str], here: Path) -> None:
    picture = here / os.fsdecode(b"caf\xe9.png")
    draw(here / "disc.png").rename(picture)
    pipe = Pipeline("small-i2v")
    result = pipe(PROMPT, task=ImageToVideo(picture), frames=5, size=(32, 32))
    result.save(here / "a.mp4")
    assert json.loads((here / "a.json").read_text())["task"]["inputs"]["image"]["path"] == str(here / r"caf\udce9.png")


def test_tasks_of_objects_in_memory(small: list[str]) -> None:
    image = Image.fromarray(np.full((64, 64, 3), 200, dtype=np.uint8))
    tensor = torch.full((3, 64, 64), 200 / 127.5 - 1)
    one, other = videos("small-i2v", Path(), ImageToVideo(image), ImageToVideo(tensor))
    assert torch.equal(one, other)
    clip = torch.rand(3, 9, 48, 64) * 2 - 1
    result = Pipeline("small-vace")(PROMPT, task=Vace(clip, torch.ones(1, 1, 48, 64)), frames=9, size=(64, 48))
    assert result.manifest["task"]["inputs"]["video"]["path"] is None
    for wrong, message in ((clip * 3, "outside it"), (clip[:1], r"tensor \[3, T, H, W\]"), (clip.byte(), r"floating-point tensor")):
        with pytest.raises(ValueError, match=message):
            Pipeline("small-vace").stream(PROMPT, task=Vace(wrong))


def test_inputs_choose_the_task() -> None:
    assert isinstance(task_of(vace=False), TextToVideo)
    assert isinstance(task_of(vace=True, image="a.png"), ImageToVideo)
    assert isinstance(task_of(vace=False, video="a.mp4"), Continuation)
    assert isinstance(task_of(vace=True, video="a.mp4"), Vace)
    assert isinstance(task_of(vace=True, video="a.mp4", overlap=5), Continuation)


@pytest.mark.parametrize("kind", KINDS)
def test_a_vae_may_have_another_type_than_the_backbone(small: list[str], kind: str) -> None:
    task = ImageToVideo(Image.fromarray(np.full((64, 64, 3), 200, dtype=np.uint8)))
    made = []
    for dtype, vae in (("fp32", torch.float32), ("fp32", torch.bfloat16), ("bf16", torch.float32)):
        pipe = Pipeline(f"small-{kind}", dtype=dtype, vae=find("wan_vaes", "wan-vae:tiny").load(dtype=vae))
        made.append(pipe(PROMPT, task=task, frames=5, size=(32, 32)))
    for other in made[1:]:
        assert 0 < (other.video - made[0].video).abs().mean() < 0.15


@pytest.mark.parametrize("kind", KINDS)
def test_pictures_that_overflow_in_the_vae_are_told_before_denoising(small: list[str], kind: str) -> None:
    vae = find("wan_vaes", "wan-vae:tiny").load()
    with torch.no_grad():
        for parameter in vae.parameters():
            parameter.mul_(float("nan"))
    seen = []
    events = Pipeline(f"small-{kind}", vae=vae).stream(PROMPT, task=ImageToVideo(torch.zeros(3, 32, 32)), frames=5, size=(32, 32))
    with pytest.raises(ValueError, match=r"vae '.*' made latents that are NaN or infinite, in float32: its weights are damaged"):
        seen.extend(events)
    assert not any(isinstance(event, Step) for event in seen)


def test_a_record_gives_its_task_again(small: list[str], here: Path) -> None:
    image, video, mask = draw(here / "a.png"), film(here / "film.mp4"), draw(here / "m.png")
    references = tuple(draw(here / f"r{i}.png", size=(20 + i, 40)) for i in range(11))
    tasks = [
        TextToVideo(), ImageToVideo(image), ImageToVideo(image, mask), Continuation(video, overlap=9), Vace(video, outpaint=True),
        Vace(video, mask, references, scale=(0.5, 1.0)), Vace(references=references[:1], scale=0.25),
    ]  # fmt: skip
    for task in tasks:
        record = json.loads(json.dumps(recorded(task)))
        again = from_record(record)
        assert (type(again), again.settings(), recorded(again)) == (type(task), task.settings(), recorded(task))
        paths = [entry["path"] for entry in record["inputs"].values()]
        assert [str(source) for source in again.inputs().values() if source is not None] == paths, "references in their order"


def test_a_replay_has_the_defects_that_the_run_had(small: list[str], here: Path) -> None:
    draw(here / "a.png", size=(96, 64))
    run = ["generate", PROMPT, "--model", "small-i2v", "--image", "a.png", "--size", "32x64", "--frames", "5", "--device", "cpu"]
    for compat in ("fixed", "official"):
        assert main([*run, "--compat", compat, "--output", f"{compat}.mp4"]) == 0
        assert main(["replay", f"{compat}.json"]) == 0
    fixed, official = (json.loads((here / f"{compat}.json").read_text())["frames_sha256"] for compat in ("fixed", "official"))
    assert fixed != official, "cropped or stretched"


def test_a_reference_is_shown_whole_on_white(here: Path) -> None:
    shown = on_white(Image.open(draw(here / "r.png", size=(20, 40), colour=(0, 0, 0))), (64, 48))
    assert (shown[:, :, :20] == 1).all()
    assert (shown[:, :, -20:] == 1).all()
    assert (shown[:, :, 20:44] == -1).all()


def test_what_is_outpainted_has_the_models_size(small: list[str], here: Path) -> None:
    video, pipe = film(here / "film.mp4"), Pipeline("small-vace")
    assert pipe.settings(PROMPT, task=Vace(video, outpaint=True)).size == (64, 64)
    assert pipe.settings(PROMPT, task=Vace(video)).size == (64, 48)


def test_a_task_of_ones_own(small: list[str]) -> None:
    """Any object with the methods of a task; it cannot be replayed."""

    class Grey(TextToVideo):
        name = "grey"

        def check(self, target: Any) -> None: ...

        def prepare(self, target: Any, encoders: Any) -> Any:
            return ImageToVideo(torch.zeros(3, 64, 64)).prepare(target, encoders)

    model = VideoModelSpec("m", "b", "wan-vae:tiny", "wan-text:tiny", steps=2, shift=2.0, guidance=2.0, task="i2v")
    pipe = Pipeline(model, backbone="small-i2v")
    result = pipe(PROMPT, task=Grey(), frames=5, size=(32, 32))
    expected = pipe(PROMPT, task=ImageToVideo(torch.zeros(3, 64, 64)), frames=5, size=(32, 32))
    assert torch.equal(result.video, expected.video)
    assert result.manifest["task"]["name"] == "grey"

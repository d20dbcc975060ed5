"""`wan-vae eval`: clips stream through codecs, figures are those of whole videos, and bad input is one line that leaves nothing."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from shuffle_vae import ShuffleVAE
from torch import Tensor, nn
from wan_vae import VAESpec, VideoCodec, load_vae
from wan_vae.commands.coding import TINY_NOTE
from wan_vae.evaluation import Settings, evaluate, fit
from wan_vae.metrics import psnr, ssim
from wan_vae.perceptual import WINDOW
from wan_vae.video import read_frames, to_tensor

Film = Callable[..., Path]
Run = Callable[..., tuple[int, str, str]]
OPTIONS = (("LPIPS", "--lpips-weights"), ("rFVD", "--fvd-model"))
SHUFFLE = "shuffle_vae:ShuffleVAE"


class Distance(nn.Module):
    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return (a - b).abs().mean(dim=(1, 2, 3))


class Features(nn.Module):
    def forward(self, video: Tensor) -> Tensor:
        return video.std(dim=(3, 4)).flatten(1)


class DimVAE(ShuffleVAE):
    """Loses brightness in frame 0 and swallows the last frame where `short`."""

    spec = VAESpec("dim", "shuffle_vae:ShuffleVAE", latent_space="dim", latent_channels=768, stride=(4, 8, 8))

    def __init__(self, factor: float = 1.0, short: bool = False) -> None:
        self.factor, self.short = factor, short

    def decode_stream(self, chunks):
        for index, video in enumerate(super().decode_stream(chunks)):
            yield video[:, :, : 3 if index and self.short else None] + (0 if index else self.factor)


@pytest.mark.parametrize("frames", [1, 2, 7, 9])
def test_what_streams_is_what_the_whole_video_gives(film: Film, frames: int) -> None:
    path = film(frames, 50, 34)
    codec = VideoCodec(load_vae())
    video = to_tensor(read_frames(path))
    latents, padding = codec.encode(video)
    decoded = codec.decode(latents, padding)
    seen: list[int] = []
    values = evaluate(codec, path, progress=seen.append).values
    assert (values["frames"], values["width"], values["height"], seen[-1]) == (frames, 50, 34, frames)
    assert values["psnr"] == pytest.approx(psnr(video, decoded), abs=1e-3)
    assert values["ssim"] == pytest.approx(ssim(video, decoded), abs=1e-5)
    assert values["compression_values"] == pytest.approx(video.numel() / latents.numel())
    assert values["compression_bits"] == pytest.approx(video.numel() / latents.numel() / 4), "8 bits against 32"
    assert (values["flicker"] is None) == (frames == 1)
    assert values["ms_ssim"] is values["lpips"] is values["tile_step"] is None


@pytest.mark.parametrize("frames", [1, 6])
def test_lossless_codec_has_infinite_psnr_and_no_artefact(film: Film, frames: int) -> None:
    values = evaluate(VideoCodec(ShuffleVAE()), film(frames, 21, 13), Settings(tile=(8, 8))).values
    assert values["psnr"] == values["psnr_frame"] == math.inf
    assert values["ssim"] == pytest.approx(1)
    checks = ("first_frame", "first_frame_colour", "seam", "flicker", "flicker_static", "tile_step", "tile_error")
    assert {values[check] for check in checks} <= {0.0, None}


def test_latents_pass_through_the_type_that_they_are_stored_in(film: Film) -> None:
    values = evaluate(VideoCodec(ShuffleVAE()), film(5, 16, 16), Settings(latent_dtype=torch.bfloat16)).values
    assert 40 < values["psnr"] < 70
    assert values["compression_bits"] == pytest.approx(3 * 5 * 256 * 8 / (2 * 768 * 4 * 16))


def test_first_frame_of_another_brightness_is_seen(film: Film) -> None:
    values = evaluate(VideoCodec(DimVAE(-0.1)), film(9, 16, 16)).values
    assert values["first_frame_colour"] == pytest.approx(-12.75, abs=1e-3)
    assert values["first_frame"] == -math.inf


def test_codec_that_drops_frames_or_gives_no_numbers_is_an_error(film: Film) -> None:
    with pytest.raises(ValueError, match=r"'dim' decoded 2 too few frames of '.*film.mp4'"):
        evaluate(VideoCodec(DimVAE(short=True)), film(9, 16, 16))
    with pytest.raises(ValueError, match=r"'dim' decoded values that are not finite after frame 0 of"):
        evaluate(VideoCodec(DimVAE(math.nan)), film(9, 16, 16))


def test_pictures_are_scaled_and_cropped() -> None:
    frame = np.zeros((40, 60, 3), np.uint8)
    frame[:, 20:40] = 200
    assert fit(frame, None, None) is fit(frame, None, 60) is frame
    assert fit(frame, None, 30).shape == (20, 30, 3)
    cropped = fit(frame, (40, 20), None)
    assert cropped.shape == (40, 20, 3)
    assert cropped.min() == 200, "the middle is kept"
    assert fit(frame, (80, 80), None).shape == (80, 80, 3)
    assert fit(frame, (7, 90), None).shape == (7, 90, 3)


def test_real_clips_with_the_built_in_codec(run: Run, real_clips: Path) -> None:
    clips = [str(real_clips / f"{name}.mp4") for name in ("bikes", "carphone_pristine")]
    code, out, err = run("eval", *clips, "--frames", "6", "--max-size", "170", "--out", "report", "--device", "cpu")
    assert (code, err) == (0, TINY_NOTE + "\n")
    lines = out.splitlines()
    assert lines[0].split()[:7] == ["clip", "codec", "frames", "size", "values", "bits", "PSNR"]
    assert [line.split()[0] for line in lines[1:4]] == ["bikes.mp4", "carphone_pristine.mp4", "mean"]
    assert lines[4:6] == [f"{name}: not computed, no network is given ({option})" for name, option in OPTIONS]
    assert lines[6] == "report: eval.json, contact-sheet.png, index.html"
    record = json.loads(Path("report/eval.json").read_text())
    first, second = record["results"]
    assert (first["clip"], first["frames"], first["width"], second["width"], second["height"]) == (clips[0], 6, 170, 170, 139)
    assert first["lpips"] == first["ms_ssim"] == record["means"][0]["rfvd"] == "not computed"
    assert 5 < first["psnr"] < 40
    assert 0 < first["ssim"] < 1
    assert record["means"][0]["psnr"] == pytest.approx((first["psnr"] + second["psnr"]) / 2)
    assert first["encode_fps"] > 0
    assert first["peak_memory"] > 0


def test_json_of_two_codecs_and_two_kinds_of_clip(run: Run, film: Film, tmp_path: Path) -> None:
    film(5, 24, 16)
    code, out, err = run("eval", "film.mp4", "--codec", SHUFFLE, "--codec", "tiny", "--size", "16x16", "--tile", "8x8", "--json")
    assert (code, err) == (0, "")
    record = json.loads(out)
    assert [(row["codec"], row["psnr"] == "inf") for row in record["results"]] == [(SHUFFLE, True), ("tiny", False)]
    assert [row["codec"] for row in record["means"]] == [SHUFFLE, "tiny"]
    assert record["results"][1]["tile_step"] != "not computed"
    assert record["settings"]["size"] == "16x16"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["film.mp4"]


def test_folder_of_videos_is_a_clip_each(run: Run, film: Film, tmp_path: Path) -> None:
    (tmp_path / "clips").mkdir()
    for name in ("b.mp4", "a.mkv"):
        film(2, 16, 16).rename(tmp_path / "clips" / name)
    (tmp_path / "clips" / "notes.txt").write_text("not a clip")
    record = json.loads(run("eval", "clips", "--codec", SHUFFLE, "--json")[1])
    assert [row["clip"] for row in record["results"]] == ["clips/a.mkv", "clips/b.mp4"]


def test_networks_of_the_users(run: Run, film: Film) -> None:
    torch.jit.script(Distance()).save("lpips.pt")
    torch.jit.script(Features()).save("fvd.pt")
    for name in ("a.mp4", "b.mp4"):
        film(WINDOW + 1, 16, 16, name=name)
    networks = ("--lpips-weights", "lpips.pt", "--fvd-model", "fvd.pt", "--codec", SHUFFLE, "--codec", "tiny")
    record = json.loads(run("eval", "a.mp4", "b.mp4", *networks, "--json")[1])
    exact, tiny = record["means"]
    assert exact["lpips"] == exact["rfvd"] == 0
    assert tiny["lpips"] > 0.01
    assert tiny["rfvd"] > 0
    assert tiny["rfvd_windows"] == 2
    out = run("eval", "a.mp4", *networks)[1]
    assert "LPIPS" in out.splitlines()[0]
    assert out.splitlines()[-1] == "rFVD: not computed, it needs 2 windows of 16 frames and the clips have 1"


def test_report_is_not_overwritten_unasked(run: Run, film: Film) -> None:
    film(2, 16, 16)
    line = ("eval", "film.mp4", "--codec", SHUFFLE, "--out", "report")
    assert run(*line)[0] == 0
    Path("report/eval.json").write_text("precious")
    assert run(*line) == (2, "", "wan-vae: error: 'report/eval.json' exists; name another folder or pass --overwrite\n")
    assert run(*line, "--overwrite")[0] == 0
    assert json.loads(Path("report/eval.json").read_text())["format"] == "wan-vae-eval/1"
    assert sorted(path.name for path in Path("report").iterdir()) == ["contact-sheet.png", "eval.json", "index.html"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("", "the following arguments are required: CLIP"),
        ("nothing.mp4", "no video file at 'nothing.mp4'"),
        ("film.mp4 words.mp4", "'words.mp4' is not a readable video"),
        ("empty.mp4", "'empty.mp4'"),
        ("empty", "'empty'"),
        ("film.mp4 --codec wan2.7", "no vae named 'wan2.7'"),
        ("film.mp4 --codec tiny --codec tine", "did you mean 'tiny'?"),
        ("film.mp4 --out words.mp4", "cannot write to 'words.mp4': it exists and is not a folder"),
        ("film.mp4 --out no/folder", "cannot write 'no/folder': there is no folder"),
        ("film.mp4 --size 16", "'16' is not a height and width such as 480x832"),
        ("film.mp4 --size 16x16 --max-size 9", "not allowed with argument"),
        ("film.mp4 --frames 0", "'0' is not a whole number of at least 1"),
        ("film.mp4 --device abacus", "device 'abacus' cannot be used here"),
        ("film.mp4 --out report --lpips-weights words.mp4", "'words.mp4' is no network saved by torch.jit.save"),
        ("film.mp4 --out report --fvd-model nothing.pt", "no network at 'nothing.pt'"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(run: Run, film: Film, tmp_path: Path, line: str, message: str) -> None:
    film(2, 16, 16)
    (tmp_path / "words.mp4").write_text("words")
    (tmp_path / "empty.mp4").touch()
    (tmp_path / "empty").mkdir()
    before = sorted(tmp_path.rglob("*"))
    code, out, err = run("eval", *line.split())
    errors = [text for text in err.splitlines() if "error:" in text]
    assert (code, out, len(errors)) == (2, "", 1)
    assert message in errors[0]
    assert set(err.splitlines()) - set(errors) <= {TINY_NOTE}
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.slow
def test_memory_does_not_grow_with_length(film: Film, tmp_path: Path) -> None:
    code = (
        "import sys; from wan_vae import VideoCodec, load_vae; from wan_vae.evaluation import evaluate\n"
        "assert evaluate(VideoCodec(load_vae()), sys.argv[1]).values['frames'] == int(sys.argv[2])\n"
        "print(next(line.split()[1] for line in open('/proc/self/status') if line.startswith('VmHWM')))"
    )
    peaks = []
    for frames in (20, 300):
        command = [sys.executable, "-c", code, str(film(frames, 64, 48, name=f"{frames}.mp4")), str(frames)]
        peaks.append(int(subprocess.run(command, capture_output=True, text=True, check=True).stdout))
    assert peaks[1] < 1.1 * peaks[0]


@pytest.mark.skipif(sys.platform != "linux", reason="memory is given back on Linux")
def test_memory_that_earlier_work_left_free_counts_for_the_next() -> None:
    """The blocks lie below one that stays, so that the allocator does not give them back by itself."""
    code = """
import torch
from wan_vae.peak_memory import PeakMemory

def work():
    return [torch.ones(5000) for _ in range(5000)]

before, stays = work(), torch.ones(5000)
del before
memory = PeakMemory(torch.device("cpu"))
list(memory.watch([work()]))
print(memory.peak)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(done.stdout) > 0.9 * 4 * 5000 * 5000

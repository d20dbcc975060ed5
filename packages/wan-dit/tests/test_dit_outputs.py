"""What a run may write to, and that it is there whole or not at all."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from wan_dit import Pipeline, media, outputs
from wan_dit._shared.cli import Parser, run
from wan_dit.cli import main
from wan_dit.inputs import read_video
from wan_dit.media import contact_sheet, to_frames, write, write_frames, write_gif

PATTERN = "clip/%04d.png"


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def noise(frames: int = 5, size: int = 32) -> torch.Tensor:
    return torch.rand(1, 3, frames, size, size, generator=torch.Generator().manual_seed(0)) * 2 - 1


def files(folder: Path) -> list[str]:
    return sorted(str(file.relative_to(folder)) for file in folder.rglob("*"))


def gif(path: Path) -> tuple[list[np.ndarray], list[int]]:
    with Image.open(path) as image:
        assert image.info["loop"] == 0
        frames, times = [], []
        for i in range(image.n_frames):
            image.seek(i)
            frames.append(np.asarray(image.convert("RGB")))
            times.append(image.info["duration"])
    return frames, times


@pytest.mark.parametrize("fps", [8, 16, 24, 30, 50])
def test_a_gif_keeps_to_its_rate_though_its_clock_is_coarse(tmp_path: Path, fps: int) -> None:
    _, times = gif(write_gif(noise(25, 8), tmp_path / "a.gif", fps))
    assert len(times) == 25
    starts = np.cumsum([0, *times])
    assert np.abs(starts - 1000 * np.arange(26) / fps).max() <= 5.001
    with pytest.raises(ValueError, match="up to 50 frames a second, got 60"):
        write_gif(noise(), tmp_path / "b.gif", 60)


def test_a_gif_shows_the_picture(tmp_path: Path) -> None:
    ramp = torch.linspace(-1, 1, 64)
    video = torch.stack([ramp[None].expand(64, 64), ramp[:, None].expand(64, 64), torch.zeros(64, 64)])[None, :, None].repeat(1, 1, 3, 1, 1)
    video[:, :, 1] *= 0.5
    video[:, :, 2] *= -1
    frames, _ = gif(write_gif(video, tmp_path / "a.gif", 8))
    for found, expected in zip(frames, to_frames(video), strict=True):
        assert np.abs(found.astype(int) - expected).mean() < 6
    assert len({frame.tobytes() for frame in frames}) == 3


def test_frames_are_the_8_bit_pixels_to_the_bit(here: Path) -> None:
    video = noise(11)
    for path in (PATTERN, Path("folder")):
        folder = write_frames(video, path)
        assert files(folder) == [f"{i:04d}.png" for i in range(1, 12)]
        found = np.stack([np.asarray(Image.open(file)) for file in sorted(folder.iterdir())])
        assert np.array_equal(found, to_frames(video))
        assert (read_video(folder) - (torch.from_numpy(to_frames(video)).permute(3, 0, 1, 2) / 127.5 - 1)).abs().max() < 1e-6
    assert files(write_frames(video, "50%x/a_%d.png"))[-1] == "a_9.png"


def test_frames_take_the_place_of_frames_alone(here: Path) -> None:
    write_frames(noise(9), PATTERN)
    write_frames(noise(3), PATTERN)
    assert files(here) == ["clip", *(f"clip/{i:04d}.png" for i in (1, 2, 3))], "none of the longer video is left"
    (here / "clip" / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match=r"cannot write 'clip/%04d.png': the folder holds other files \('notes.txt'\)"):
        write_frames(noise(4), PATTERN)
    with pytest.raises(FileExistsError, match="holds other files"):
        outputs.check(PATTERN, overwrite=True)
    assert (here / "clip" / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("a.mp4", ("a.mp4", "a.png", "a.json")),
        ("b/a.GIF", ("b/a.GIF", "b/a.png", "b/a.json")),
        ("100%done.mp4", ("100%done.mp4", "100%done.png", "100%done.json")),
        ("run.2/%04d.png", ("run.2/%04d.png", "run.2.png", "run.2.json")),
        ("b/clip/frame_%d.png", ("b/clip/frame_%d.png", "b/clip.png", "b/clip.json")),
    ],
)
def test_the_name_says_what_is_written(path: str, expected: tuple[str, ...]) -> None:
    assert tuple(map(str, outputs.targets(path))) == expected


@pytest.mark.parametrize("path", ["a.webm", "a", "%04d.png", "a/%04d.jpg", "a/%04d_%d.png", "a%d/%d.png", "/%04d.png"])
def test_other_names_are_refused(path: str) -> None:
    with pytest.raises(ValueError, match=r"cannot write (frames to )?'.*': (give a name such as FILE.mp4, FILE.gif,|name) .*%04d.png"):
        outputs.targets(path)


@pytest.mark.parametrize("path", ["a.mp4", "a.gif", PATTERN])
def test_what_exists_is_kept_unless_it_is_to_be_replaced(here: Path, path: str) -> None:
    assert outputs.check(path) == outputs.targets(path)
    assert files(here) == [], "nothing is left by a check"
    write(noise(2), path, 8)
    before = files(here)
    with pytest.raises(FileExistsError, match="exists: choose another name"), outputs.writing(path):
        pass
    assert outputs.check(path, overwrite=True)
    assert files(here) == before
    outputs.targets(path)[2].mkdir()
    with pytest.raises(IsADirectoryError, match="it is a folder"):
        outputs.check(path, overwrite=True)


def test_an_empty_folder_may_take_frames_and_a_file_may_not(here: Path) -> None:
    (here / "clip").mkdir()
    with outputs.writing(PATTERN) as (video, sheet, record):
        write(noise(2), video, 8)
        sheet.write_bytes(b"sheet")
        record.write_text("{}")
    assert files(here) == ["clip", "clip.json", "clip.png", "clip/0001.png", "clip/0002.png"]
    (here / "file").write_text("")
    with pytest.raises(NotADirectoryError, match="'file' is a file"):
        outputs.check("file/%04d.png")


@pytest.mark.parametrize(("path", "first"), [("a.gif", "a.gif"), (PATTERN, "clip/0001.png")])
def test_a_result_is_saved_as_its_name_says(here: Path, path: str, first: str) -> None:
    result = Pipeline("tiny")("a red circle moves left", steps=1, frames=5, size=(32, 16))
    assert result.save(path) == list(outputs.targets(path))
    with Image.open(first) as image:
        assert (image.format, image.size) == (Path(first).suffix[1:].upper(), (32, 16))
    if path == PATTERN:
        assert read_video("clip").shape == (3, 5, 16, 32)
    with pytest.raises(FileExistsError):
        result.save(path)


@pytest.mark.parametrize("path", ["a.mp4", "a.gif", PATTERN])
@pytest.mark.parametrize("stop", [RuntimeError, KeyboardInterrupt])
def test_nothing_is_left_where_writing_stops(here: Path, path: str, stop: type[BaseException]) -> None:
    def interrupted() -> None:
        with outputs.writing(path, overwrite=True) as (video, _, _):
            write(noise(4), video, 8)
            raise stop

    with pytest.raises(stop):
        interrupted()
    assert files(here) == []
    write(noise(2), path, 8)
    before = {file: (here / file).read_bytes() for file in files(here) if (here / file).is_file()}
    with pytest.raises(stop):
        interrupted()
    assert {file: (here / file).read_bytes() for file in files(here) if (here / file).is_file()} == before


@contextmanager
def files_up_to(most: int) -> Iterator[None]:
    """No file may be larger than `most` bytes, which fails like a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (most, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("path", ["a.mp4", "a.gif", PATTERN])
def test_a_write_that_fails_is_told_and_leaves_nothing(here: Path, path: str, capsys: pytest.CaptureFixture[str]) -> None:
    video = noise(9, 64)

    def save(_: object) -> None:
        with outputs.writing(path, overwrite=True) as (scratch, sheet, record):
            write(video, scratch, 8)
            contact_sheet(video, sheet)
            record.write_text("{}")

    for most in (0, 4096, 10_000):
        with files_up_to(most):
            assert run(save, Parser("wan-dit"), []) == 2
        assert capsys.readouterr().err == f"wan-dit: error: cannot write '{path}': File too large\n"
        assert files(here) == []
    assert run(save, Parser("wan-dit"), []) == 0


def test_generate_on_a_full_disk_exits_with_2(tmp_path: Path) -> None:
    settings = ["--steps", "1", "--frames", "5", "--size", "32x32", "--device", "cpu", "--output", "a.mp4"]
    command = [sys.executable, "-m", "wan_dit", "generate", "a red circle moves left", *settings]
    with files_up_to(1000):
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("wan-dit: error: ")
    assert "File too large" in done.stderr
    assert files(tmp_path) == []


def test_a_folder_that_takes_no_files_is_told_before_anything_is_made(here: Path) -> None:
    (here / "file").write_text("")
    for path in ("file/a.gif", "/dev/null/a.mp4", "/dev/null/a/%04d.png"):
        with pytest.raises(OSError, match="cannot write '"):
            outputs.check(path)
    if os.geteuid():
        (here / "locked").mkdir(mode=0o500)
        with pytest.raises(OSError, match="Permission denied"):
            outputs.check("locked/a.gif")


def test_one_frame_is_a_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    run = ["generate", "a red circle", "--steps", "1", "--size", "32x16", "--device", "cpu"]
    assert main([*run, "--frames", "1"]) == 0
    assert main([*run, "--frames", "1", "--output", "a.png"]) == 0
    names = ["a.json", "a.png", "outputs", "outputs/a-red-circle-0.json", "outputs/a-red-circle-0.png"]
    assert sorted(str(file.relative_to(tmp_path)) for file in tmp_path.rglob("*")) == names
    with Image.open("a.png") as image:
        assert image.size == (32, 16)
    assert main(["replay", "a.json"]) == 0
    capsys.readouterr()
    assert main([*run, "--frames", "5", "--output", "b.png"]) == 2
    assert capsys.readouterr().err == "wan-dit: error: 'b.png' is one image, and the video has 5 frames: give another name, or --frames 1\n"
    with pytest.raises(ValueError, match="cannot write 5 frames to one image"):
        media.write_image(torch.zeros(1, 3, 5, 16, 16), tmp_path / "c.png")

"""Reader and writer on real files: every frame, upright, in true colours; clear errors; nothing half-written."""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
from wan_vae.video import VideoWriter, probe, read_frames, to_frames, to_tensor

Film = Callable[..., Path]


def clip(frames: int, width: int, height: int) -> np.ndarray:
    return np.random.default_rng(frames).integers(0, 256, (frames, height, width, 3), dtype=np.uint8)


def encode_by_hand(
    path: Path, frames: np.ndarray, pix_fmt: str, *, matrix: str | None = None, full: bool = False, rotation: int = 0
) -> None:
    """A file as another program may write it: chosen pixel format and matrix, range tag only where full, display rotation."""
    with av.open(str(path), "w") as container:
        stream: Any = container.add_stream("libx264", rate=25, options={"crf": "4"})
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = pix_fmt
        if full:
            stream.codec_context.color_range = 2
        if rotation:
            stream.set_display_rotation(rotation)
        for frame in frames:
            picture = av.VideoFrame.from_ndarray(frame, format="rgb24")
            picture = picture.reformat(format=pix_fmt, dst_colorspace=matrix, dst_color_range="JPEG" if full else "MPEG")
            container.mux(stream.encode(picture))
        container.mux(stream.encode())


@pytest.mark.parametrize(("width", "height"), [(32, 16), (33, 17), (31, 16)])
def test_lossless_film_comes_back_to_the_bit(tmp_path: Path, width: int, height: int) -> None:
    frames, path = clip(6, width, height), tmp_path / "film.mp4"
    with VideoWriter(path, fps=Fraction(30000, 1001), size=(width, height), lossless=True) as writer:
        for frame in frames:
            writer.write(frame)
    assert np.array_equal(np.stack(list(read_frames(path))), frames)
    info = probe(path)
    assert (info.width, info.height, info.frames, info.rotation) == (width, height, 6, 0)
    assert info.fps == Fraction(30000, 1001)
    assert info.duration == pytest.approx(6 * 1001 / 30000, abs=1e-3)


@pytest.mark.parametrize(("size", "pix_fmt"), [((64, 48), "yuv420p"), ((63, 48), "yuv444p"), ((64, 45), "yuv444p")])
def test_lossy_film_keeps_its_size_and_its_colours(tmp_path: Path, size: tuple[int, int], pix_fmt: str) -> None:
    path = tmp_path / "film.mp4"
    colours = [(255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255), (0, 0, 0), (10, 200, 90)]
    with VideoWriter(path, fps=12, size=size, crf=4) as writer:
        for colour in colours:
            writer.write(np.full((size[1], size[0], 3), colour, np.uint8))
    info = probe(path)
    assert (info.width, info.height, info.pix_fmt, info.color_range) == (*size, pix_fmt, "limited")
    for frame, colour in zip(read_frames(path), colours, strict=True):
        assert np.abs(frame.astype(int) - colour).max() <= 4


@pytest.mark.parametrize(
    ("name", "size", "frames", "fps"),
    [
        ("bikes.mp4", (640, 272), 250, Fraction(25)),
        ("bigbuckbunny.mp4", (1280, 720), 132, Fraction(25)),
        ("carphone_pristine.mp4", (176, 144), 120, Fraction(30000, 1001)),
        ("carphone_distorted.mp4", (176, 144), 120, Fraction(30000, 1001)),
    ],
)
def test_real_clips(real_clips: Path, name: str, size: tuple[int, int], frames: int, fps: Fraction) -> None:
    info = probe(real_clips / name)
    assert (info.width, info.height, info.frames, info.fps, info.pix_fmt) == (*size, frames, fps, "yuv420p")
    first = list(read_frames(real_clips / name, limit=3))
    assert [frame.shape for frame in first] == [(size[1], size[0], 3)] * 3
    assert first[0].dtype == np.uint8
    if name.startswith("carphone"):
        assert sum(1 for _ in read_frames(real_clips / name)) == frames


@pytest.mark.parametrize("rotation", [90, 180, 270])
def test_rotated_film_is_read_upright(tmp_path: Path, rotation: int) -> None:
    stored = np.zeros((3, 32, 64, 3), np.uint8)
    stored[:, :16, :16] = (255, 0, 0)
    path = tmp_path / "phone.mp4"
    encode_by_hand(path, stored, "yuv444p", rotation=rotation)
    upright = np.rot90(stored[0], rotation // 90)
    info = probe(path)
    assert (info.height, info.width, info.rotation) == (*upright.shape[:2], rotation)
    for frame in read_frames(path):
        assert frame.shape == upright.shape
        assert np.abs(frame.astype(int) - upright).mean() < 3


@pytest.mark.parametrize(("lines", "matrix"), [(64, "ITU601"), (720, "ITU709")])
def test_colours_of_a_film_that_does_not_say(tmp_path: Path, lines: int, matrix: str) -> None:
    red = np.full((2, lines, 64, 3), (200, 30, 60), np.uint8)
    encode_by_hand(tmp_path / "film.mp4", red, "yuv420p", matrix=matrix)
    assert probe(tmp_path / "film.mp4").color_range == "unspecified"
    assert np.abs(next(read_frames(tmp_path / "film.mp4")).astype(int) - (200, 30, 60)).max() <= 3


@pytest.mark.parametrize("pix_fmt", ["yuv420p", "yuv420p10le"])
def test_full_range_and_ten_bits(tmp_path: Path, pix_fmt: str) -> None:
    grey = np.stack([np.full((32, 32, 3), level, np.uint8) for level in (0, 20, 128, 240, 255)])
    encode_by_hand(tmp_path / "film.mp4", grey, pix_fmt, matrix="ITU601", full=True)
    assert probe(tmp_path / "film.mp4").color_range == "full"
    for frame, level in zip(read_frames(tmp_path / "film.mp4"), (0, 20, 128, 240, 255), strict=True):
        assert np.abs(frame.astype(int) - level).max() <= 2


def test_missing_file(tmp_path: Path) -> None:
    for read in (probe, lambda path: next(read_frames(path))):
        with pytest.raises(FileNotFoundError, match=r"no video file at .*nothing\.mp4"):
            read(tmp_path / "nothing.mp4")


@pytest.mark.parametrize("kind", ["empty", "text", "noise", "truncated", "sound only", "folder"])
def test_what_is_no_video(tmp_path: Path, film: Film, kind: str) -> None:
    path = tmp_path / "bad.mp4"
    if kind == "folder":
        path.mkdir()
    elif kind == "sound only":
        with av.open(str(path), "w") as container:
            stream: Any = container.add_stream("aac", rate=44100)
            sound = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
            sound.rate = 44100
            container.mux(stream.encode(sound))
            container.mux(stream.encode())
    else:
        data = film().read_bytes()
        noise = np.random.default_rng(0).bytes(4000)
        path.write_bytes({"empty": b"", "text": b"words " * 200, "noise": noise, "truncated": data[: len(data) // 2]}[kind])
    for read in (probe, lambda path: list(read_frames(path))):
        with pytest.raises(ValueError, match=r"bad\.mp4"):
            read(path)


def test_film_cut_short_says_so(tmp_path: Path) -> None:
    path = tmp_path / "film.mp4"
    with av.open(str(path), "w", options={"movflags": "faststart"}) as container:
        stream: Any = container.add_stream("libx264", rate=25, options={"g": "5"})
        stream.width = stream.height = 64
        for frame in clip(40, 64, 64):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 2 // 3])
    with pytest.raises(ValueError, match=r"film\.mp4' is damaged after 26 frames: .*--on-error stop or fill"):
        list(read_frames(path))


def interrupted(path: Path, error: BaseException) -> None:
    with VideoWriter(path, fps=25, size=(32, 32)) as writer:
        writer.write(clip(1, 32, 32)[0])
        raise error


@pytest.mark.parametrize("error", [RuntimeError("stop"), KeyboardInterrupt()])
def test_interrupted_writer_leaves_nothing_and_keeps_what_was_there(tmp_path: Path, error: BaseException) -> None:
    for before in (None, b"an older film"):
        path = tmp_path / "film.mp4"
        if before:
            path.write_bytes(before)
        with pytest.raises(type(error)):
            interrupted(path, error)
        assert [file.read_bytes() for file in tmp_path.iterdir()] == ([before] if before else [])


def test_writer_refuses_what_it_cannot_write(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no frame was written"), VideoWriter(tmp_path / "film.mp4", fps=25, size=(32, 32)):
        pass
    with (
        pytest.raises(ValueError, match=r"expected a uint8 frame \[32, 32, 3\]"),
        VideoWriter(tmp_path / "film.mp4", fps=25, size=(32, 32)) as writer,
    ):
        writer.write(clip(1, 32, 16)[0])
    with pytest.raises(ValueError, match=r"use a suffix such as \.mp4"), VideoWriter(tmp_path / "film.xyz", fps=25, size=(32, 32)):
        pass
    with pytest.raises(OSError, match=r"cannot write '/dev/null/film\.mp4'"), VideoWriter("/dev/null/film.mp4", fps=25, size=(32, 32)):
        pass
    with pytest.raises(ValueError, match="is not a file"), VideoWriter(tmp_path, fps=25, size=(32, 32)):
        pass
    with pytest.raises(ValueError, match="must be positive"):
        VideoWriter(tmp_path / "film.mp4", fps=0, size=(32, 32))
    assert not list(tmp_path.iterdir())


def test_frames_and_tensors() -> None:
    levels = np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1).repeat(3, axis=3)
    video = to_tensor(levels)
    assert video.shape == (1, 3, 1, 16, 16)
    assert (float(video.min()), float(video.max())) == (-1.0, 1.0)
    assert np.array_equal(to_frames(video), levels)
    fine = np.arange(2**16, dtype=np.uint16).reshape(1, 256, 256, 1).repeat(3, axis=3)
    assert to_frames(to_tensor(fine), 16).dtype == np.uint16
    assert np.array_equal(to_frames(to_tensor(fine), 16), fine)
    assert np.array_equal(to_frames(torch.full((1, 3, 1, 2, 2), 7.0)), np.full((1, 2, 2, 3), 255))
    with pytest.raises(ValueError, match="expected one video"):
        to_frames(torch.zeros(2, 3, 1, 8, 8))

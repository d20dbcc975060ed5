"""Films by their timestamps: variable frame rates, pixel aspect, deep colour and sound come back as they were."""

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
from wan_vae.latents import LatentFile
from wan_vae.video import VideoWriter, probe, read, read_frames, to_frames, to_tensor

Film = Callable[..., Path]
UNEVEN = [0, 3, 4, 9, 10, 11, 30, 31, 47]


def grey(level: int, width: int = 32, height: int = 16) -> np.ndarray:
    return np.full((height, width, 3), level, np.uint8)


def uneven(path: Path, start: int = 0) -> Path:
    """A film whose frame `i` is grey of level `20 i`, shown at `UNEVEN[i]` hundredths of a second."""
    with VideoWriter(path, fps=25, size=(32, 16), time_base=Fraction(1, 100), lossless=path.suffix != ".webm") as writer:
        for index, time in enumerate(UNEVEN):
            writer.write(grey(20 * index), time + start)
    return path


def times_of(path: Path) -> list[Fraction]:
    reader = read(path)
    return [pts * reader.info.time_base for _, pts in reader]


@pytest.mark.parametrize("suffix", [".mp4", ".mkv"])
def test_a_film_of_varying_rate_keeps_its_timing(tmp_path: Path, suffix: str) -> None:
    source, latents, back = uneven(tmp_path / f"film{suffix}"), tmp_path / "film.safetensors", tmp_path / f"back{suffix}"
    assert times_of(source) == [Fraction(time, 100) for time in UNEVEN]
    codec = VideoCodec(ShuffleVAE())
    codec.encode_file(source, latents, chunk=2)
    file = LatentFile.open(latents)
    times = file.timestamps()
    assert times
    assert [time * (file.info.time_base or 0) for time in times] == [Fraction(time, 100) for time in UNEVEN]
    codec.decode_file(latents, back, lossless=True)
    assert times_of(back) == times_of(source)
    assert [int(frame[0, 0, 0]) for frame in read_frames(back)] == [20 * index for index in range(len(UNEVEN))]


def test_a_film_that_starts_late_comes_back_from_zero(tmp_path: Path) -> None:
    source = uneven(tmp_path / "film.mkv", start=500)
    assert times_of(source)[0] == 5
    codec = VideoCodec(ShuffleVAE())
    codec.encode_file(source, tmp_path / "film.safetensors")
    codec.decode_file(tmp_path / "film.safetensors", tmp_path / "back.mkv")
    assert times_of(tmp_path / "back.mkv") == [Fraction(time, 100) for time in UNEVEN]


@pytest.mark.parametrize(("suffix", "fps"), [(".mkv", Fraction(24000, 1001)), (".mp4", Fraction(30000, 1001)), (".avi", Fraction(25))])
def test_an_even_rate_needs_no_timestamps(tmp_path: Path, suffix: str, fps: Fraction) -> None:
    path = tmp_path / f"film{suffix}"
    with VideoWriter(path, fps=fps, size=(32, 16)) as writer:
        for index in range(60):
            writer.write(grey(4 * index))
    info = VideoCodec(ShuffleVAE()).encode_file(path, tmp_path / "film.safetensors")
    assert (info.frames, info.fps) == (60, fps)
    assert LatentFile.open(tmp_path / "film.safetensors").timestamps() is None


def test_a_stream_without_timestamps_counts_by_its_rate(tmp_path: Path) -> None:
    path = tmp_path / "film.h264"
    with av.open(str(path), "w") as container:
        stream: Any = container.add_stream("libx264", rate=25, options={"bf": "0"})
        stream.width, stream.height = 32, 16
        for index in range(9):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(grey(20 * index), format="rgb24")))
        container.mux(stream.encode())
    assert times_of(path) == [Fraction(index, 25) for index in range(9)]


def test_times_that_do_not_increase_are_refused_by_the_writer(tmp_path: Path) -> None:
    with VideoWriter(tmp_path / "film.mp4", fps=25, size=(32, 16)) as writer:
        writer.write(grey(0), 3)
        with pytest.raises(ValueError, match=r"frame 1 of .* is at 3, not after the frame before it at 3"):
            writer.write(grey(0), 3)
    assert len(list(read_frames(tmp_path / "film.mp4"))) == 1


def test_pixel_aspect_and_colour_tags_come_back(tmp_path: Path) -> None:
    source, latents, back = tmp_path / "film.mp4", tmp_path / "film.safetensors", tmp_path / "back.mp4"
    with VideoWriter(source, fps=25, size=(32, 16), pixel_aspect=Fraction(4, 3), primaries=9, transfer=16) as writer:
        writer.write(grey(100))
    codec = VideoCodec(ShuffleVAE())
    info = codec.encode_file(source, latents)
    assert (info.pixel_aspect, info.primaries, info.transfer) == (Fraction(4, 3), 9, 16)
    codec.decode_file(latents, back)
    again = probe(back)
    assert (again.pixel_aspect, again.primaries, again.transfer) == (Fraction(4, 3), 9, 16)


def deep(path: Path) -> np.ndarray:
    """A film of 10 bits with a ramp finer than 8 bits have; returns its frames of 16 bits."""
    ramp = np.linspace(16000, 24000, 128).astype(np.uint16)
    frames = np.stack([np.broadcast_to(ramp[None, :, None] + 100 * index, (32, 128, 3)) for index in range(5)]).astype(np.uint16)
    with VideoWriter(path, fps=25, size=(128, 32), crf=0, bit_depth=10) as writer:
        for frame in frames:
            writer.write(frame)
    return frames


def test_ten_bits_are_read_written_and_encoded_whole(tmp_path: Path) -> None:
    source, latents, back = tmp_path / "film.mp4", tmp_path / "film.safetensors", tmp_path / "back.mp4"
    frames = deep(source)
    assert (probe(source).pix_fmt, probe(source).depth) == ("yuv420p10le", 10)
    read_back = np.stack(list(read_frames(source, depth=16)))
    assert read_back.dtype == np.uint16
    assert np.abs(read_back.astype(int) - frames).max() < 150  # a step of 8 bits is 257, one of 10 bits in limited range 75
    assert len(np.unique(read_back[0])) > 90  # of 8 bits: 32
    assert next(read_frames(source)).dtype == np.uint8
    codec = VideoCodec(ShuffleVAE())
    assert codec.encode_file(source, latents).bit_depth == 10
    codec.decode_file(latents, back, bit_depth=10, crf=0)
    assert probe(back).depth == 10
    assert np.abs(np.stack(list(read_frames(back, depth=16))).astype(int) - frames).max() < 200
    assert len(np.unique(next(read_frames(back, depth=16)))) > 90
    codec.decode_file(latents, tmp_path / "eight.mp4")
    assert probe(tmp_path / "eight.mp4").depth == 8
    codec.decode_file(latents, tmp_path / "pictures", bit_depth=10)
    assert np.abs(next(read_frames(tmp_path / "pictures", depth=16)).astype(int) - frames[0]).max() < 150


def test_deep_frames_and_tensors() -> None:
    levels = np.arange(0, 65536, 16, dtype=np.uint16).reshape(1, 64, 64, 1).repeat(3, axis=3)
    video = to_tensor(levels)
    assert (float(video.min()), float(video.max())) == (-1.0, pytest.approx(65520 / 32767.5 - 1))
    assert np.array_equal(to_frames(video, 16), levels)


def test_depths_that_cannot_be_written(tmp_path: Path) -> None:
    for options in ({"bit_depth": 12}, {"bit_depth": 10, "lossless": True}):
        with pytest.raises(ValueError, match="8 or 10 bits, lossless with 8"):
            VideoWriter(tmp_path / "film.mp4", fps=25, size=(32, 16), **options)  # type: ignore[arg-type]
    with (
        pytest.raises(ValueError, match=r"expected a uint16 frame .* got uint8"),
        VideoWriter(tmp_path / "film.mp4", fps=25, size=(32, 16), bit_depth=10) as writer,
    ):
        writer.write(grey(0))


def sounding(path: Path, seconds: float = 2.0, start: float = 0.0, codec: str = "aac") -> Path:
    """A film of 25 frames with a tone of `seconds`, whose picture starts at `start` seconds."""
    with av.open(str(path), "w") as container:
        stream: Any = container.add_stream("libx264", rate=25, options={"bf": "0"})
        stream.width, stream.height = 32, 16
        sound: Any = container.add_stream(codec, rate=48000)
        sound.layout = "mono"
        tone = np.sin(np.arange(int(seconds * 48000)) / 20).astype(np.float32)[None]
        for index in range(25):
            picture = av.VideoFrame.from_ndarray(grey(10 * index), format="rgb24")
            picture.pts, picture.time_base = index + round(25 * start), Fraction(1, 25)
            container.mux(stream.encode(picture))
        samples = tone if codec == "aac" else (tone * 20000).astype(np.int16)
        for place in range(0, samples.shape[1] - 1023, 1024):
            data = np.ascontiguousarray(samples[:, place : place + 1024])
            piece = av.AudioFrame.from_ndarray(data, format="fltp" if codec == "aac" else "s16", layout="mono")
            piece.rate, piece.pts, piece.time_base = 48000, place, Fraction(1, 48000)
            container.mux(sound.encode(piece))
        container.mux(stream.encode())
        container.mux(sound.encode())
    return path


def sound_packets(path: Path) -> list[tuple[Fraction, bytes]]:
    with av.open(str(path)) as container:
        return [(packet.pts * packet.time_base, bytes(packet)) for packet in container.demux(audio=0) if packet.size]


@pytest.mark.parametrize("start", [0.0, 0.4])
@pytest.mark.parametrize("suffix", [".mp4", ".mkv"])
def test_sound_is_copied_packet_by_packet_up_to_the_last_frame(tmp_path: Path, suffix: str, start: float) -> None:
    source, latents, back = sounding(tmp_path / "film.mp4", start=start), tmp_path / "film.safetensors", tmp_path / f"back{suffix}"
    codec = VideoCodec(ShuffleVAE())
    codec.encode_file(source, latents)
    codec.decode_file(latents, back, audio=source)
    copied, given = sound_packets(back), sound_packets(source)
    first = next(index for index, (_, data) in enumerate(given) if data == copied[0][1])
    assert [data for _, data in copied] == [data for _, data in given[first : first + len(copied)]]
    for (here, _), (there, _) in zip(copied, given[first:], strict=False):
        assert abs((here - times_of(back)[0]) - (there - times_of(source)[0])) < Fraction(1, 200)
    with av.open(str(back)) as container:
        sound = container.streams.audio[0]
        assert sound.codec_context.name == "aac"
        assert sound.codec_context.sample_rate == 48000
        assert sum(frame.samples for frame in container.decode(audio=0)) == pytest.approx(48000, abs=3000)
    assert len(list(read_frames(back))) == 25


def test_sound_that_cannot_be_copied(tmp_path: Path, film: Film) -> None:
    codec, latents, back = VideoCodec(ShuffleVAE()), tmp_path / "film.safetensors", tmp_path / "back.mp4"
    codec.encode_file(film(), latents)
    with pytest.raises(ValueError, match=r"film\.mp4' has no audio stream to copy"):
        codec.decode_file(latents, back, audio=tmp_path / "film.mp4")
    with pytest.raises(FileNotFoundError, match="no video file at"):
        codec.decode_file(latents, back, audio=tmp_path / "none.mp4")
    with pytest.raises(ValueError, match="is for pictures, which hold no sound"):
        codec.decode_file(latents, tmp_path / "pictures", audio=tmp_path / "film.mp4")
    source = sounding(tmp_path / "pcm.mkv", codec="pcm_s16le")
    with pytest.raises(ValueError, match=r"cannot hold the sound of .*pcm\.mkv' \(pcm_s16le\); \.mkv holds any"):
        codec.decode_file(latents, tmp_path / "back.3gp", audio=source)
    codec.decode_file(latents, tmp_path / "back.mkv", audio=source)
    assert len(sound_packets(tmp_path / "back.mkv")) > 5
    assert not any(file.name.startswith(".") or file.name == "back.mp4" for file in tmp_path.iterdir())

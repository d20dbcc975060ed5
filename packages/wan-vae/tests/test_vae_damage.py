"""Damaged films: refused, or read on as asked, with what was lost in a warning and in the latent file."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from shuffle_vae import ShuffleVAE
from wan_vae import VideoCodec
from wan_vae.latents import LatentFile
from wan_vae.video import Gap, VideoWriter, probe, read, read_frames

Film = Callable[..., Path]


def counted(path: Path, frames: int = 40, *, codec: str = "libx264", moov_first: bool = True, group: int = 10) -> Path:
    """A film whose frame `i` is grey of level `5 i` on the left; key frames every `group` frames, no reordering."""
    options = {"movflags": "faststart"} if moov_first and path.suffix == ".mp4" else {}
    with av.open(str(path), "w", options=options) as container:
        stream: Any = container.add_stream(codec, rate=25, options={"g": str(group), "bf": "0", "sc_threshold": "0"})
        stream.bit_rate = 8_000_000
        stream.width = stream.height = 64
        texture = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
        for index in range(frames):
            picture = np.roll(texture, index, axis=0)
            picture[:, :32] = 5 * index
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())
    return path


def packets(path: Path) -> list[tuple[int, int]]:
    """Place and size of every packet of a film."""
    with av.open(str(path)) as container:
        return [(packet.pos, packet.size) for packet in container.demux(video=0) if packet.size and packet.pos is not None]


def scratch(path: Path, index: int) -> None:
    """Overwrite the packet of frame `index`, so that no picture comes of it."""
    data, (place, size) = bytearray(path.read_bytes()), packets(path)[index]
    data[place : place + size] = bytes(size)
    path.write_bytes(data)


def shown(path: Path, **options: Any) -> tuple[list[int], list[int], list[Gap]]:
    """The number that each frame shows, its time, and the gaps."""
    reader = read(path, **options)
    frames = list(reader)
    return [round(float(pixels[:, :24].mean()) / 5) for pixels, _ in frames], [pts for _, pts in frames], reader.gaps


def test_a_whole_film_has_no_gap(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for suffix, codec in ((".mp4", "libx264"), (".mkv", "libx264"), (".avi", "mpeg4"), (".webm", "libvpx-vp9"), (".ts", "libx264")):
            numbers, times, gaps = shown(counted(tmp_path / f"film{suffix}", codec=codec))
            assert (numbers, gaps) == (list(range(40)), [])
            assert len(set(np.diff(times))) <= 2


def test_a_lost_frame_is_an_error_a_stop_or_a_fill(tmp_path: Path) -> None:
    path = counted(tmp_path / "film.mp4")
    _, times, _ = shown(path)
    scratch(path, 13)
    with pytest.raises(ValueError, match=r"film\.mp4' is damaged after 13 frames: .*--on-error stop or fill goes on"):
        list(read_frames(path))
    with pytest.warns(RuntimeWarning, match="read up to frame 13, 27 are left out"):
        assert shown(path, on_error="stop") == (list(range(13)), times[:13], [Gap(13, 27, "cut")])
    with pytest.warns(RuntimeWarning, match="7 of 40 frames repeat a neighbour"):
        assert shown(path, on_error="fill") == ([*range(13), *[12] * 7, *range(20, 40)], times, [Gap(13, 7, "filled")])


def test_flipped_bits_within_a_picture_are_told_as_far_as_the_decoder_notices(real_clips: Path, tmp_path: Path) -> None:
    path = tmp_path / "film.mp4"
    whole, places = (real_clips / "bikes.mp4").read_bytes(), packets(real_clips / "bikes.mp4")[1:40:3]
    good = list(read_frames(real_clips / "bikes.mp4", limit=60))
    refused = silent = 0
    for place, size in places:
        data = bytearray(whole)
        data[place + size // 3] ^= 0x10
        path.write_bytes(data)
        try:
            silent += not np.array_equal(good, list(read_frames(path, limit=60)))
        except ValueError:
            refused += 1
    assert refused > 2 * silent, "video has no checksums: some are seen by none"


def test_a_film_that_begins_with_damage(tmp_path: Path) -> None:
    path = counted(tmp_path / "film.mp4")
    scratch(path, 0)
    with pytest.raises(ValueError, match="damaged after 0 frames"):
        list(read_frames(path))
    with pytest.raises(ValueError, match="no readable frame"):
        list(read_frames(path, on_error="stop"))
    with pytest.warns(RuntimeWarning, match="10 of 40"):
        numbers, times, gaps = shown(path, on_error="fill")
    assert (numbers, gaps) == ([*[10] * 10, *range(10, 40)], [Gap(0, 10, "filled")])
    assert times[0] == 0


@pytest.mark.parametrize("suffix", [".mp4", ".mkv", ".avi"])
def test_a_film_cut_short(tmp_path: Path, suffix: str) -> None:
    path = counted(tmp_path / f"film{suffix}", codec="mpeg4" if suffix == ".avi" else "libx264")
    place, size = packets(path)[27]
    path.write_bytes(path.read_bytes()[: place + size // 2])
    with pytest.raises(ValueError, match=r"damaged after 2[67] frames"):
        list(read_frames(path))
    with pytest.warns(RuntimeWarning, match="is damaged"):
        numbers, _, gaps = shown(path, on_error="stop")
    assert numbers == list(range(gaps[0].start))
    assert gaps[0].start in (26, 27)
    with pytest.warns(RuntimeWarning, match="repeat a neighbour"):
        numbers, _, gaps = shown(path, on_error="fill")
    assert numbers == [*range(gaps[0].start), *[gaps[0].start - 1] * (40 - gaps[0].start)]
    assert gaps == [Gap(gaps[0].start, 40 - gaps[0].start, "filled")]


def test_a_header_that_declares_far_more_than_there_is(tmp_path: Path) -> None:
    path = counted(tmp_path / "film.avi", 6, codec="mpeg4")
    data = bytearray(path.read_bytes())
    for key, offset in ((b"avih", 8 + 16), (b"strh", 8 + 32)):  # the count of frames in both headers
        place = data.index(key) + offset
        data[place : place + 4] = (2_000_000_000).to_bytes(4, "little")
    path.write_bytes(data)
    assert probe(path).frames == 2_000_000_000
    with pytest.raises(ValueError, match="declares 2000000000 frames and holds 6; --on-error"):
        list(read_frames(path))
    with pytest.raises(ValueError, match=r"' is damaged: .* too many to fill"):
        list(read_frames(path, on_error="fill"))
    with pytest.warns(RuntimeWarning, match="read up to frame 6, 1999999994 are left out"):
        assert len(list(read_frames(path, on_error="stop"))) == 6


def test_a_recording_that_was_not_finished(tmp_path: Path) -> None:
    path = counted(tmp_path / "film.mp4", moov_first=False)
    path.write_bytes(path.read_bytes()[:-3000])
    for on_error in ("error", "stop", "fill"):
        with pytest.raises(ValueError, match=r"not a readable video: .* \(an mp4 without a usable index, such as a recording"):
            list(read_frames(path, on_error=on_error))


@pytest.mark.parametrize(("on_error", "frames", "gap"), [("stop", 13, Gap(13, 27, "cut")), ("fill", 40, Gap(13, 7, "filled"))])
def test_gaps_are_recorded_in_the_latent_file(tmp_path: Path, on_error: str, frames: int, gap: Gap) -> None:
    path, latents, codec = counted(tmp_path / "film.mp4"), tmp_path / "film.safetensors", VideoCodec(ShuffleVAE())
    scratch(path, 13)
    with pytest.raises(ValueError, match="damaged after 13"):
        codec.encode_file(path, latents)
    assert not latents.exists()
    with pytest.warns(RuntimeWarning, match="is damaged"):
        codec.encode_file(path, latents, on_error=on_error)
    info = LatentFile.open(latents).info
    assert (info.frames, info.gaps) == (frames, (gap,))
    assert codec.decode_file(latents, tmp_path / "back.mp4").frames == frames


def test_a_limit_before_the_damage_does_not_see_it(tmp_path: Path) -> None:
    path = counted(tmp_path / "film.mp4")
    scratch(path, 13)
    assert len(list(read_frames(path, limit=13))) == 13


def test_an_unknown_answer_to_damage(film: Film) -> None:
    with pytest.raises(ValueError, match="on_error is 'ignore', expected one of error, stop, fill"):
        read(film(), on_error="ignore")


def test_a_pause_among_even_frames_is_told(tmp_path: Path) -> None:
    path = tmp_path / "film.mkv"
    with VideoWriter(path, fps=25, size=(32, 16)) as writer:
        for index in range(40):
            writer.write(np.full((16, 32, 3), index, np.uint8), index + 3 * (index > 20))
    with pytest.warns(RuntimeWarning, match=r"film\.mkv' has 1 pauses among evenly spaced frames"):
        assert len(list(read_frames(path))) == 40


def test_frames_that_an_edit_list_leaves_out_are_told(tmp_path: Path) -> None:
    path = counted(tmp_path / "film.mp4")
    data = bytearray(path.read_bytes())
    place = data.index(b"elst") + 12
    data[place : place + 4] = (600).to_bytes(4, "big")  # of 1600 ms
    path.write_bytes(data)
    with pytest.warns(RuntimeWarning, match="holds 40 frames, of which its edit list shows 1[56]; the others are left out"):
        numbers, _, gaps = shown(path)
    assert numbers == list(range(len(numbers)))
    assert gaps == []

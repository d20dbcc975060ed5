"""Parts of films, entered in their middle, are those of the whole."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from wan_train.data.film import SLACK, probe, read
from wan_vae.video import Reader


@pytest.mark.parametrize("name", ["bikes.mp4", "carphone_pristine.mp4"])
@pytest.mark.parametrize("fps", [Fraction(16), Fraction(30000, 1001)])
def test_parts_of_real_films_are_those_of_the_whole(real: Path, name: str, fps: Fraction) -> None:
    reader = Reader(real / name)
    frames = [(pts * reader.info.time_base, pixels) for pixels, pts in reader]
    facts = probe(real / name)
    count = facts.frames(fps)
    assert facts.seconds == pytest.approx(reader.info.duration, abs=0.05)
    for start in (0, 1, count // 2, count - 6):
        for k, pixels in enumerate(read(real / name, facts, start / fps, 6, fps)):
            shown = [frame for time, frame in frames if time - frames[0][0] <= (start + k) / fps + SLACK][-1]
            assert np.array_equal(pixels, shown), (start, k)
    with pytest.raises(ValueError, match="seconds long"):
        list(read(real / name, facts, (count - 5) / fps, 6, fps))


@pytest.mark.parametrize(
    ("suffix", "codec", "options"),
    [
        (".mp4", "libx264", {"g": "24", "bf": "3"}),
        (".mp4", "libx265", {"x265-params": "open-gop=1:keyint=24:bframes=3:log-level=none"}),
        (".mkv", "libx264", {"g": "24", "x264-params": "open-gop=1:bframes=3"}),
        (".ts", "libx264", {"g": "24", "bf": "3"}),  # entered behind the wanted time at first
        (".mpg", "mpeg2video", {"g": "15", "bf": "2"}),  # whose times depend on where one enters
        (".avi", "mpeg4", {"g": "7", "bf": "2"}),
        (".webm", "libvpx-vp9", {"g": "24"}),
        (".gif", "gif", {}),
    ],
)
def test_a_part_of_any_container_is_that_of_the_whole(tmp_path: Path, suffix: str, codec: str, options: dict[str, str]) -> None:
    path = tmp_path / f"a{suffix}"
    with av.open(str(path), "w") as container:
        stream: Any = container.add_stream(codec, rate=25, options=options)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "rgb8" if suffix == ".gif" else "yuv420p"
        for i in range(80):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.full((48, 64, 3), 3 * i, np.uint8), format="rgb24")))
        container.mux(stream.encode())
    facts, fps = probe(path), Fraction(25)
    assert facts.frames(fps) == 80
    whole = list(read(path, facts, Fraction(0), 80, fps))
    assert len({int(pixels.mean()) for pixels in whole}) > (6 if suffix == ".gif" else 35)
    for start in range(1, 75, 7):
        part = list(read(path, facts, start / fps, 5, fps))
        assert all(np.array_equal(a, b) for a, b in zip(part, whole[start : start + 5], strict=True)), start


def test_a_last_frame_that_stands_long_is_read_from_the_middle_too(tmp_path: Path) -> None:
    path = tmp_path / "a.mp4"
    with av.open(str(path), "w") as container:
        stream: Any = container.add_stream("libx264", rate=10, options={"g": "4", "bf": "0", "crf": "5"})
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        packets = [p for i in range(12) for p in stream.encode(av.VideoFrame.from_ndarray(np.full((48, 64, 3), 20 * i, np.uint8), "rgb24"))]
        for packet in (packets := [*packets, *stream.encode()]):
            packet.duration = 10 if packet is packets[-1] else 1
            container.mux(packet)
    facts = probe(path)
    assert facts.seconds == Fraction(21, 10)
    shown = [round(float(pixels.mean()) / 20) for pixels in read(path, facts, Fraction(1), 11, Fraction(10))]
    assert shown == [10] + [11] * 10

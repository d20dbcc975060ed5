"""The data set `folder`: captions as people keep them, films by time, every problem of a folder told at once."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from fractions import Fraction
from itertools import pairwise
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from wan_train.data.buckets import Bucket
from wan_train.data.file_index import FileIndex, look
from wan_train.data.folder import Folder
from wan_train.data.scan import Cut, scan
from wan_vae.video import VideoWriter

SMALL = Bucket(5, 16, 32)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    folder = tmp_path / "clips"
    folder.mkdir()
    return folder


def film(path: Path, frames: int = 24, fps: Any = 8, size: tuple[int, int] = (32, 16), pts: Sequence[int] | None = None) -> Path:
    """Frame i is grey of level 8 i, exactly."""
    with VideoWriter(path, fps=fps, size=size, lossless=True, **({"time_base": Fraction(1, 1000)} if pts else {})) as writer:
        for i in range(frames):
            writer.write(np.full((size[1], size[0], 3), 8 * i % 256, np.uint8), *([pts[i]] if pts else []))
    return path


def picture(path: Path, size: tuple[int, int] = (32, 16), level: int = 80, **options: Any) -> Path:
    Image.fromarray(np.full((size[1], size[0], 3), level, np.uint8)).save(path, **options)
    return path


def levels(clip: torch.Tensor) -> list[int]:
    """The grey of each frame, where it is one."""
    pixels = ((clip + 1) * 127.5).round()
    assert torch.equal(pixels, pixels[:1, :, :1, :1].expand_as(pixels))
    return [int(level) for level in pixels[0, :, 0, 0]]


def captioned(media: Path, text: str = "a clip") -> Path:
    media.with_suffix(".txt").write_text(text)
    return media


def folder(root: Path, **options: Any) -> Folder:
    return Folder(root, **{"fps": 8, "frames": 5, **options})


# captions


def test_a_sidecar_has_a_caption_a_line(root: Path) -> None:
    captioned(film(root / "b.mp4", 5), "\ufeffa red ball\r\n\r\n  it rolls  \n")
    (film(root / "a.mkv", 5).parent / "a.mkv.txt").write_text("another")
    data = folder(root)
    assert [data.captions(i) for i in range(len(data))] == [["another"], ["a red ball", "it rolls"]]
    assert data.info(0) == (5, 16, 32, 8.0)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("metadata.jsonl", '{"file_name": "x/a.mp4", "text": "one"}\n\n{"file_name": "b.png", "captions": ["two", "three"]}\n'),
        ("metadata.jsonl", '{"video_path": "x/a.mp4", "caption": "one"}\n{"image_path": "b.png", "caption": "two", "prompt": "three"}'),
        ("metadata.csv", 'file_name,text\nx/a.mp4,one\nb.png,"[""two"", ""three""]"\n'),
        ("metadata.csv", "\ufeffvideo,prompt\nx/a.mp4,one\nb.png,two\nb.png,three\n"),
        ("captions.json", '{"x/a.mp4": "one", "b.png": ["two", "three"]}'),
    ],
)
def test_listings_in_the_names_of_many_tools(root: Path, name: str, text: str) -> None:
    (root / "x").mkdir()
    film(root / "x" / "a.mp4", 5)
    picture(root / "b.png")
    (root / name).write_text(text, encoding="utf-8")
    data = folder(root)
    assert {data[i].file.name: data.captions(i) for i in range(len(data))} == {"a.mp4": ["one"], "b.png": ["two", "three"]}


def test_a_listing_by_its_own_name_reads_only_what_it_lists(root: Path) -> None:
    film(root / "a.mp4", 5)
    film(root / "b.mp4", 5)
    listing = root / "mine.jsonl"
    listing.write_text(json.dumps({"file": str(root / "a.mp4"), "prompt": "one"}))  # an absolute path
    assert [clip.file.name for clip in folder(listing).clips] == ["a.mp4"]


def test_a_file_that_a_listing_leaves_out_may_have_a_sidecar(root: Path) -> None:
    (root / "metadata.jsonl").write_text('{"file_name": "a.png", "text": ""}\n')
    captioned(picture(root / "a.png"), "beside")
    captioned(picture(root / "b.png"), "beside too")
    data = folder(root)
    assert [data.captions(i) for i in range(2)] == [["beside"], ["beside too"]]


def test_captions_are_optional_where_nothing_is_read_from_them(root: Path) -> None:
    picture(root / "a.png")
    assert folder(root, captions="optional").captions(0) == [""]


# problems


def test_all_problems_are_told_at_once_by_file(root: Path) -> None:
    captioned(film(root / "good.mp4", 5))
    film(root / "mute.mp4", 5)
    captioned(film(root / "short.mp4", 3))
    captioned(root / "cut.mp4").write_bytes(film(root / "whole.mkv", 24).read_bytes()[:300])
    (root / "whole.mkv").unlink()
    captioned(root / "text.png").write_text("no picture")
    captioned(picture(root / "tiny.png", (8, 8)))
    picture(root / "latin.png").with_suffix(".txt").write_bytes(b"caf\xe9")
    rows = ['{"file_name": "gone.mp4", "text": "x"}', "not json", '{"text": "no file"}', '{"file_name": "tiny.png", "text": [1]}']
    (root / "metadata.jsonl").write_text("\n".join(rows))
    found = scan(root, Cut(Fraction(8), 5), min_side=16)
    assert {(problem.file, problem.kind) for problem in found.problems} == {
        ("mute.mp4", "caption"),
        ("short.mp4", "short"),
        ("cut.mp4", "unreadable"),
        ("text.png", "unreadable"),
        ("tiny.png", "small"),
        ("latin.png", "caption"),
        ("gone.mp4", "missing"),
        ("metadata.jsonl", "listing"),
    }
    assert len(found.problems) == 10
    assert [clip.file.name for clip in found.clips] == ["good.mp4"]
    with pytest.raises(ValueError, match="has 10 problems") as error:
        folder(root, min_side=16)
    for problem in found.problems:
        assert f"{problem.file}: {problem.message}" in str(error.value)
    assert "3 frames at 8 a second (0.38 s), 5 are needed" in str(error.value)
    counts = "10 files or lines are left out: 2 caption, 3 listing, 1 missing, 1 short, 1 small, 2 unreadable"
    with pytest.warns(RuntimeWarning, match=counts):
        assert len(folder(root, min_side=16, on_problem="skip")) == 1


def test_a_film_cut_in_its_middle_is_found_by_the_scan(root: Path, real: Path) -> None:
    whole = (real / "bikes.mp4").read_bytes()
    captioned(root / "cut.mp4").write_bytes(whole[: len(whole) * 2 // 3])
    with pytest.raises(ValueError, match=r"cut\.mp4"):
        folder(root)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"fps": 0}, "fps: .*greater than 0"),
        ({"frames": 0}, "frames: .*greater than 0"),
        ({"overlap": 5}, "overlap"),
        ({"min_frames": 6}, "min_frames"),
        ({"captions": "none"}, "captions: .*'required' or 'optional'"),
        ({"size": [16]}, "size"),
        ({"on_problem": "ignore"}, "'strict' or 'skip'"),
        ({"ftps": 16}, "ftps"),
        ({"holdout": -1}, "holdout: .*greater than or equal to 0"),
        ({"holdout": 1}, "leaves no file"),
    ],
)
def test_settings_out_of_range_are_refused(root: Path, options: dict[str, Any], message: str) -> None:
    captioned(film(root / "a.mp4", 5))
    with pytest.raises(ValueError, match=message):
        folder(root, **options)


def test_what_is_no_data_is_refused(root: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no folder or listing"):
        folder(root / "gone")
    with pytest.raises(ValueError, match="has no sample"):
        folder(root)
    with pytest.raises(ValueError, match="no folder and no listing"):
        folder(film(root / "a.mp4", 5))


# films by time


@given(st.integers(1, 400), st.integers(1, 100), st.integers(0, 99), st.integers(0, 100))
def test_parts_of_a_film_cover_it_without_what_is_too_short(count: int, frames: int, overlap: int, shortest: int) -> None:
    overlap, shortest = overlap % frames, shortest % (frames + 1)
    parts = Cut(Fraction(8), frames, shortest, overlap).of(count)
    assert all((shortest or frames) <= length <= frames and start + length <= count for start, length in parts)
    assert all(after == before + frames - overlap for (before, _), (after, _) in pairwise(parts))
    assert all(sum(after) > sum(before) for before, after in pairwise(parts))  # each has frames that the one before has not
    left = count - (parts[-1][0] + parts[-1][1] if parts else 0)
    assert left < max(shortest or frames, overlap + 1)  # nothing is left that would have been a sample


def test_a_long_film_becomes_clips_with_their_own_frames(root: Path) -> None:
    captioned(film(root / "a.mp4", 24))
    data = folder(root, frames=9, min_frames=5, overlap=1)
    assert [(clip.start, clip.frames) for clip in data.clips] == [(0, 9), (8, 9), (16, 8)]
    assert [levels(data.clip(i, SMALL)) for i in range(3)] == [[8 * (start + k) for k in range(5)] for start in (0, 8, 16)]


def test_frames_are_taken_by_time_at_any_rate(root: Path) -> None:
    captioned(film(root / "a.mp4", 24, fps=24))
    assert levels(folder(root, fps=8).clip(0, SMALL)) == [0, 24, 48, 72, 96]  # every third: the speed is kept
    assert levels(folder(root, fps=48).clip(0, SMALL)) == [0, 0, 8, 8, 16]


def test_a_film_of_changing_rate_keeps_its_time(root: Path) -> None:
    times = [0, 100, 200, 300, 800, 1300, 1400, 1500]
    captioned(film(root / "a.mkv", 8, pts=times))
    data = folder(root, fps=10, frames=13)
    shown = [max(i for i, time in enumerate(times) if time <= 100 * k) for k in range(13)]
    assert levels(data.clip(0, Bucket(13, 16, 32))) == [8 * i for i in shown]


def test_times_that_a_container_rounds_are_no_reason_to_show_a_frame_twice(root: Path) -> None:
    captioned(film(root / "a.mkv", 24, fps=24))  # in milliseconds: 42 for 41.67
    assert levels(folder(root, fps=24, frames=24).clip(0, Bucket(24, 16, 32))) == [8 * i for i in range(24)]


def test_damage_within_a_sample_is_told_and_outside_is_not(root: Path, real: Path) -> None:
    path = captioned(root / "a.mp4")
    data = bytearray((real / "bikes.mp4").read_bytes())
    with av.open(str(real / "bikes.mp4")) as container:
        packets = [(packet.pts * packet.time_base, packet.pos, packet.size) for packet in container.demux(video=0) if packet.size]
    _, start, size = next(packet for packet in packets if packet[0] >= 2)
    data[start + 4 : start + size] = bytes(size - 4)  # zeros after the length of a frame
    path.write_bytes(data)
    clips = folder(root, fps=25, frames=25)
    assert [clip.start for clip in clips.clips][:4] == [0, 25, 50, 75]
    clips.clip(0, Bucket(25, 16, 32))
    with pytest.raises(ValueError, match=r"a\.mp4' is damaged"):
        clips.clip(2, Bucket(25, 16, 32))


# pixels


def test_pixels_are_scaled_to_cover_the_bucket_and_cut_in_the_middle(root: Path) -> None:
    ramp = np.zeros((40, 100, 3), np.uint8)
    ramp[:, :, 0] = np.arange(100)[None] * 2
    ramp[:, :, 1] = np.arange(40)[:, None] * 5
    Image.fromarray(ramp).save(captioned(root / "a.png"))
    clip = folder(root).clip(0, Bucket(1, 20, 20))  # the middle 40x40, halved
    assert clip.shape == (3, 1, 20, 20)
    red, green = ((clip[:2, 0] + 1) * 127.5).numpy()
    assert red[10] == pytest.approx(2 * (30 + 2 * np.arange(20) + 0.5), abs=1.5)
    assert green[:, 10] == pytest.approx(5 * (2 * np.arange(20) + 0.5), abs=3)
    assert float(clip.min()) >= -1
    assert float(clip.max()) <= 1


def test_a_picture_is_upright_and_a_transparent_one_on_white(root: Path) -> None:
    tall = Image.new("RGB", (32, 16))
    tall.paste((255, 0, 0), (0, 0, 16, 16))
    exif = Image.Exif()
    exif[0x0112] = 6
    tall.save(captioned(root / "a.jpg"), exif=exif, quality=95)
    Image.new("RGBA", (32, 16), (0, 0, 0, 0)).save(captioned(root / "b.png"))
    data = folder(root)
    assert data.info(0) == (1, 32, 16, 0.0)
    turned = data.clip(0, Bucket(1, 32, 16))
    assert float(turned[0, 0, :12].mean()) > 0.9
    assert float(turned[0, 0, 20:].mean()) < -0.9
    assert levels(data.clip(1, Bucket(1, 16, 32))) == [255]


def test_pixels_that_are_not_square_are_made_square(root: Path) -> None:
    path = captioned(root / "a.mkv")
    with VideoWriter(path, fps=8, size=(32, 32), lossless=True, pixel_aspect=Fraction(2)) as writer:
        frame = np.zeros((32, 32, 3), np.uint8)
        frame[:, 16:] = 255
        for _ in range(5):
            writer.write(frame)
    data = folder(root)
    assert data.info(0).width == 64
    clip = data.clip(0, Bucket(5, 32, 64))
    assert float(clip[:, :, :, :28].max()) < -0.9
    assert float(clip[:, :, :, 36:].min()) > 0.9
    square = data.clip(0, Bucket(5, 32, 32))  # the middle 32 of 64 columns: 16 stored ones
    assert float(square[:, :, :, 14].max()) < 0 < float(square[:, :, :, 17].min())


def test_a_bucket_longer_than_its_sample_is_refused(root: Path) -> None:
    captioned(film(root / "a.mp4", 5))
    with pytest.raises(ValueError, match=r"5 frames from 0 on, the bucket 9x16x32"):
        folder(root).clip(0, Bucket(9, 16, 32))


def test_clips_of_one_size_are_stacked_and_held_out_files_follow(root: Path) -> None:
    for i in range(6):
        captioned(film(root / f"{i}.mp4", 5), f"clip {i}")
    data = folder(root, size=(16, 32), holdout=2)
    assert (len(data), len(data.held_out)) == (4, 2)
    assert {data[i].file for i in range(4)} | {data[i].file for i in (4, 5)} == {root / f"{i}.mp4" for i in range(6)}
    assert data[6] == data[0]
    assert data.video([0, 4]).shape == (2, 3, 5, 16, 32)
    assert data.evaluation_prompts(3) == [data.captions(i)[0] for i in (4, 5, 0)]
    with pytest.raises(ValueError, match="size = "):
        folder(root).video([0])


# what is kept between runs


def test_files_are_looked_at_once_until_they_change(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    captioned(film(root / "a.mp4", 5))
    captioned(picture(root / "b.png"))
    looked: list[str] = []
    monkeypatch.setattr("wan_train.data.file_index.look", lambda path: (looked.append(path.name), look(path))[1])
    first = folder(root)
    assert sorted(looked) == ["a.mp4", "b.png"]
    again = folder(root)
    assert sorted(looked) == ["a.mp4", "b.png"]
    assert (again.clips, again.key()) == (first.clips, first.key())
    film(root / "a.mp4", 10)
    assert len(folder(root)) == 3
    assert looked[2:] == ["a.mp4"]


def test_a_file_that_could_not_be_read_is_looked_at_again_when_it_changes(root: Path) -> None:
    captioned(root / "a.png").write_text("nothing")
    for _ in range(2):
        with pytest.raises(ValueError, match="not a picture"):
            folder(root)
    picture(root / "a.png")
    assert len(folder(root)) == 1


def test_a_damaged_index_is_made_anew_and_one_that_cannot_be_written_is_told(root: Path, tmp_path: Path) -> None:
    captioned(picture(root / "a.png"))
    index = tmp_path / "index.sqlite"
    index.write_bytes(b"not a database, but long enough to be taken for one" * 20)
    assert len(folder(root, index=index)) == 1
    assert index.read_bytes().startswith(b"SQLite")
    blocked = picture(root / "b.png")
    captioned(blocked)
    with pytest.warns(RuntimeWarning, match="no index of files"):
        assert len(folder(root, index=blocked / "index.sqlite")) == 2


def test_a_sample_is_known_by_the_bytes_of_its_file_and_its_part(root: Path) -> None:
    captioned(film(root / "a.mp4", 10))
    (root / "sub").mkdir()
    shutil.copy(root / "a.mp4", captioned(root / "sub" / "b.mp4", "the same film"))
    data = folder(root)
    names = [data.identity(i) for i in range(4)]
    assert names[:2] == names[2:]
    assert names[0] != names[1]
    before = data.key()
    film(root / "a.mp4", 10, size=(48, 16))
    changed = folder(root)
    assert changed.identity(0) != names[0]
    assert changed.identity(2) == names[0]
    assert changed.key() != before
    assert folder(root, fps=4).identity(0) != changed.identity(0)


def test_several_threads_may_fill_one_index(root: Path, tmp_path: Path) -> None:
    files = [picture(root / f"{i}.png", (8 + i, 8)) for i in range(30)]
    index = FileIndex(tmp_path / "index.sqlite")
    found = scan(root, Cut(Fraction(8), 5), captions=False, index=index)
    assert [clip.media.width for clip in found.clips] == [look(clip.file).width for clip in found.clips]
    assert len(found.clips) == len(files)


def test_the_plugin_is_found_by_its_name() -> None:
    from wan_train.plugins import find

    assert find("wan_datasets", "folder").resolve() is Folder

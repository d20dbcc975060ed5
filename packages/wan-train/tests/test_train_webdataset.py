"""The data set `webdataset`: samples in tars are those of the unpacked folder, to the bit."""

from __future__ import annotations

import json
import os
import tarfile
import warnings
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
from PIL import Image
from tar_files import film_bytes, pack, picture_bytes
from wan_train import cli
from wan_train.data import film
from wan_train.data.buckets import Bucket
from wan_train.data.cache import Cache
from wan_train.data.file_index import FileIndex, look
from wan_train.data.folder import Folder
from wan_train.data.tars import tar_contents
from wan_train.data.webdataset import WebDataset
from wan_vae.film import FilePart
from wan_vae.model import WanVAE

CUT: dict[str, Any] = {"fps": 8, "frames": 5}


def unpack(tars: Path, folder: Path) -> Path:
    for path in tars.glob("*.tar"):
        with tarfile.open(path) as tar:
            tar.extractall(folder / path.name, filter="data")
    return folder


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    """Two tars with three films, of 24 and 30 frames a second, and three pictures; each has its own caption."""
    exif = Image.Exif()
    exif[0x0112] = 6
    root = tmp_path / "sh,ar:ds"  # a comma and a colon mean something to FFmpeg
    pack(
        root / "shard-000000.tar",
        {
            "b.mp4": film_bytes(72, 24, 1),
            "b.txt": b"b one\nb two\n",
            "x/a.mp4": film_bytes(30, 30, 2),
            "x/a.txt": b"a film",
            "turned.jpg": picture_bytes(exif=exif),
            "turned.txt": b"upright",
        },
    )
    pack(
        root / "shard-000001.tar",
        {
            "c.txt": b"before its film",
            "d.png": picture_bytes(20, "PNG"),
            "d.txt": b"dark",
            "c.mp4": film_bytes(50, 24, 3),
            "e.webp": picture_bytes(200, "WEBP"),
            "e.txt": b"bright",
        },
    )
    return root


# what is read


def test_samples_are_those_of_the_unpacked_folder_to_the_bit(shards: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {"fps": 10, "frames": 9, "min_frames": 5, "overlap": 1}
    tars, files = WebDataset(shards, **options), Folder(unpack(shards, tmp_path / "unpacked"), **options)
    told = [(str(clip.file).removeprefix(f"{shards}/"), clip.start, clip.frames) for clip in tars.clips]
    assert told == [(str(Path(str(clip.file)).relative_to(tmp_path / "unpacked")), clip.start, clip.frames) for clip in files.clips]
    assert told[:4] == [("shard-000000.tar/b.mp4", start, length) for start, length in ((0, 9), (8, 9), (16, 9), (24, 6))]
    assert len(tars) == 11
    for i in range(len(tars)):
        assert tars.info(i) == files.info(i)
        assert tars.captions(i) == files.captions(i)
        assert tars.identity(i) == files.identity(i)
        frames = 5 if tars.info(i).frames > 1 else 1
        got = tars.clip(i, Bucket(frames, 16, 32))
        assert got.shape == (3, frames, 16, 32)
        assert torch.equal(got, files.clip(i, Bucket(frames, 16, 32))), told[i]
    assert len({tars.identity(i) for i in range(11)}) == 11


def test_a_cache_of_the_unpacked_folder_holds_for_the_tars(shards: Path, tmp_path: Path, micro_vae: Path) -> None:
    cache = Cache(tmp_path / "cache", vae=WanVAE.from_pretrained(micro_vae), text_encoder=None)
    tars, files = WebDataset(shards, **CUT), Folder(unpack(shards, tmp_path / "unpacked"), **CUT)
    done = cache.fill(files, [(i, Bucket(files.info(i).frames, 16, 32)) for i in range(len(files))])
    assert (done.made, done.present) == (11, 0)
    done = cache.fill(tars, [(i, Bucket(tars.info(i).frames, 16, 32)) for i in range(len(tars))])
    assert (done.made, done.present) == (0, 11)


@pytest.mark.parametrize(
    ("suffix", "codec", "options"),
    [
        (".mp4", "libx264", {"g": "12", "bf": "3"}),
        (".mov", "mpeg4", {"g": "7"}),
        (".mkv", "libx264", {"g": "12", "bf": "3"}),
        (".ts", "libx264", {"g": "12", "bf": "3"}),
        (".mpg", "mpeg2video", {"g": "15", "bf": "2"}),
        (".avi", "mpeg4", {"g": "7", "bf": "2"}),
        (".webm", "libvpx-vp9", {"g": "12"}),
        (".gif", "gif", {}),
    ],
)
def test_a_film_of_any_container_is_read_within_a_tar(tmp_path: Path, suffix: str, codec: str, options: dict[str, str]) -> None:
    path, fps = tmp_path / f"a{suffix}", Fraction(25)
    with av.open(str(path), "w") as container:
        stream: Any = container.add_stream(codec, rate=25, options=options)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "rgb8" if suffix == ".gif" else "yuv420p"
        for i in range(40):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.full((48, 64, 3), 6 * i, np.uint8), format="rgb24")))
        container.mux(stream.encode())
    data = path.read_bytes()  # other films stand before and after it
    shard = pack(tmp_path / "a.tar", {f"0{suffix}": data[: len(data) // 2], f"1{suffix}": data, f"2{suffix}": data})
    part = next(file for file in tar_contents(shard).files if file.name == f"1{suffix}")
    assert part.size == len(data)
    assert look(part) == look(path)
    for start in (0, 13, 33):
        whole = list(film.read(path, film.probe(path), start / fps, 7, fps))
        assert all(np.array_equal(a, b) for a, b in zip(film.read(part, film.probe(part), start / fps, 7, fps), whole, strict=True))


def test_members_share_the_key_up_to_the_first_dot(tmp_path: Path) -> None:
    picture, other = picture_bytes(), picture_bytes(90)
    members = {
        "./v1.5/a.left.jpg": picture,  # packed with `tar -cf a.tar .`
        "./v1.5/a.right.jpg": other,
        "./v1.5/a.txt": "\ufeffone\r\n\r\n  two ".encode(),
        "b.jpg": picture,
        "b.txt": b"first\nsecond",
        "b.json": json.dumps({"caption": "second", "prompts": ["third", "fourth"], "url": "x", "text": None}).encode(),
        "c.jpg": picture,
        "c.json": b'["one", "two"]',
        "d.jpg": other,
        "d.caption": b"of musubi's name",
        ".hidden.jpg": picture,
        "__MACOSX/._a.jpg": b"no picture",
        "e.npy": b"other data",
        "b.jpg.json": b"{}",
    }
    data = WebDataset(pack(tmp_path / "a.tar", members), **CUT)
    assert {clip.file.name: list(clip.captions) for clip in data.clips} == {
        "a.left.jpg": ["one", "two"],
        "a.right.jpg": ["one", "two"],
        "b.jpg": ["first", "second", "third", "fourth"],
        "c.jpg": ["one", "two"],
        "d.jpg": ["of musubi's name"],
    }


# which tars


def test_a_folder_one_tar_or_a_pattern_may_be_given(shards: Path) -> None:
    every = WebDataset(shards, **CUT)
    pattern = WebDataset(shards / "shard-{000000..000001}.tar", **CUT)
    assert pattern.clips == every.clips
    one = WebDataset(shards / "shard-000001.tar", **CUT)
    assert one.clips == [clip for clip in every.clips if isinstance(clip.file, FilePart) and clip.file.path.name == "shard-000001.tar"]
    pack(shards / "sub" / "{0}.tar", {"z.png": picture_bytes(kind="PNG"), "z.txt": b"z"})
    assert len(WebDataset(shards, **CUT)) == len(every) + 1
    assert len(WebDataset(shards / "sub" / "{0}.tar", **CUT)) == 1


# what is kept, held out, trained


def test_members_are_looked_at_once_until_their_tar_changes(shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    looked: list[str] = []
    monkeypatch.setattr("wan_train.data.file_index.look", lambda path: (looked.append(path.name), look(path))[1])
    first = WebDataset(shards, **CUT)
    assert sorted(looked) == ["a.mp4", "b.mp4", "c.mp4", "d.png", "e.webp", "turned.jpg"]
    again = WebDataset(shards, **CUT)
    known = again.identity(len(again) - 2)
    assert len(looked) == 6
    assert (again.clips, again.key()) == (first.clips, first.key())
    path = shards / "shard-000001.tar"
    size, stat = path.stat().st_size, path.stat()
    pack(path, {"c.txt": b"before its film", "d.png": picture_bytes(99, "PNG"), "d.txt": b"dark"})
    os.truncate(path, size)  # the tar and its member keep their sizes, the member its place
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    changed = WebDataset(shards, **CUT)
    assert looked[6:] == ["d.png"]
    assert changed.key() != first.key()
    before, after = len(first) - 2, len(changed) - 1
    assert changed[after].file == first[before].file
    assert changed.identity(after) != known


def test_a_part_that_is_cut_after_the_scan_is_told(shards: Path) -> None:
    data = WebDataset(shards / "shard-000001.tar", **CUT)
    index = next(i for i, clip in enumerate(data.clips) if clip.file.name == "e.webp")
    file = data[index].file
    assert isinstance(file, FilePart)
    os.truncate(file.path, file.start + 10)
    with pytest.raises(ValueError, match=rf"e\.webp' is cut: .* ends {file.size - 10} bytes before"):
        data.clip(index, Bucket(1, 16, 32))
    with pytest.raises(ValueError, match=r"e\.webp' is cut"):
        FileIndex().sha256(file)


def test_the_same_files_are_held_out_as_of_the_unpacked_folder(shards: Path, tmp_path: Path) -> None:
    tars = WebDataset(shards, holdout=2, **CUT)
    files = Folder(unpack(shards, tmp_path / "unpacked"), holdout=2, **CUT)
    assert {clip.file.name for clip in tars.held_out} == {clip.file.name for clip in files.held_out}
    assert len({clip.file for clip in tars.held_out}) == 2
    assert not {clip.file for clip in tars.clips} & {clip.file for clip in tars.held_out}
    assert tars.evaluation_prompts(1) == [tars.captions(len(tars))[0]]


def test_of_two_files_of_one_name_the_same_is_held_out_each_time(tmp_path: Path) -> None:
    for shard in range(8):
        pack(tmp_path / f"{shard}.tar", {"0.png": picture_bytes(shard, "PNG"), "0.txt": b"a"})
    held = WebDataset(tmp_path, holdout=4, **CUT).held_out
    assert [str(clip.file) for clip in held] == [f"{tmp_path}/{shard}.tar/0.png" for shard in range(4)]  # in any process


def test_a_run_trains_on_tars_and_resumes(vae_toml: Path, tmp_path: Path) -> None:
    for i in range(2):
        pack(tmp_path / f"shard-{i:06d}.tar", {"a.mp4": film_bytes(32, 16, i), "a.json": b'{"caption": ["noise", "much noise"]}'})
    settings = f"{{path = '{tmp_path}/shard-{{000000..000001}}.tar', fps = 8, frames = 5, size = [16, 16]}}"
    words = [str(vae_toml), "data.name=webdataset", f"data.settings={settings}"]
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        assert cli.main(["run", *words, "steps=1"]) == 0
        assert cli.main(["run", *words, "steps=2", "--resume"]) == 0
    rows = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    losses = [row["loss"] for row in rows if "loss" in row]
    assert len(losses) == 2
    assert np.isfinite(losses).all()


def test_the_commands_take_tars(shards: Path, tmp_path: Path, micro_vae: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["fps=8", "frames=5", "--json"]
    for source in (shards, shards / "shard-{000000..000001}.tar"):
        assert cli.main(["validate", str(source), *words, "--decode"]) == 0
        told = json.loads(capsys.readouterr().out)
        assert told["counts"] == {"files": 6, "samples": 11, "problems": {}}
        assert told["files"][0]["file"] == "shard-000000.tar/b.mp4"
    with tarfile.open(shards / "shard-000000.tar") as tar:
        tar.extractall(tmp_path / "mixed", filter="data")
    pack(tmp_path / "mixed" / "a.tar", {"z.png": picture_bytes(kind="PNG")})
    assert cli.main(["validate", str(tmp_path / "mixed"), *words]) == 0  # media beside a tar: the folder is meant
    assert json.loads(capsys.readouterr().out)["counts"]["files"] == 3
    cache = ["cache", str(shards), *words, "--output", str(tmp_path / "cache"), "--size", "32x16", "--vae", str(micro_vae)]
    assert cli.main([*cache, "--text-encoder", "none"]) == 0
    assert json.loads(capsys.readouterr().out)[0] == {"made": 11, "present": 0, "failed": 0, "failures": []}
    gz = pack(tmp_path / "a.tar.gz", {"a.png": picture_bytes(kind="PNG")}, "w:gz")
    assert cli.main(["validate", str(gz)]) == 2
    assert "it is compressed (.gz)" in capsys.readouterr().err


def test_the_plugin_is_found_by_its_name() -> None:
    from wan_train.plugins import find

    assert find("wan_datasets", "webdataset").resolve() is WebDataset

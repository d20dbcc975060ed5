"""Which tars are read, and what is wrong with them, all told at once."""

from __future__ import annotations

import tarfile
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
from tar_files import film_bytes, pack, picture_bytes
from wan_train.data.scan import Cut, Problem, scan
from wan_train.data.tars import expand, tar_contents
from wan_train.data.webdataset import WebDataset

BLOCK = 512
CUT: dict[str, Any] = {"fps": 8, "frames": 5}


@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        ("a-{008..011}.tar", ["a-008.tar", "a-009.tar", "a-010.tar", "a-011.tar"]),
        ("{9..11}.tar", ["9.tar", "10.tar", "11.tar"]),
        ("{x,y}/{0..1}.tar", ["x/0.tar", "x/1.tar", "y/0.tar", "y/1.tar"]),
        ("{0}.tar", ["{0}.tar"]),
        ("plain.tar", ["plain.tar"]),
    ],
)
def test_braces_are_expanded_as_a_shell_does(pattern: str, names: list[str]) -> None:
    assert expand(pattern) == names


def test_what_is_no_tar_is_refused(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "a.mp4").write_bytes(b"film")
    refused: list[tuple[str, type[Exception], str]] = [
        ("gone.tar", FileNotFoundError, "no folder, tar or pattern"),
        ("gone-{00..03}.tar", FileNotFoundError, r"at path '.*gone-\{00\.\.03\}\.tar'"),
        ("gone-{3..0}.tar", ValueError, r"\{3\.\.0\} ends before it starts"),
        ("empty", ValueError, "holds no .tar: .*the data set 'folder'"),
        ("a.mp4", ValueError, "is no folder and no .tar"),
    ]
    for name, error, message in refused:
        with pytest.raises(error, match=message):
            WebDataset(tmp_path / name, **CUT)
    with pytest.raises(ValueError, match=r"data set 'webdataset'.*: ftps"):
        WebDataset(tmp_path, ftps=3)


@pytest.mark.parametrize(("name", "mode", "how"), [("a.tar.gz", "w:gz", ".gz"), ("a.tgz", "w:gz", ".tgz"), ("a.tar", "w:xz", "xz")])
@pytest.mark.parametrize("on_problem", ["strict", "skip"])
def test_compressed_tars_are_refused(tmp_path: Path, name: str, mode: str, how: str, on_problem: str) -> None:
    path = pack(tmp_path / name, {"a.png": picture_bytes(kind="PNG"), "a.txt": b"a"}, mode)
    message = rf"a\.t.* it is compressed \({how}\), .*: give uncompressed tars \(\.tar\)"
    if name != "a.tar" or on_problem == "strict":
        with pytest.raises(ValueError, match=message):
            WebDataset(path, on_problem=on_problem, **CUT)
    pack(tmp_path / "b.tar", {"b.png": picture_bytes(kind="PNG"), "b.txt": b"b"})
    if on_problem == "skip":
        with pytest.warns(RuntimeWarning, match="1 files or lines are left out: 1 unreadable"):
            assert len(WebDataset(tmp_path, on_problem="skip", **CUT)) == 1
    else:
        with pytest.raises(ValueError, match=r"has 1 problems .*it is compressed"):
            WebDataset(tmp_path, **CUT)


# problems


def test_all_problems_are_told_at_once_by_member(tmp_path: Path) -> None:
    shards = tmp_path / "shards"
    for i in range(2):
        pack(shards / f"shard-{i:06d}.tar", {"good.mp4": film_bytes(5, 8, i), "good.json": b'{"text": "good"}'})
    members = {
        "mute.mp4": film_bytes(5, 8, 4),
        "short.mp4": film_bytes(3, 8, 5),
        "short.txt": b"short",
        "text.png": b"no picture",
        "latin.png": picture_bytes(kind="PNG"),
        "latin.txt": b"caf\xe9",
        "odd.png": picture_bytes(kind="PNG"),
        "odd.json": b'{"caption": 3}',
        "half.mp4": film_bytes(24, 8, 6)[:3000],
        "half.txt": b"half",
        "void.mp4": b"",
    }
    path = pack(shards / "shard-000002.tar", members)
    with tarfile.open(path, "a") as tar:
        link = tarfile.TarInfo("link.mp4")
        link.type, link.linkname = tarfile.SYMTYPE, "mute.mp4"
        tar.addfile(link)
    (shards / "shard-000003.tar").write_text("no tar")
    found = scan(shards / "shard-{000000..000004}.tar", Cut(Fraction(8), 5), contents=tar_contents)
    told = {problem.file: problem for problem in found.problems}
    assert {(problem.file, problem.kind) for problem in found.problems} == {
        ("shard-000002.tar/mute.mp4", "caption"),
        ("shard-000002.tar/short.mp4", "short"),
        ("shard-000002.tar/text.png", "unreadable"),
        ("shard-000002.tar/latin.png", "caption"),
        ("shard-000002.tar/odd.png", "caption"),
        ("shard-000002.tar/half.mp4", "unreadable"),
        ("shard-000002.tar/void.mp4", "unreadable"),
        ("shard-000002.tar/link.mp4", "unreadable"),
        ("shard-000003.tar", "unreadable"),
        ("shard-000004.tar", "missing"),
    }
    assert len(found.problems) == len(told) == 10
    assert told["shard-000002.tar/mute.mp4"].message == "it has no caption: pack mute.txt or mute.json beside it"
    assert "'latin.txt': it is not UTF-8 text: byte 3 is 0xe9" in told["shard-000002.tar/latin.png"].message
    assert "'odd.json': captions are text or a list of texts, got 3" in told["shard-000002.tar/odd.png"].message
    assert f"'{path}/half.mp4' is not a readable video" in told["shard-000002.tar/half.mp4"].message
    assert "it is not a tar" in told["shard-000003.tar"].message
    with pytest.raises(ValueError, match="has 10 problems") as error:
        WebDataset(shards / "shard-{000000..000004}.tar", **CUT)
    assert all(f"{problem.file}: {problem.message}" in str(error.value) for problem in found.problems)
    with pytest.warns(RuntimeWarning, match="10 files or lines are left out"):
        left = WebDataset(shards / "shard-{000000..000004}.tar", on_problem="skip", **CUT)
    assert {str(clip.file)[len(str(shards)) + 1 :][:16] for clip in left.clips} == {"shard-000000.tar", "shard-000001.tar"}


@pytest.mark.parametrize(
    ("end", "file", "message"),
    [
        (lambda start, size: start + size // 2, "a.tar/b.mp4", "it is cut: the tar ends {size_left} bytes before it does"),
        (lambda start, size: start - BLOCK // 2, "a.tar", "it is cut or damaged: no end mark at byte {header}"),
        (lambda start, size: start - BLOCK, "a.tar", "it is cut or damaged: no end mark at byte {header}"),
    ],
    ids=["within a member", "within a header", "between members"],
)
def test_a_tar_that_is_cut_is_told_and_what_is_whole_in_it_remains(
    tmp_path: Path, end: Callable[[int, int], int], file: str, message: str
) -> None:
    path = pack(tmp_path / "a.tar", {"a.mp4": film_bytes(5, 8), "a.txt": b"a", "b.mp4": film_bytes(24, 8, 1), "b.txt": b"b"})
    with tarfile.open(path) as tar:
        member = tar.getmember("b.mp4")
    size = end(member.offset_data, member.size)
    with path.open("r+b") as opened:
        opened.truncate(size)
    found = scan(path, Cut(Fraction(8), 5), contents=tar_contents)
    numbers = {"size_left": member.offset_data + member.size - size, "header": member.offset_data - BLOCK}
    assert found.problems == [Problem(file, "unreadable", message.format(**numbers))]
    assert [clip.file.name for clip in found.clips] == ["a.mp4"]


def test_a_damaged_header_is_told(tmp_path: Path) -> None:
    path = pack(tmp_path / "a.tar", {"a.png": picture_bytes(kind="PNG"), "a.txt": b"a", "b.png": picture_bytes(kind="PNG")})
    with tarfile.open(path) as tar:
        header = tar.getmember("b.png").offset
    data = bytearray(path.read_bytes())
    data[header] ^= 1
    path.write_bytes(data)
    (problem,) = scan(path, Cut(Fraction(8), 5), contents=tar_contents).problems
    assert (problem.file, problem.message) == ("a.tar", f"it is cut or damaged: a damaged header at byte {header}")

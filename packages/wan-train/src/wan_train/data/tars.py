"""The media in uncompressed tars, which are read where they stand: WebDataset's shards. Imports no torch.

The members of a sample share a key: their path up to the first dot of the file's name. Its films and pictures have the captions
in `KEY.txt` or `KEY.caption`, a line each, and in `KEY.json`.
"""

from __future__ import annotations

import os
import re
import tarfile
from itertools import product
from pathlib import Path, PurePosixPath

from wan_vae.film import FilePart

from .file_index import FILMS, PICTURES, chunks
from .scan import Contents, Problem, file_name, walk
from .sidecars import TEXTS, read_json_captions, read_text_captions

COMPRESSED = (".tar.gz", ".tgz", ".tar.bz2", ".tbz", ".tbz2", ".tar.xz", ".txz", ".tar.zst", ".tzst", ".tar.lz4")
_BEGINNINGS = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd", b"\x04\x22\x4d\x18": "lz4"}
_BLOCK = 512  # bytes of a header, and of the zeros that end a tar

Wrong = tuple[Path | FilePart, str, str]  # what is wrong, the kind of the problem, and the message


def is_tar(path: Path) -> bool:
    """Whether a name is that of a tar, a compressed one included."""
    return path.name.lower().endswith((".tar", *COMPRESSED))


def holds_tars(folder: Path) -> bool:
    """Whether a folder holds tars and no films or pictures beside them."""
    found = False
    for path in walk(folder):
        if path.suffix.lower() in (*PICTURES, *FILMS):
            return False
        found = found or is_tar(path)
    return found


def tar_contents(source: Path) -> Contents:
    """The media of one tar, of all in a folder, its subfolders included, or of those that a pattern in braces names.

    Raises FileNotFoundError where there is nothing at `source`, and ValueError where it is no tar, or a compressed one.
    """
    beside, problems = dict[FilePart, list[FilePart]](), list[Problem]()
    for tar in _tars(source):
        try:
            members, wrong = _members(tar)
        except FileNotFoundError:
            members, wrong = {}, [(tar, "missing", "the pattern names it, and it is not there")]
        except (ValueError, OSError) as error:
            members, wrong = {}, [(tar, "unreadable", str(error))]
        problems += [Problem(file_name(file, source), kind, message) for file, kind, message in wrong]
        beside |= {members[name]: _sidecars(name, members) for name in sorted(members) if _is_media(name)}
    return Contents(
        list(beside),
        problems,
        lambda file: _captions(beside[file]),
        lambda file: f"pack {_key(file.name)}.txt or {_key(file.name)}.json beside it",
    )


def expand(pattern: str) -> list[str]:
    """`shard-{000000..000099}.tar` or `{a,b}.tar` as a shell expands it: all combinations where there are several braces.

    Raises ValueError where a range ends before it starts.
    """
    parts = re.split(r"\{([^{}]*)\}", pattern)  # what is within braces stands at odd places
    return ["".join(words) for words in product(*(_choices(part) if i % 2 else [part] for i, part in enumerate(parts)))]


def _choices(braces: str) -> list[str]:
    if found := re.fullmatch(r"(\d+)\.\.(\d+)", braces):
        first, last = found.groups()
        if int(first) > int(last):
            raise ValueError(f"{{{braces}}} ends before it starts: write the lower number first")
        width = max(map(len, found.groups())) if "0" in (first[0], last[0]) else 0
        return [f"{number:0{width}d}" for number in range(int(first), int(last) + 1)]
    return braces.split(",") if "," in braces else [f"{{{braces}}}"]


def _tars(source: Path) -> list[Path]:
    if source.is_dir():
        tars = sorted(path for path in walk(source) if is_tar(path))
        if not tars:
            raise ValueError(f"'{source}' holds no .tar: films and pictures that stand in a folder are the data set 'folder'")
        return tars
    tars = [source] if source.exists() else [Path(name) for name in expand(str(source))]
    if not any(tar.exists() for tar in tars):
        raise FileNotFoundError(f"no folder, tar or pattern such as shard-{{000000..000099}}.tar at path '{source}'")
    if not is_tar(source):
        raise ValueError(f"'{source}' is no folder and no .tar")
    if source.name.lower().endswith(COMPRESSED):
        raise ValueError(f"'{source}': {_compressed(source.suffix)}")
    return tars


def _compressed(how: str) -> str:
    return f"it is compressed ({how}), and members of such tars cannot be read in place: give uncompressed tars (.tar)"


def _members(tar: Path) -> tuple[dict[str, FilePart], list[Wrong]]:
    """The files in a tar by their names, and what is wrong with it.

    Raises ValueError where it is no tar or a compressed one, and OSError.
    """
    headers, end, cut = _headers(tar)
    members, wrong = dict[str, FilePart](), list[Wrong]()
    for header in headers:
        name = str(PurePosixPath(header.name))
        part = FilePart(tar, header.offset_data, header.size, name)
        if header.isdir() or any(piece.startswith(".") for piece in PurePosixPath(name).parts):
            continue
        if not header.isreg() or header.issparse():
            if _is_media(name):
                wrong.append((part, "unreadable", "it is a link or a sparse file, without bytes of its own in the tar: pack a plain file"))
        elif part.start + part.size > end:
            wrong.append((part, "unreadable", f"it is cut: the tar ends {part.start + part.size - end} bytes before it does"))
            cut = ""  # which this tells
        else:
            members[name] = part  # of two of a name the later, as when they are unpacked
    return members, [*wrong, (tar, "unreadable", f"it is cut or damaged: {cut}")] if cut else wrong


def _headers(tar: Path) -> tuple[list[tarfile.TarInfo], int, str]:
    """The headers in a tar, its bytes, and what is wrong where the headers end."""
    with tar.open("rb") as file:
        start, end = file.read(8), file.seek(0, os.SEEK_END)
        if how := next((how for beginning, how in _BEGINNINGS.items() if start.startswith(beginning)), ""):
            raise ValueError(_compressed(how))
        file.seek(0)
        try:
            opened = tarfile.open(fileobj=file, mode="r:")  # noqa: SIM115
        except tarfile.TarError as error:
            raise ValueError(f"it is not a tar: {error}") from error
        headers = list[tarfile.TarInfo]()
        try:
            headers.extend(opened)
        except tarfile.TarError as error:
            return headers, end, str(error)
        file.seek(opened.offset)
        mark = file.read(_BLOCK)  # tarfile takes whatever is no header for the end
        what = "a damaged header" if len(mark) == _BLOCK else "no end mark"
        return headers, end, "" if mark == bytes(_BLOCK) else f"{what} at byte {opened.offset}"


def _is_media(name: str) -> bool:
    return PurePosixPath(name).suffix.lower() in (*PICTURES, *FILMS)


def _key(name: str) -> str:
    """The path up to the first dot of the file's name."""
    path = PurePosixPath(name)
    return str(path.with_name(path.name.partition(".")[0]))


def _sidecars(name: str, members: dict[str, FilePart]) -> list[FilePart]:
    key = _key(name)
    names = [*(stem + suffix for suffix in TEXTS for stem in (key, name)), f"{key}.json"]
    return [members[name] for name in names if name in members]


def _captions(sidecars: list[FilePart]) -> list[str]:
    """All captions, each once: many tools write that of `KEY.txt` into `KEY.json` too."""
    found = list[str]()
    for part in sidecars:
        try:
            found += (read_json_captions if part.suffix == ".json" else read_text_captions)(b"".join(chunks(part)))
        except ValueError as error:
            raise ValueError(f"'{part.name}': {error}") from error
    return list(dict.fromkeys(found))

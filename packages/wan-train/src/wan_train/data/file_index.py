"""What was found in media files and members of tars, kept between runs by path, time of change and size. Imports no torch."""

from __future__ import annotations

import hashlib
import io
import json
import os
import sqlite3
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

from PIL import Image, UnidentifiedImageError
from wan_vae.film import FilePart

from . import film

PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")
FILMS = (".mp4", ".mov", ".m4v", ".mkv", ".webm", ".avi", ".mpg", ".mpeg", ".ts", ".gif")
_VERSION = 1  # of the facts; those of another are found anew
_CHUNK = 64  # files that are looked at between two writes
_READ = 1 << 20  # bytes that are read at once

MediaFile = Path | FilePart
Stamp = tuple[str, int, int]  # path (of a part with its first byte), time of the file's change in nanoseconds, size


@dataclass(frozen=True)
class Media:
    """Facts of a film, or of a picture (`film` is None), whose upright size is `height` x `width` in square pixels."""

    height: int
    width: int
    film: film.FilmFacts | None = None


def look(path: MediaFile) -> Media:
    """Facts of a media file. Raises ValueError where it cannot be read, OSError where it is not there."""
    if path.suffix.lower() not in PICTURES:
        facts = film.probe(path)
        return Media(facts.height, max(1, round(facts.width * facts.aspect)), facts)
    with open_picture(path) as image:
        image.load()
        turned = image.getexif().get(0x0112, 1) in (5, 6, 7, 8)  # EXIF's Orientation
        width, height = image.size[::-1] if turned else image.size
    return Media(height, width)


@contextmanager
def open_picture(path: MediaFile) -> Iterator[Image.Image]:
    """A picture of Pillow; what is wrong with it while it is read is a ValueError that names it."""
    try:
        with Image.open(path if isinstance(path, Path) else io.BytesIO(b"".join(chunks(path)))) as image:
            yield image
    except (UnidentifiedImageError, Image.DecompressionBombError, SyntaxError, EOFError, ValueError) as error:
        raise ValueError(f"'{path}' is not a picture that can be read: {error}") from error
    except OSError as error:
        if error.errno is not None:  # of the file system, not of the picture
            raise
        raise ValueError(f"'{path}' is cut or damaged: {error}") from error


def chunks(file: MediaFile) -> Iterator[bytes]:
    """The bytes of a file or a part of one, some at a time. Raises ValueError where a part is not all there."""
    path, start, left = (file.path, file.start, file.size) if isinstance(file, FilePart) else (file, 0, file.stat().st_size)
    with path.open("rb") as opened:
        opened.seek(start)
        while left:
            data = opened.read(min(left, _READ))
            if not data:
                raise ValueError(f"'{file}' is cut: '{path}' ends {left} bytes before it does")
            left -= len(data)
            yield data


class FileIndex:
    """Facts and checksums of files; `path` is an SQLite file that several processes may use at once.

    A damaged file is made anew; where it cannot be written a warning says so, and all is found again in the next run.
    """

    def __init__(self, path: Path | None = None) -> None:
        self.path = path or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "wan-train" / "files.sqlite"
        self._warned = False

    def media(self, files: Sequence[MediaFile]) -> list[Media | Exception]:
        """As `look` at each, from memory where a file has not changed; what it raises stands in the place of its facts."""
        stamps = {file: _try_stamp(file) for file in files}
        there = {file: stamp for file, stamp in stamps.items() if not isinstance(stamp, OSError)}
        known = self._recall("facts", list(there.values()))
        unknown = [(file, stamp) for file, stamp in there.items() if stamp not in known]
        with ThreadPoolExecutor() as pool:
            for start in range(0, len(unknown), _CHUNK):
                chunk = unknown[start : start + _CHUNK]
                found = pool.map(_facts, (file for file, _ in chunk))
                known |= (new := dict(zip((stamp for _, stamp in chunk), found, strict=True)))
                self._keep("facts", {stamp: facts for stamp, facts in new.items() if isinstance(facts, str)})
        return [stamp if isinstance(stamp, OSError) else _media(known[stamp]) for stamp in stamps.values()]

    def sha256(self, file: MediaFile) -> str:
        """Of all bytes of the file, or of the part."""
        known = self._recall("sha256", [stamp := stamp_of(file)])
        if stamp not in known:
            digest = hashlib.sha256()
            for data in chunks(file):
                digest.update(data)
            known[stamp] = digest.hexdigest()
            self._keep("sha256", known)
        return str(known[stamp])

    def _recall(self, column: str, stamps: Sequence[Stamp]) -> dict[Stamp, Any]:
        query = f"select {column} from files where path = ? and mtime = ? and size = ? and version = {_VERSION}"
        with self._database() as database:
            rows = [(stamp, database.execute(query, stamp).fetchone()) for stamp in stamps] if database else []
        return {stamp: row[0] for stamp, row in rows if row and row[0]}

    def _keep(self, column: str, found: dict[Stamp, Any]) -> None:
        with self._database() as database:
            if database is None:
                return
            for stamp, value in found.items():
                database.execute(f"delete from files where path = ? and (mtime, size, version) != (?, ?, {_VERSION})", stamp)
                database.execute(f"insert or ignore into files (path, mtime, size, version) values (?, ?, ?, {_VERSION})", stamp)
                database.execute(f"update files set {column} = ? where path = ?", (value, stamp[0]))

    @contextmanager
    def _database(self) -> Iterator[sqlite3.Connection | None]:
        try:
            connection = self._open()
        except sqlite3.DatabaseError:
            self.path.unlink(missing_ok=True)
            connection = self._open()
        if connection is None:
            yield None
            return
        with closing(connection), connection:
            yield connection

    def _open(self) -> sqlite3.Connection | None:
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            connection = sqlite3.connect(self.path, timeout=60)
            connection.execute(
                "create table if not exists files"
                " (path text primary key, mtime integer, size integer, version integer, facts text, sha256 text)"
            )
        except (OSError, sqlite3.OperationalError) as error:
            if not self._warned:
                warnings.warn(f"no index of files in '{self.path}' ({error}): each run looks at all anew", RuntimeWarning, stacklevel=2)
            self._warned = True
            return None
        return connection


def stamp_of(file: MediaFile) -> Stamp:
    """What a file is known by until it changes; a part by the time of its file. Raises OSError where it is not there."""
    if isinstance(file, FilePart):
        return f"{file.path.absolute()}/{file.member}@{file.start}", file.path.stat().st_mtime_ns, file.size
    stat = file.stat()
    return str(file.absolute()), stat.st_mtime_ns, stat.st_size


def _try_stamp(file: MediaFile) -> Stamp | OSError:
    try:
        return stamp_of(file)
    except OSError as error:
        return error


def _facts(file: MediaFile) -> str | OSError:
    """As JSON; what is wrong with the file is a fact too, but not that it could not be opened."""
    try:
        return json.dumps(asdict(look(file)), default=str)
    except ValueError as error:
        return json.dumps({"error": str(error)})
    except OSError as error:
        return error


def _media(text: str | OSError) -> Media | Exception:
    if isinstance(text, OSError):
        return text
    record: dict[str, Any] = json.loads(text)
    if "error" in record:
        return ValueError(record["error"])
    found = record["film"]
    if found is None:
        return Media(record["height"], record["width"])
    fractions = {name: Fraction(found[name]) for name in ("aspect", "seconds", "first") if found[name] is not None}
    return Media(record["height"], record["width"], film.FilmFacts(**{**found, **fractions}))

"""Parts of films by time: what a file holds, and the frames shown at start, start + 1/fps, ... of it, read from the key frame before.

Times count from the film's first frame; decoding, colours, rotation and the search for damage are those of wan-vae's reader.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import av
import numpy as np
from av.video.reformatter import VideoReformatter
from numpy.typing import NDArray
from wan_vae.damage import Missing
from wan_vae.film import FilmSource, open_film, probe_film
from wan_vae.pixels import to_rgb
from wan_vae.track import Track, indexed, rate_of

Pixels = NDArray[np.uint8]
SLACK = Fraction(1, 2000)  # seconds that a time may be late: containers round it, Matroska to milliseconds
EXACT = ("mov", "matroska", "mpegts")  # containers whose packets say their times, so that these are the same wherever one enters
RETREAT = (0, 2, 10)  # seconds that further tries enter earlier, where an index leads behind the wanted time


@dataclass(frozen=True)
class FilmFacts:
    """What a film holds.

    height, width: as stored, but upright; aspect: width over height of a pixel
    seconds: from the first frame until the last one ends; fps: on average
    first: the time that the file gives its first frame; None where it gives none
    """

    height: int
    width: int
    aspect: Fraction
    seconds: Fraction
    fps: float
    first: Fraction | None

    def frames(self, fps: Fraction) -> int:
        """How many frames there are at `fps`: those at 0, 1/fps, 2/fps, ... before the film ends."""
        return max(1, math.ceil((self.seconds - SLACK) * fps))


def probe(path: FilmSource) -> FilmFacts:
    """What a film holds, by the times of all its packets; its first frame alone is decoded.

    Raises FileNotFoundError, and ValueError where it is no film, damaged or shorter than it declares.
    """
    info = probe_film(path)
    with open_film(path) as (container, stream):
        step, times, count = 1 / rate_of(stream), list[tuple[Fraction, Fraction]](), 0
        try:
            for packet in container.demux(stream):
                count += packet.size > 0
                if packet.is_corrupt:
                    raise ValueError(f"'{path}' is damaged at frame {count}: a packet is cut or fails its check")
                if packet.size and packet.pts is not None and not packet.is_discard:
                    duration = Fraction(packet.duration * packet.time_base) if packet.duration else step
                    times.append((Fraction(packet.pts * packet.time_base), duration))
        except av.FFmpegError as error:
            raise ValueError(f"'{path}' is damaged after {count} frames: {error.strerror}") from error
        declared = len(stream.index_entries) if indexed(container) else stream.frames
    if count < declared:
        raise ValueError(f"'{path}' is cut: it declares {declared} frames and holds {count}")
    if not times:  # a raw stream: evenly spaced
        return FilmFacts(info.height, info.width, info.pixel_aspect, count * step, float(info.fps), None)
    first, (last, duration) = min(times)[0], max(times)
    return FilmFacts(info.height, info.width, info.pixel_aspect, last + duration - first, float(info.fps), first)


def read(path: FilmSource, facts: FilmFacts, start: Fraction, frames: int, fps: Fraction) -> Iterator[Pixels]:
    """The `[H, W, 3]` uint8 frames that are shown at start + k / fps for k below `frames`; a frame shown longer comes repeatedly.

    Raises ValueError where the film ends before, or a frame among them is missing or damaged.
    """
    if start < 0 or start + (frames - 1) / fps >= facts.seconds:
        wanted = f"{frames} frames at {float(fps):g} a second from {float(start):g} seconds"
        raise ValueError(f"'{path}' is {float(facts.seconds):g} seconds long, which has not {wanted}")
    entries = [start - retreat for retreat in RETREAT if start > retreat and facts.first is not None]
    for entry in (*entries, Fraction(0)):
        try:
            yield from _read_from(path, facts, entry, start, frames, fps)
            return
        except _EnteredLate:
            continue


class _EnteredLate(Exception):
    """A film was entered where the frame of the wanted time cannot be had; raised before the first frame is given."""


class _Entered(Track):
    """A film that is entered in its middle: what it declares says nothing of how much of it was read.

    key: the time of the first key frame; what is shown before it may be predicted from frames that were not read
    """

    key: int | None = None

    def _note(self, packet: Any) -> None:
        if self.key is None and packet.is_keyframe:
            self.key = packet.pts
        super()._note(packet)

    def _lost(self, container: Any) -> int:
        return 0


def _read_from(path: FilmSource, facts: FilmFacts, entry: Fraction, start: Fraction, frames: int, fps: Fraction) -> Iterator[Pixels]:
    """As `read`, entered at the last key frame before `entry`."""
    with open_film(path) as (container, stream):
        origin, unit = (facts.first, Fraction(stream.time_base)) if facts.first is not None else (Fraction(0), 1 / rate_of(stream))
        if entry and not container.format.name.startswith(EXACT):
            raise _EnteredLate
        if entry:
            container.seek(math.floor((origin + entry) / unit), stream=stream, backward=True)
        track = _Entered(stream) if entry else Track(stream)
        reformatter, given = VideoReformatter(), 0
        shown: Any = None
        pixels: Pixels | None = None
        for picture in track.pictures(container):
            pts = picture.pts if isinstance(picture, Missing) else picture[1]
            if isinstance(track, _Entered) and (track.key is None or pts < track.key):
                continue
            time = pts * unit - origin
            if shown is None and entry and time > start + SLACK:
                raise _EnteredLate
            while shown is not None and given < frames and start + given / fps + SLACK < time:
                pixels = _pixels(path, shown, reformatter) if pixels is None else pixels
                yield pixels
                given += 1
            if given == frames:
                return
            shown, pixels = picture, None
        if shown is None and entry:
            raise _EnteredLate
        for _ in range(given, frames):
            pixels = _pixels(path, shown, reformatter) if pixels is None else pixels
            yield pixels


def _pixels(path: FilmSource, picture: Any, reformatter: VideoReformatter) -> Pixels:
    if isinstance(picture, Missing):
        raise ValueError(f"'{path}' is damaged: {picture.reason}")
    found: Any = to_rgb(picture[0], reformatter)
    return found  # type: ignore[no-any-return]

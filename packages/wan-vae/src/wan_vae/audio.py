"""The sound of a film, copied packet by packet beside new pictures: no decoding, no loss."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from fractions import Fraction
from types import TracebackType
from typing import Any, Self

import av

from .film import open_film
from .pixels import PathLike


class AudioTrack:
    """The first audio stream of `source`, its times counted from the first picture of `source`.

    Raises FileNotFoundError, and ValueError where the source has no sound.
    """

    def __init__(self, source: PathLike) -> None:
        self.source = source
        self._stack = ExitStack()
        self._container, video = self._stack.enter_context(open_film(source))
        if not self._container.streams.audio:
            self.close()
            raise ValueError(f"'{source}' has no audio stream to copy")
        self.stream: Any = self._container.streams.audio[0]
        self._start = (video.start_time or 0) * video.time_base
        self._packets = self._read()
        self._next = next(self._packets, None)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        self._stack.close()

    def until(self, seconds: Fraction) -> Iterator[Any]:
        """The packets that start before `seconds` and were not given yet."""
        while self._next is not None and self._next.pts * self._next.time_base < seconds:
            yield self._next
            self._next = next(self._packets, None)

    def _read(self) -> Iterator[Any]:
        shift = round(self._start / self.stream.time_base)
        try:
            for packet in self._container.demux(self.stream):
                if not packet.size or packet.pts is None:
                    continue
                packet.pts -= shift
                packet.dts = packet.pts
                if packet.pts + (packet.duration or 0) > 0:
                    yield packet
        except av.FFmpegError as error:
            raise ValueError(f"the sound of '{self.source}' is damaged: {error.strerror}") from error

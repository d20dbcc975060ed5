"""The data set `folder`: the films and pictures that people have, with their captions, as clips of one rate."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, PositiveInt, field_validator

from ..config import read_settings
from . import film
from .buckets import Bucket, Info
from .file_index import FileIndex, Media, MediaFile, open_picture, stamp_of
from .scan import Clip, Contents, Cut, OnProblem, Scan, folder_contents, scan

if TYPE_CHECKING:
    from torch import Tensor

READER = "wan-train folder/1"  # another number where the same settings read other pixels


class FolderSettings(BaseModel):
    """path: a folder, its subfolders included, or a listing (.jsonl, .csv, .json).

    fps, frames, min_frames, overlap: how films are cut, see `Cut`; rates are met by time, so films of any rate keep their speed
    size: (height, width) of `Folder.video`; `Folder.clip` takes any bucket
    captions: `required`, or `optional`, where a sample without one has the empty caption
    min_side: pixels that the shorter side of a sample must have
    holdout: files that are not trained on; their samples stand at indices from `len` on
    on_problem: `strict` raises ValueError that lists all problems of the folder; `skip` leaves those files out, with a warning
    index: an SQLite file that keeps what was found in the files, by path, time of change and size; None for one in the user's cache
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    path: Path
    fps: float = Field(16, gt=0, le=10_000)
    frames: int = Field(81, gt=0)
    min_frames: int = Field(0, ge=0)
    overlap: int = Field(0, ge=0)
    size: tuple[PositiveInt, PositiveInt] | None = None
    captions: Literal["required", "optional"] = "required"
    min_side: int = Field(0, ge=0)
    holdout: int = Field(0, ge=0)
    on_problem: OnProblem = "strict"
    index: Path | None = None

    @field_validator("path", "index")
    @classmethod
    def _expanded(cls, path: Path | None) -> Path | None:
        return path and path.expanduser()

    @property
    def cut(self) -> Cut:
        return Cut(Fraction(self.fps).limit_denominator(100_000), self.frames, self.min_frames, self.overlap)

    def scan(self) -> Scan:
        """The samples of the folder as it is now, and all of its problems."""
        needed, index = self.captions == "required", FileIndex(self.index)
        return scan(self.path, self.cut, captions=needed, min_side=self.min_side, index=index, contents=self._contents)

    def _contents(self, source: Path) -> Contents:
        return folder_contents(source)


class Folder:
    """Clips of a folder or listing; satisfies `wan_train.contracts.Dataset`; settings are those of `FolderSettings`.

    Example: `Folder("clips", fps=16, frames=81, on_problem="skip")`. Raises ValueError for settings out of range, for the problems
    of the folder as `on_problem` says, and where there is no sample.
    """

    name: ClassVar[str] = "folder"
    settings_type: ClassVar[type[FolderSettings]] = FolderSettings

    def __init__(self, path: str | Path, **settings: Any) -> None:
        self.settings = read_settings(self.settings_type, {"path": path, **settings}, f"data set '{self.name}'")
        self.cut, self.index = self.settings.cut, FileIndex(self.settings.index)
        clips = self.settings.scan().settle(self.settings.on_problem, self.settings.path)
        held = held_out({clip.file for clip in clips}, self.settings.holdout)
        self.clips = [clip for clip in clips if clip.file not in held]
        self.held_out = [clip for clip in clips if clip.file in held]
        if not self.clips:
            raise ValueError(f"holdout = {self.settings.holdout} leaves no file of '{self.settings.path}' to train on")

    def __len__(self) -> int:
        return len(self.clips)

    def __getitem__(self, index: int) -> Clip:
        """A sample; those that are held out follow, from index `len` on, and then all from the start again."""
        if index < 0:
            raise IndexError(f"samples count from 0, got {index}")
        every = len(self.clips) + len(self.held_out)
        place = index % every
        return self.clips[place] if place < len(self.clips) else self.held_out[place - len(self.clips)]

    def info(self, index: int) -> Info:
        """Frames at the data set's rate, size in square pixels, and the rate."""
        return self[index].info

    def captions(self, index: int) -> list[str]:
        """All captions of a sample."""
        return list(self[index].captions) or [""]

    def clip(self, index: int, bucket: Bucket) -> Tensor:
        """`[3, T, H, W]` float32 in [-1, 1]: the first frames of a sample, scaled to cover the bucket, its middle.

        Raises ValueError where the sample is shorter than the bucket, or damaged.
        """
        import torch

        clip = self[index]
        if clip.frames < bucket.frames:
            raise ValueError(f"'{clip.file}' has {clip.frames} frames from {clip.start} on, the bucket {bucket} asks for {bucket.frames}")
        video = torch.empty(bucket.frames, bucket.height, bucket.width, 3, dtype=torch.uint8)
        fitted: tuple[Any, Any] = (None, None)
        for i, pixels in enumerate(_frames(clip, bucket.frames, self.cut.fps)):
            if pixels is not fitted[0]:  # a frame that is shown longer is scaled once
                fitted = pixels, torch.from_numpy(_fit(pixels, clip.media, bucket))
            video[i] = fitted[1]
        return video.permute(3, 0, 1, 2).float().div_(127.5).sub_(1.0)

    def video(self, indices: Iterable[int]) -> Tensor:
        """Clips `[N, 3, frames, height, width]` of the data set's own `frames` and `size`."""
        import torch

        if self.settings.size is None:
            raise ValueError(f"clips of one shape need the setting size = [height, width] of the data set '{self.name}'")
        bucket = Bucket(self.cut.frames, *self.settings.size)
        return torch.stack([self.clip(index, bucket) for index in indices])

    def key(self) -> str:
        """What a cache of all samples depends on: the settings, and the files by name, time of change and size."""
        digest = hashlib.sha256(repr((READER, self.cut, self.settings.size)).encode())
        for clip in self.clips:
            _, changed, size = stamp_of(clip.file)
            digest.update(repr((str(clip.file), changed, size, clip.start, clip.frames, clip.captions)).encode())
        return f"folder/1 {digest.hexdigest()}"

    def identity(self, index: int) -> str:
        """What the pixels of a sample depend on: the bytes of its file, wherever it is, and which of its frames are read."""
        clip = self[index]
        return f"{READER} {self.index.sha256(clip.file)} {clip.start} {self.cut.fps if clip.media.film else 'picture'}"

    def evaluation_prompts(self, n: int) -> list[str]:
        """The first captions of samples, those that are held out first."""
        return [self.captions(len(self) + i)[0] for i in range(n)]

    def evaluate(self, clips: Tensor, prompts: Sequence[str]) -> dict[str, float]:
        """Nothing: what a clip should show is not known here."""
        return {}


def held_out(files: set[MediaFile], count: int) -> set[MediaFile]:
    """`count` files, chosen by their names alone, so that new ones change little."""
    return set(sorted(files, key=lambda file: (hashlib.sha256(file.name.encode()).digest(), str(file)))[:count])


def _frames(clip: Clip, frames: int, fps: Fraction) -> Iterable[film.Pixels]:
    if clip.media.film is not None:
        return film.read(clip.file, clip.media.film, clip.start / fps, frames, fps)
    from wan_dit.images import read_image

    with open_picture(clip.file) as image:
        return [np.asarray(read_image(image))]


def _fit(pixels: film.Pixels, media: Media, bucket: Bucket) -> film.Pixels:
    """Scaled to cover the bucket, pixels made square, and its middle."""
    from PIL import Image

    width, height = media.width, media.height
    scale = max(bucket.width / width, bucket.height / height)
    # the part of the stored picture that is seen, in its own pixels, which need not be square
    stored_height, stored_width = pixels.shape[:2]
    seen_width, seen_height = bucket.width / scale * stored_width / width, bucket.height / scale * stored_height / height
    left, top = (stored_width - seen_width) / 2, (stored_height - seen_height) / 2
    box = (max(0.0, left), max(0.0, top), min(stored_width, left + seen_width), min(stored_height, top + seen_height))
    return np.array(Image.fromarray(pixels).resize((bucket.width, bucket.height), Image.Resampling.LANCZOS, box=box))

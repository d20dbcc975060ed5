"""The latent file: one safetensors file that says what it holds, written and read chunk by chunk.

Layout: a tensor `latents` `[T', C, H', W']` (frame-major, so that a stream appends to the end; no batch axis); where asked
for, `logvar` of the same shape and type, as the VAE gives it (of the latents before normalisation); where the frames are not
evenly spaced, `timestamps`, int64 `[frames]`, when each is shown, from 0, in units of `time_base`. String metadata:
`latent_info.py`, and two checksums: `sha256` of the bytes of the tensors in that order, and `header_sha256` of all else.
The header is written at a fixed size and filled in at the end, since the number of frames is known only then.
"""

from __future__ import annotations

import hashlib
import json
import math
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import IO, Any, Self

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ._shared.files import replacing
from .latent_info import FIRST_FORMAT, FORMAT, LatentInfo, Padding
from .pixels import PathLike

__all__ = ["LatentFile", "LatentInfo", "Padding", "header_checksum", "is_latent_file", "write_latents"]

DTYPES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
TENSORS = ("latents", "logvar", "timestamps")  # in the order of the file and of its checksum
DATA_START = 16384  # bytes: 8 of length and a JSON header filled up with spaces
PIECE = 1 << 20  # bytes hashed or copied at a time
Shapes = Mapping[str, tuple[str, tuple[int, ...]]]


def write_latents(
    path: PathLike,
    chunks: Iterable[Tensor | tuple[Tensor, Tensor]],
    info: Callable[[], LatentInfo],
    *,
    dtype: torch.dtype = torch.float32,
    timestamps: Callable[[], Sequence[int] | None] = lambda: None,
) -> LatentInfo:
    """Write chunks `[1, C, n, H', W']`, or pairs of them with their log-variance, as they come.

    `info` and `timestamps` (of unevenly spaced frames, else None) are called after the last one; the info is returned.
    The file appears under its name only when complete. Raises ValueError for another dtype than fp32, fp16 or bf16, and where
    a chunk holds NaN or infinity.
    """
    if dtype not in DTYPES:
        raise ValueError(f"a latent file holds float32, float16 or bfloat16, not {dtype}")
    with replacing(path) as scratch, ExitStack() as stack:
        writer = _Writer(stack.enter_context(open(scratch, "wb")), dtype)
        for index, chunk in enumerate(chunks):
            latents, logvar = chunk if isinstance(chunk, tuple) else (chunk, None)
            writer.add(latents, index)
            if logvar is not None:
                if writer.second is None:  # of a length known at the end, so it waits in a file without a name
                    writer.second = stack.enter_context(tempfile.TemporaryFile(dir=scratch.parent))
                writer.add(logvar, index, second=True)
        if not writer.frames:
            raise ValueError(f"no latents to write to '{path}'")
        facts = info()
        writer.finish(facts, timestamps())
    return facts


class _Writer:
    """The state of writing one latent file."""

    def __init__(self, file: IO[bytes], dtype: torch.dtype) -> None:
        self.file, self.dtype = file, dtype
        self.second: IO[bytes] | None = None
        self.frames, self.frame_shape = 0, (0, 0, 0)
        self.digest = hashlib.sha256()
        file.write(bytes(DATA_START))

    def add(self, chunk: Tensor, index: int, *, second: bool = False) -> None:
        block = chunk[0].transpose(0, 1).to("cpu", self.dtype).contiguous()
        if not block.isfinite().all():
            name = "log-variance" if second else "latents"
            raise ValueError(
                f"the {name} of chunk {index} (latent frames from {self.frames}) hold NaN or infinity in {self.dtype}; "
                f"compute with --dtype fp32 and store with --latent-dtype fp32"
            )
        data = block.view(torch.uint8).numpy().data
        if second and self.second:
            self.second.write(data)
            return
        self.frames, self.frame_shape = self.frames + block.shape[0], (block.shape[1], block.shape[2], block.shape[3])
        self.digest.update(data)
        self.file.write(data)

    def finish(self, info: LatentInfo, timestamps: Sequence[int] | None) -> None:
        kind, shape = DTYPES[self.dtype], (self.frames, *self.frame_shape)
        shapes: dict[str, tuple[str, tuple[int, ...]]] = {"latents": (kind, shape)}
        if self.second:
            shapes["logvar"] = (kind, shape)
            self.second.seek(0)
            while data := self.second.read(PIECE):
                self.digest.update(data)
                self.file.write(data)
        if timestamps is not None:
            shapes["timestamps"] = ("I64", (len(timestamps),))
            data = torch.tensor(timestamps, dtype=torch.int64).view(torch.uint8).numpy().tobytes()
            self.digest.update(data)
            self.file.write(data)
        metadata = {**info.to_metadata(), "sha256": self.digest.hexdigest()}
        header = _header({**metadata, "header_sha256": header_checksum(metadata, shapes)}, shapes)
        self.file.seek(0)
        self.file.write(header)


def header_checksum(metadata: Mapping[str, str], shapes: Shapes) -> str:
    """sha256 of everything in a header but this checksum itself, whatever the order it is written in."""
    kept = {key: value for key, value in metadata.items() if key != "header_sha256"}
    return hashlib.sha256(json.dumps([kept, shapes], sort_keys=True).encode()).hexdigest()


def _header(metadata: Mapping[str, str], shapes: Shapes) -> bytes:
    header: dict[str, Any] = {"__metadata__": metadata}
    start = 0
    for name, (dtype, shape) in shapes.items():
        size = math.prod(shape) * {"I64": 8, "F32": 4}.get(dtype, 2)
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [start, start + size]}
        start += size
    text = json.dumps(header).encode()
    if len(text) > DATA_START - 8:
        raise ValueError(f"the codec's name or latent space is too long for a latent file ({len(text)} bytes of header)")
    return (DATA_START - 8).to_bytes(8, "little") + text.ljust(DATA_START - 8)


def is_latent_file(path: PathLike) -> bool:
    """Whether `path` is a safetensors file that says it is a latent file, of any version."""
    if not Path(path).is_file():
        return False
    try:
        with safe_open(path, "pt") as file:
            return str((file.metadata() or {}).get("format", "")).startswith(FORMAT.partition("/")[0])
    except (SafetensorError, OSError):
        return False


@dataclass(frozen=True)
class LatentFile:
    """An opened latent file: `info`, `shape` `[T', C, H', W']`, `dtype`, `chunks()`, and what else it holds.

    sha256: of its tensors; empty in files of the first format, which have no checksums
    shapes: type and shape of each tensor by its name
    """

    path: Path
    info: LatentInfo
    shape: tuple[int, int, int, int]
    dtype: str
    sha256: str = ""
    shapes: Shapes = field(default_factory=dict)

    @classmethod
    def open(cls, path: PathLike) -> Self:
        """Read and check the header. Raises OSError where there is no file to read, and ValueError where it is no valid latent file."""
        path = Path(path)
        if not path.exists():
            raise FileNotFoundError(f"no latent file at '{path}'")
        if not path.is_file():
            raise ValueError(f"'{path}' is not a latent file: it is a {'folder' if path.is_dir() else 'device'}")
        path.open("rb").close()  # says why it cannot be read, where safetensors says that it is not there
        try:
            with safe_open(path, "pt") as file:
                shapes = {name: (file.get_slice(name).get_dtype(), tuple(file.get_slice(name).get_shape())) for name in file.keys()}  # noqa: SIM118
                metadata = file.metadata() or {}
            info = LatentInfo.from_metadata(metadata)
            _check_shapes(shapes, info)
            signed = metadata["format"] != FIRST_FORMAT
            if signed and ("sha256" not in metadata or metadata.get("header_sha256") != header_checksum(metadata, shapes)):
                raise ValueError("its header does not match its checksum; it was changed or damaged")
        except (SafetensorError, ValueError, OSError, OverflowError) as error:
            raise ValueError(f"'{path}' is not a latent file: {error}") from error
        dtype, shape = shapes["latents"]
        return cls(path, info, shape, dtype, metadata.get("sha256", ""), shapes)  # type: ignore[arg-type]

    @property
    def has_logvar(self) -> bool:
        """Whether it holds the log-variance, which `chunks(name="logvar")` gives."""
        return "logvar" in self.shapes

    def verify(self) -> None:
        """Read all data once and compare with the checksum; ValueError where they differ."""
        if not self.sha256:
            return
        digest = hashlib.sha256()
        for name in (name for name in TENSORS if name in self.shapes):
            for block in self._blocks(name, self._rows(name)):
                digest.update(block.contiguous().view(torch.uint8).numpy().data)
        if digest.hexdigest() != self.sha256:
            raise ValueError(f"'{self.path}' is damaged: its data do not match their checksum; make it anew, or copy it again")

    def timestamps(self) -> list[int] | None:
        """When each frame is shown, from 0, in units of `info.time_base`; None where frames are evenly spaced."""
        if "timestamps" not in self.shapes:
            return None
        with safe_open(self.path, "pt") as file:
            times: list[int] = file.get_tensor("timestamps").tolist()
        if times[0] != 0 or any(after <= before for before, after in pairwise(times)):
            raise ValueError(f"'{self.path}' is not a latent file: its timestamps do not increase from 0")
        return times

    def chunks(self, size: int = 1, *, name: str = "latents") -> Iterator[Tensor]:
        """Latents `[1, C, n, H', W']`: first one frame, then `size` at a time; or `logvar`, by `name`.

        Raises ValueError where a chunk holds NaN or infinity, or the file has no such tensor.
        """
        if name not in self.shapes or name == "timestamps":
            raise ValueError(f"'{self.path}' holds no {name}; encode with --logvar to store it")
        for index, block in enumerate(self._blocks(name, size, first=1)):
            if not block.isfinite().all():
                raise ValueError(
                    f"'{self.path}' holds NaN or infinity in chunk {index} of its {name}; encode the film anew, with --dtype fp32"
                )
            yield block.transpose(0, 1)[None]

    def _rows(self, name: str) -> int:
        return max(1, PIECE // (8 * math.prod(self.shapes[name][1][1:])))

    def _blocks(self, name: str, size: int, first: int | None = None) -> Iterator[Tensor]:
        start, stop = 0, first or size
        while start < self.shapes[name][1][0]:
            try:
                with safe_open(self.path, "pt") as file:  # opened anew, so that pages already read do not stay mapped
                    block = file.get_slice(name)[start:stop].clone()
            except (SafetensorError, OSError) as error:
                raise ValueError(f"'{self.path}' changed while it was read: {error}") from error
            yield block
            start, stop = stop, stop + size


def _check_shapes(shapes: Shapes, info: LatentInfo) -> None:
    if "latents" not in shapes or set(shapes) - set(TENSORS):
        raise ValueError(f"it holds the tensors {sorted(shapes)}, expected 'latents', and at most 'logvar' and 'timestamps'")
    dtype, shape = shapes["latents"]
    if dtype not in DTYPES.values() or len(shape) != 4 or 0 in shape:
        raise ValueError(f"'latents' is {dtype} {list(shape)}, expected a float [T', C, H', W']")
    if shapes.get("logvar", shapes["latents"]) != shapes["latents"]:
        raise ValueError(f"'logvar' is {shapes['logvar']}, 'latents' is {shapes['latents']}: expected the same")
    if shapes.get("timestamps", ("I64", (info.frames,))) != ("I64", (info.frames,)):
        raise ValueError(f"'timestamps' is {shapes['timestamps']}, expected I64 [{info.frames}], a time for each frame")

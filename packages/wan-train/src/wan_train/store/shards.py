"""The tensors of a checkpoint: written and read by torch.distributed.checkpoint, each process its shards."""

from __future__ import annotations

import os
import pickle
import warnings
from collections.abc import Iterator, Mapping
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.filesystem import FileSystem, FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load as dcp_load
from torch.distributed.checkpoint.state_dict_saver import async_save

from .failpoints import failpoint

METADATA = ".metadata"
# what DCP's metadata of tensors is made of; anything else in the pickle is refused
_MODULES = ("torch.distributed.checkpoint.metadata", "torch.distributed.checkpoint.filesystem", "pathlib", "pathlib._local")
_NAMES = {("torch", "Size"), ("torch.serialization", "_get_layout"), ("collections", "OrderedDict")}


class _Files(FileSystem):
    @contextmanager
    def create_stream(self, path: str | os.PathLike[str], mode: str) -> Iterator[Any]:
        with super().create_stream(path, mode) as stream:
            yield stream
            if mode == "wb" and Path(path).suffix == ".distcp":
                failpoint("shard")


class Writer(FileSystemWriter):
    """Writes shards with failpoints on the way. Who hashes the files forces them to the disk too."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder, sync_files=False)
        self.fs = _Files()

    def write_data(self, plan: Any, planner: Any) -> Any:
        failpoint("staged")
        try:
            written = super().write_data(plan, planner)
        except RuntimeError as error:
            if isinstance(error.__context__, OSError):  # a full disk, which torch.save tells as a wrong position
                raise error.__context__ from None
            raise
        failpoint("shards")
        return written


class Reader(FileSystemReader):
    """Reads shards; its metadata is a pickle, of which nothing but DCP's own types is taken."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        with open(Path(self.path) / METADATA, "rb") as file:
            metadata: Metadata = _MetadataUnpickler(file).load()
        return metadata


class _MetadataUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if module in _MODULES or (module, name) in _NAMES or (module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)):
            return super().find_class(module, name)
        raise ValueError(f"the {METADATA} of a checkpoint holds {module}.{name}, which is none of DCP's: it is not read")


def write(tensors: Mapping[str, Tensor], folder: Path, group: dist.ProcessGroup | None) -> Future[Any]:
    """Copy the tensors to the host, then write them to `folder` in the background; the future tells when that is done."""
    written = async_save(dict(tensors), storage_writer=Writer(folder), process_group=group, no_dist=group is None)
    return cast("Future[Any]", written)


def shapes(folder: Path) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Shape and type of every tensor in a checkpoint."""
    found = Reader(folder).read_metadata().state_dict_metadata
    return {key: (tuple(facts.size), facts.properties.dtype) for key, facts in found.items() if isinstance(facts, TensorStorageMetadata)}


def read_into(tensors: Mapping[str, Tensor], folder: Path, group: dist.ProcessGroup | None) -> None:
    """Fill tensors, sharded in whatever way, from a checkpoint. ValueError for one that is not in it, or has another shape there."""
    there = shapes(folder)
    if missing := [key for key in tensors if key not in there]:
        raise ValueError(f"'{folder}' has no {_some(missing)}: it is of other parts or of another optimiser")
    for key, value in tensors.items():
        if (shape := there[key][0]) != tuple(value.shape):
            raise ValueError(f"'{folder}' holds '{key}' as {list(shape)}, the run has {list(value.shape)}: it is of other settings")
    if tensors:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.distributed is disabled, unavailable or uninitialized")  # one process is no mistake
            dcp_load(dict(tensors), storage_reader=Reader(folder), process_group=group, no_dist=group is None)


def read_whole(folder: Path, prefix: str) -> dict[str, Tensor]:
    """The tensors whose keys begin with `prefix`, whole, on the host and without it in their keys; by one process alone."""
    found = {key: torch.empty(shape, dtype=dtype) for key, (shape, dtype) in shapes(folder).items() if key.startswith(prefix)}
    read_into(found, folder, None)
    return {key.removeprefix(prefix): value for key, value in found.items()}


def _some(keys: list[str]) -> str:
    return ", ".join(f"'{key}'" for key in keys[:3]) + (f" and {len(keys) - 3} more" if len(keys) > 3 else "")

"""Read and write checkpoints: any container, strict key maps, meta build and assign, atomic saves, fingerprints."""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from fnmatch import fnmatch
from importlib.resources import files
from pathlib import Path
from typing import Any, ClassVar, Self, TypeVar

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from .files import joined, read_json
from .hub import download
from .hub import revision_of as revision_of
from .mapped import read_mapped

State = dict[str, Tensor]
M = TypeVar("M", bound=nn.Module)
V = TypeVar("V")
CHECKSUMS = "sha256"  # field of our config.json: file name to sha256
VERIFIED = 1 << 30  # bytes up to which a file is checked when it is opened
PIECE = 1 << 24  # numbers that are hashed at a time
PICKLES = (".pth", ".pt", ".bin", ".ckpt")
POINTER = b"version https://git-lfs"


def locate(source: str | os.PathLike[str], patterns: Sequence[str] | None = None, fallback: Sequence[str] = ()) -> Path:
    """The local file or folder of `pkg:package/path`, `hub:org/repo[@revision][/path]`, a path, or `org/repo` on the Hub.

    Of `BASE+MODULE` both paths have to exist.
    patterns: of a Hub repository, or of a folder in it, fetch only the files that match one, such as `tokenizer/*`
    fallback: patterns to fetch where no weights match those
    """
    text = str(source)
    if text.startswith("pkg:"):
        package, _, inner = text.removeprefix("pkg:").partition("/")
        path = Path(str(files(package))) / inner
    elif text.startswith("hub:") or (not Path(text).exists() and text.count("/") == 1 and text[0] not in "./~"):
        path = download(text.removeprefix("hub:"), patterns)
        if fallback and not _has_weights(path, patterns or ["*"]):
            path = download(text.removeprefix("hub:"), fallback)
    else:
        path = Path(text)
    if not all(part.exists() for part in joined(path)):
        raise FileNotFoundError(f"no checkpoint at '{source}': give a file, a folder or a Hub id 'org/repo'")
    return path


def _has_weights(path: Path, patterns: Sequence[str]) -> bool:
    """Whether `path` is a file, or a folder with weights that match a pattern (other parts may have fetched more into it)."""
    names = [file.relative_to(path).as_posix() for file in path.rglob("*") if file.suffix in (".safetensors", *PICKLES)]
    return path.is_file() or any(fnmatch(name, pattern) for name in names for pattern in patterns)


def read_config(path: Path) -> dict[str, Any] | None:
    """The `config.json` in a folder or beside a file, without its checksums; None where there is none."""
    config = path / "config.json" if path.is_dir() else path.with_name("config.json")
    return {key: value for key, value in read_json(config).items() if key != CHECKSUMS} if config.exists() else None


def _check_content(file: Path) -> None:
    """ValueError where a file of our own is not what `save_folder` wrote; large ones are taken as they are."""
    config = file.with_name("config.json")
    expected = read_json(config).get(CHECKSUMS) if config.exists() and file.stat().st_size <= VERIFIED else None
    if isinstance(expected, dict) and file.name in expected and expected[file.name] != _sha256(file):
        raise ValueError(f"'{file}' is damaged: its content is not what was saved, by the sha256 in config.json")


def _sha256(file: Path) -> str:
    with open(file, "rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


def read_state(path: Path) -> State:
    """All tensors of a checkpoint, memory-mapped: safetensors, a pickle (`weights_only`), or a folder with either.

    Raises ValueError where a file cannot be read, or is not the one whose sha256 our `config.json` beside it holds.
    """
    if path.is_dir():
        shards = sorted(path.glob("*.safetensors")) or sorted(file for file in path.iterdir() if file.suffix in PICKLES)
        if not shards:
            raise FileNotFoundError(f"no .safetensors or {'/'.join(PICKLES)} file in '{path}'")
        if index := next(path.glob("*.safetensors.index.json"), None):
            shards = _indexed(index)
        found: State = {}
        for shard in shards:
            state = read_state(shard)
            if twice := found.keys() & state.keys():
                raise ValueError(f"'{path}': tensor '{min(twice)}' is in several files: give the one to read")
            found |= state
        return found
    refuse_pointer(path)
    _check_content(path)
    try:
        if path.suffix in PICKLES:
            state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
            for wrapper in ("state_dict", "model_state", "model"):
                state = state[wrapper] if isinstance(state.get(wrapper), Mapping) else state
            return dict(state)
        return _read_safetensors(path)
    except (FileNotFoundError, PermissionError, IsADirectoryError):
        raise
    except Exception as error:
        raise ValueError(f"'{path}' is not a readable checkpoint: {type(error).__name__}: {error}") from error


def _indexed(index: Path) -> list[Path]:
    """The files that an index lists; FileNotFoundError where one is not there."""
    listed = read_json(index).get("weight_map")
    if not isinstance(listed, dict):
        raise ValueError(f"'{index}' lists no tensors: it has no weight_map")
    shards = [index.with_name(name) for name in sorted(set(listed.values()))]
    if missing := [shard.name for shard in shards if not shard.exists()]:
        more = ", ..." if len(missing) > 3 else ""
        raise FileNotFoundError(
            f"'{index.parent}' is incomplete: {len(missing)} of its {len(shards)} files are missing ({', '.join(missing[:3])}{more}); "
            "fetch it again"
        )
    return shards


def refuse_pointer(file: Path) -> None:
    """ValueError where a file is not the weights but what Git LFS keeps in their place, or a download that did not end."""
    if file.suffix == ".incomplete":
        raise ValueError(f"'{file}' is a download that did not end: fetch it again")
    with open(file, "rb") as opened:
        if opened.read(len(POINTER)) == POINTER:
            raise ValueError(f"'{file}' is a pointer of Git LFS, not the weights: run `git lfs pull`, or fetch it with `hf download`")


def _read_safetensors(path: Path) -> State:
    try:
        with safe_open(path, "pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a mapping)
    except RuntimeError as error:
        if "unable to mmap" not in str(error) or sys.platform != "linux":
            raise
    return read_mapped(path)


def strip_prefix(state: State, prefixes: Iterable[str]) -> State:
    """The state without the first of `prefixes` that every key carries."""
    for prefix in prefixes:
        if state and all(key.startswith(prefix) for key in state):
            return {key.removeprefix(prefix): value for key, value in state.items()}
    return state


def rename(state: Mapping[str, V], table: Mapping[str, str], source: object = "checkpoint") -> dict[str, V]:
    """Rename every key by `table` (old -> new), a bijection: a missing or an extra key is an error that names it."""
    _check_keys(set(table), set(state), source)
    return {table[key]: value for key, value in state.items()}


def _check_keys(expected: set[str], got: set[str], source: object) -> None:
    problems = [
        f"{label} {len(keys)} ({', '.join(sorted(keys)[:3])}{', ...' if len(keys) > 3 else ''})"
        for label, keys in (("missing", expected - got), ("unexpected", got - expected))
        if keys
    ]
    if problems:
        raise ValueError(f"'{source}' does not fit this model: {'; '.join(problems)}")


def build(
    make: Callable[[], M],
    state: Mapping[str, Any],
    *,
    dtype: Any = None,
    device: Any = None,
    source: object = "checkpoint",
    kept: Container[str] = (),
) -> M:
    """Build a module on meta and assign `state` to it, strictly, in eval mode.

    state: tensors, or what has their `shape`, `to` and `is_floating_point`
    dtype None: fp32 on a CPU, the checkpoint's own elsewhere (bf16 where that is fp32).
    kept: names of tensors that keep their type
    Raises ValueError that names missing, unexpected or misshapen tensors.
    """
    device = torch.device(device or "cpu")
    with torch.device("meta"):
        module = make()
    expected = module.state_dict()
    _check_keys(set(expected), set(state), source)
    for key, value in state.items():
        if value.shape != expected[key].shape:
            raise ValueError(f"'{source}': tensor '{key}' is {tuple(value.shape)}, expected {tuple(expected[key].shape)}")
    dtype = dtype or default_dtype(state, device)
    types = {key: dtype if like.is_floating_point() else like.dtype for key, like in expected.items()}  # counts stay whole numbers
    module.load_state_dict({k: value.to(device, value.dtype if k in kept else types[k]) for k, value in state.items()}, assign=True)
    return module.eval()


def default_dtype(state: Mapping[str, Any], device: torch.device) -> torch.dtype:
    if device.type == "cpu":
        return torch.float32
    own = {value.dtype for value in state.values() if value.is_floating_point()}
    return own.pop() if own and own <= {torch.float16, torch.bfloat16} and len(own) == 1 else torch.bfloat16


def load_part(target: Any, source: str | None, *, dtype: Any = None, device: Any = None) -> Any:
    """What a spec's `load` does: `target.from_pretrained(source)`, or the bare target where there are no weights."""
    if source is not None:
        return target.from_pretrained(source, dtype=dtype, device=device)
    try:
        part = target()
    except TypeError as error:
        raise ValueError(f"{getattr(target, '__name__', target)} cannot be made without arguments: {error}") from error
    if isinstance(part, nn.Module):
        default = default_dtype(part.state_dict(), torch.device(device or "cpu"))
        part = part.to(device or "cpu", dtype or default).eval()
    return part


def best_device() -> str:
    """The device the commands run on where none is named: cuda, mps, or the CPU."""
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def usable_device(device: torch.device | str) -> torch.device:
    """The device of that name; ValueError where nothing can be computed on it here."""
    try:
        found = torch.empty(0, device=device).device
        torch.Generator(found)  # refuses what can hold no numbers, such as meta
    except (RuntimeError, AssertionError) as error:  # torch raises either, by the way it was built
        reason = str(error).strip().splitlines()[0]
        raise ValueError(f"device '{device}' cannot be used here: {reason}; the best there is: {best_device()}") from error
    return found


def fingerprint(state: Mapping[str, Any], dtype: torch.dtype | None = None) -> str:
    """sha256 over names, types, shapes and bytes of all tensors, independent of their order and of the container.

    dtype: the type to take them in; they are read a few rows at a time
    """
    digest = hashlib.sha256()
    for key in sorted(state):
        value = state[key]
        digest.update(f"{key} {dtype or value.dtype} {tuple(value.shape)} ".encode())
        rows = max(1, PIECE // max(1, math.prod(value.shape[1:])))
        for start in range(0, value.shape[0], rows) if value.shape else (0,):
            piece = value[start : start + rows] if value.shape else value
            piece = piece.detach().to("cpu", dtype or piece.dtype).contiguous()
            digest.update(piece.view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def save_folder(folder: Path, state: Mapping[str, Tensor], config: Mapping[str, Any], extra: Mapping[str, bytes] | None = None) -> None:
    """Write config.json, model.safetensors and `extra` files into `folder`; nothing half-written is ever seen there."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        save_file(
            {key: value.detach().cpu().contiguous() for key, value in state.items()},
            scratch / "model.safetensors",
            metadata={"format": "pt"},
        )
        checksums = {CHECKSUMS: {"model.safetensors": _sha256(scratch / "model.safetensors")}}
        (scratch / "config.json").write_text(json.dumps({**config, **checksums}, indent=2) + "\n")
        for name, data in (extra or {}).items():
            (scratch / name).write_bytes(data)
        folder.mkdir(exist_ok=True)
        for file in scratch.iterdir():
            file.chmod(0o644)  # safetensors writes for the owner alone
        for file in sorted(scratch.iterdir(), key=lambda file: file.suffix == ".json"):  # the config last: it makes the folder valid
            os.replace(file, folder / file.name)
        for stale in (*folder.glob("*.index.json"), *folder.glob("*-of-*.safetensors")):  # shards of an earlier save
            stale.unlink()
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


class Pretrained(nn.Module):
    """`from_pretrained`, `save_pretrained` and `push_to_hub` for a module built from one frozen pydantic `config`.

    A subclass sets `format` and gives `read_checkpoint(path) -> (config, state in its own names)` for every layout
    it knows, and `official_names(config) -> {own name: official name}`: folders are written in official names.
    `hub_files` are the patterns of what it needs of a Hub repository, None for all; `hub_fallback` those that are fetched
    where no weights match them. `name` is the registered name of the spec that loaded it, None where there was none.
    """

    format: ClassVar[str]
    hub_files: ClassVar[Sequence[str] | None] = None
    hub_fallback: ClassVar[Sequence[str]] = ()
    config: Any
    name: str | None = None

    @classmethod
    def read_checkpoint(cls, path: Path) -> tuple[Any, Mapping[str, Any]]:
        raise NotImplementedError

    @classmethod
    def official_names(cls, config: Any) -> dict[str, str]:
        raise NotImplementedError

    @classmethod
    def from_pretrained(cls, source: str | os.PathLike[str], *, dtype: Any = None, device: Any = None) -> Self:
        """Load a folder, a file or a Hub id in any layout this package reads.

        dtype None is fp32 on a CPU and the checkpoint's own on a GPU (bf16 where that is fp32); device None is the CPU.
        """
        path = locate(source, cls.hub_files, cls.hub_fallback)
        config, state = cls.read_checkpoint(path)
        return build(lambda: cls.make(config, path), state, dtype=dtype, device=device, source=path)

    @classmethod
    def make(cls, config: Any, path: Path) -> Self:
        """A new module for the checkpoint at `path`, where a subclass may find more than the config."""
        return cls(config)

    def reinitialised(self, **architecture: Any) -> Self:
        """A new module with fresh weights and this one's config, with the fields in `architecture` changed."""
        return type(self)(type(self.config)(**{**self.config.model_dump(), **architecture}))

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """Write `config.json` and `model.safetensors` with official tensor names."""
        names = self.official_names(self.config)
        state = {names[key]: value for key, value in self.state_dict().items()}
        save_folder(Path(folder), state, {"format": self.format, **self.config.model_dump(mode="json")}, self.extra_files())

    def extra_files(self) -> dict[str, bytes]:
        """Files beside the weights, such as a tokenizer."""
        return {}

    def push_to_hub(self, repo_id: str, *, private: bool = False, token: str | None = None) -> str:
        """Save and upload to `repo_id`; returns its address."""
        from huggingface_hub import HfApi

        api = HfApi(token=token)
        address = api.create_repo(repo_id, private=private, exist_ok=True)
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder)
            api.upload_folder(repo_id=repo_id, folder_path=folder)
        return str(address)

    def fingerprint(self) -> str:
        """sha256 of the weights under their official names."""
        names = self.official_names(self.config)
        return fingerprint({names[key]: value for key, value in self.state_dict().items()})

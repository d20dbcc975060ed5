"""The checkpoints of a run, each whole or not there: written in the background, believed only with all their bytes."""

from __future__ import annotations

import json
import secrets
import shutil
import warnings
from collections.abc import Mapping, MutableMapping
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from torch.distributed.checkpoint.api import CheckpointException
from wan_dit._shared.files import read_json

from .. import __version__
from . import shards
from .complete import newest_complete, verify
from .durable import sync_and_digest, sync_folder, write_durably
from .failpoints import failpoint
from .lock import RunLock
from .manifest import NAME, UNFINISHED, VALUES, File, Manifest, folder_name, read_manifest, steps, to_json
from .ranks import Ranks
from .rng import restore_rng, rng_states
from .tree import fill, flatten

Records = dict[str, File]


class Store:
    """Checkpoints in `folder`, one sub-folder each, made and read by all processes of a run together.

    keep: how many of the newest stay; keep_every: also those whose step is a multiple of it
    layout: how the processes share the work, for the manifest
    saved: step of the newest checkpoint that this run wrote whole, None before the first
    All methods but `prune` are collective. The folder has to be on a file system that all processes share.
    Raises ValueError on all processes where another run writes to the folder, OSError where it cannot be written.
    """

    def __init__(
        self, folder: str | Path, keep: int = 3, keep_every: int | None = None, *, layout: Mapping[str, Any] | None = None
    ) -> None:
        if keep < 1 or (keep_every is not None and keep_every < 1):
            raise ValueError(f"keep {keep} and keep_every {keep_every} must be at least 1: the newest checkpoint is never deleted")
        warnings.filterwarnings("ignore", "torch.distributed is disabled, unavailable or uninitialized")  # one process is no mistake
        self.folder, self.keep, self.keep_every, self.layout = Path(folder), keep, keep_every, dict(layout or {})
        self.ranks = Ranks()
        self.saved: int | None = None
        self._verified: set[int] = set()
        self._pending: tuple[int, Future[str | None]] | None = None
        self._lock: RunLock | None = None
        refused, self._token = self.ranks.first((self._take() if self.ranks.rank == 0 else None, secrets.token_hex(4)))
        if refused is not None:
            raise refused
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def save(self, step: int, state: Mapping[str, Any], wait: bool = False) -> None:
        """Write a checkpoint; returns when the values are copied, and training may change them.

        state: nested dicts of tensors, DTensors and plain values (None, numbers, strings, lists), of which rank 0's are kept
        wait: return when it is on the disk
        A save waits for the one before it. One that fails, on a full disk for instance, is warned of by the next call, and
        leaves nothing behind. Raises ValueError for a value that is neither tensor nor plain.
        """
        self.wait()
        tensors, values = flatten(state)
        texts = json.dumps(values), json.dumps(rng_states())
        folder = self.folder / f"{folder_name(step)}{UNFINISHED}{self._token}"
        written = shards.write(tensors, folder, self.ranks.group)
        self._pending = step, self._thread.submit(self._finish, step, folder, written, *texts)
        if wait:
            self.wait()

    def wait(self) -> bool:
        """Wait until the last save is on the disk; False, and a warning of rank 0, where it failed."""
        if self._pending is None:
            return True
        (step, future), self._pending = self._pending, None
        if (problem := future.result()) is None:
            self.saved = step
            self._verified.add(step)
            return True
        if self.ranks.rank == 0:
            last = "none was saved before" if self.saved is None else f"the last one is of step {self.saved}"
            warnings.warn(f"the checkpoint of step {step} could not be written ({problem}); {last}", stacklevel=2)
        return False

    def latest(self, before: int | None = None) -> int | None:
        """The step of the newest checkpoint that is complete, every byte read; None where there is none. Warns of those that are not.

        before: of earlier steps only, for a rollback past the newest one
        """
        self.wait()
        found = newest_complete(self.folder, self.ranks, before)
        if found is None:
            return None
        self._verified.add(found.step)
        return found.step

    def load(self, step: int, into: MutableMapping[str, Any]) -> None:
        """Fill a state in place from a checkpoint of any number of processes: tensors are copied into, plain values replaced.

        Raises ValueError where the checkpoint is damaged, or of another structure than `into`; it may hold more than `into`.
        """
        self.wait()
        folder = self.folder / folder_name(step)
        if step not in self._verified:
            verify(folder, self.ranks)
        tensors, wanted = flatten(into)
        values = read_json(folder / VALUES)
        if missing := sorted(wanted.keys() - values.keys()):
            raise ValueError(f"'{folder}' has no value '{missing[0]}': it is of other parts or of another optimiser")
        shards.read_into(tensors, folder, self.ranks.group)
        fill(into, values)

    def restore_rng(self, step: int) -> bool:
        """Give each process's global random generators the state they had at `step`; False where the number of processes was another."""
        folder = self.folder / folder_name(step)
        if read_manifest(folder).world_size != self.ranks.size:
            return False
        restore_rng(read_json(folder / _rng_name(self.ranks.rank)))
        return True

    def prune(self) -> None:
        """Delete checkpoints beyond `keep` that are no multiple of `keep_every`; those that are damaged are neither counted nor touched."""
        if self.ranks.rank > 0:
            return
        whole = [step for step in steps(self.folder) if _is_whole(self.folder / folder_name(step))]
        for step in whole[self.keep :]:
            if not self.keep_every or step % self.keep_every:
                self._delete(self.folder / folder_name(step))

    def close(self) -> None:
        """Wait for the last save and let another run have the folder."""
        self.wait()
        self._thread.shutdown()
        if self._lock is not None:
            self._lock.release()

    def _take(self) -> Exception | None:
        """Lock the folder, and delete what a run that ended has left unfinished; the error where that cannot be done."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._lock = RunLock(self.folder)
            for left in sorted(self.folder.glob(f"step-*{UNFINISHED}*")):
                shutil.rmtree(left, ignore_errors=True)
                warnings.warn(f"'{left}' was not finished by a run that ended: deleted", stacklevel=4)
        except (ValueError, OSError) as error:
            return error
        return None

    def _finish(self, step: int, folder: Path, written: Future[Any], values: str, rng: str) -> str | None:
        """In the background, when DCP has written: checksums, manifest, name. What went wrong on some process, on every one alike."""
        problem, files = None, {}
        try:
            try:
                written.result()
                failpoint("written")
                files = self._records(folder, values, rng)
            except (Exception, CheckpointException) as error:
                problem = _told(error)
            answers = self.ranks.gather((problem, files))
            problem = next((given for given, _ in answers if given), None)
            if self.ranks.rank == 0:
                problem = self._publish(step, folder, [records for _, records in answers], problem)
            return self.ranks.first(problem)
        except RuntimeError:  # by the group, which ends with any of its processes
            return "another process of the run ended"

    def _records(self, folder: Path, values: str, rng: str) -> Records:
        """Write what is not DCP's, force all files of this process to the disk, and take their sizes and checksums."""
        rank = self.ranks.rank
        write_durably(folder / _rng_name(rank), rng)
        own = [folder / _rng_name(rank), *sorted(folder.glob(f"__{rank}_*.distcp"))]
        if rank == 0:
            write_durably(folder / VALUES, values)
            own += [folder / VALUES, folder / shards.METADATA]
        found = {}
        for path in own:
            size, digest = sync_and_digest(path)
            found[path.name] = File(size=size, sha256=digest)
        return found

    def _publish(self, step: int, folder: Path, records: list[Records], problem: str | None) -> str | None:
        """Give a checkpoint its manifest and its name, or delete it where there is a problem."""
        try:
            if problem is None:
                self._name(step, folder, {name: file for each in records for name, file in each.items()})
        except Exception as error:  # the other processes wait for what became of it
            problem = _told(error)
        if problem is not None:
            shutil.rmtree(folder, ignore_errors=True)
            return problem
        try:
            self.prune()
        except OSError as error:
            warnings.warn(f"old checkpoints in '{self.folder}' could not be deleted: {error}", stacklevel=2)
        return None

    def _name(self, step: int, folder: Path, files: Records) -> None:
        if absent := [name for name in files if not (folder / name).is_file()]:
            raise OSError(f"'{folder}' lacks '{absent[0]}' of another process: it has to be on a file system that all share")
        manifest = Manifest(
            step=step,
            world_size=self.ranks.size,
            layout=self.layout,
            files=files,
            versions={"torch": torch.__version__, "wan-train": __version__},
            created=datetime.now(UTC).isoformat(timespec="seconds"),
        )
        write_durably(folder / NAME, json.dumps(to_json(manifest), indent=2) + "\n")
        sync_folder(folder)
        failpoint("manifest")
        final = self.folder / folder_name(step)
        if final.exists():  # damaged, or of a course that was rolled back
            self._delete(final)
        folder.rename(final)
        sync_folder(self.folder)
        failpoint("renamed")

    def _delete(self, checkpoint: Path) -> None:
        """Under a temporary name, so that none is seen half deleted."""
        doomed = checkpoint.with_name(f"{checkpoint.name}{UNFINISHED}{secrets.token_hex(4)}")
        checkpoint.rename(doomed)
        shutil.rmtree(doomed)


def _rng_name(rank: int) -> str:
    return f"rng-{rank:05d}.json"


def _is_whole(checkpoint: Path) -> bool:
    try:
        read_manifest(checkpoint)
    except (ValueError, OSError):
        return False
    return True


def _told(error: BaseException) -> str:
    """The cause of an error in one line; of DCP's, that of the first process that failed."""
    if isinstance(error, CheckpointException) and error.failures:
        rank, (cause, _) = min(error.failures.items())
        return f"process {rank}: {_told(cause)}"
    return next(iter(str(error).strip().splitlines()), "") or type(error).__name__

"""One run a folder: a file that the run keeps locked for as long as it lives, however it ends."""

from __future__ import annotations

import fcntl
import os
import socket
import warnings
import weakref
from pathlib import Path

NAME = ".lock"


class RunLock:
    """Holds `folder/.lock`, with process id and host in it. ValueError where another process holds it.

    The kernel gives the lock back when the process ends, by SIGKILL too; a file system without locks is warned of.
    """

    def __init__(self, folder: Path) -> None:
        path = folder / NAME
        self.file = path.open("a+")
        try:
            fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self.file.seek(0)
            holder = self.file.read().strip() or "another process"
            self.file.close()
            raise ValueError(f"'{folder}' is written to by another run ({holder}): end it, or give another output") from None
        except OSError as error:
            warnings.warn(f"'{path}' cannot be locked ({error.strerror}): let no second run write to this folder", stacklevel=3)
        self.file.truncate(0)
        self.file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        self.file.flush()
        held = weakref.ref(self.file)
        os.register_at_fork(after_in_child=lambda: _close(held()))  # a data worker that outlives its run must not hold the lock

    def release(self) -> None:
        self.file.close()


def _close(file: object) -> None:
    if file is not None:
        file.close()  # type: ignore[attr-defined]

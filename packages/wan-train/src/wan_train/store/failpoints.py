"""Named points in the write of a checkpoint at which a test kills the process.

`WAN_TRAIN_FAILPOINT=manifest` kills it by SIGKILL when it first comes to that point, `manifest:3` when it does for the third time.
"""

from __future__ import annotations

import os
import signal
from collections import Counter

VARIABLE = "WAN_TRAIN_FAILPOINT"
POINTS = {
    "staged": "the values are copied, nothing is written",
    "shard": "a shard is open and partly written",
    "shards": "this process has written its shards, DCP's metadata is missing",
    "written": "all of DCP's files are written, none has its checksum",
    "manifest": "the manifest is written, the folder has its temporary name",
    "renamed": "the folder has its name, older ones are not pruned",
}
_passed: Counter[str] = Counter()


def failpoint(name: str) -> None:
    """Where the environment names this point, the process ends here as by `kill -9`. ValueError for a name there is not."""
    if not (wanted := os.environ.get(VARIABLE)):
        return
    point, _, count = wanted.partition(":")
    if point not in POINTS or not (count or "1").isdigit():
        raise ValueError(f"{VARIABLE}={wanted}: give one of {', '.join(POINTS)}, and :COUNT after it")
    _passed[name] += 1
    if name == point and _passed[name] == int(count or 1):
        os.kill(os.getpid(), signal.SIGKILL)

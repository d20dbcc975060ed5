"""Tests in several real processes, which start from a fork server that has torch already."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Sequence
from typing import Any


def in_processes(target: Callable[..., None], arguments: Sequence[tuple[Any, ...]], preload: Sequence[str], seconds: float) -> list[Any]:
    """What the processes put into their queue, by rank: tuples that begin with it.

    target: called as `target(*arguments[rank], queue)`; preload: modules that the fork server imports once
    seconds: how long an answer is waited for; a process that does not end then is killed
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(preload))
    out = context.Queue()
    processes = [context.Process(target=target, args=(*each, out)) for each in arguments]
    for process in processes:
        process.start()
    try:
        return sorted((out.get(timeout=seconds) for _ in processes), key=lambda answer: answer[0])
    finally:
        for process in processes:
            process.join(timeout=10)
            if process.is_alive():
                process.kill()


def grouped(run: Callable[..., None], store: str, preload: Sequence[str], seconds: float) -> Callable[..., list[Any]]:
    """`group(size, task, *given)`: the answers of so many processes to a task, by rank; a failure is told as text.

    run: called as `run(task, rank, size, store, given, queue)`; it forms the group
    """

    def group(size: int, task: Callable[..., Any], *given: Any) -> list[Any]:
        arguments = [(task, rank, size, store, given) for rank in range(size)]
        found = [answer for _, answer in in_processes(run, arguments, preload, seconds)]
        assert not (failed := [answer for answer in found if isinstance(answer, str)]), "\n".join(failed)
        return found

    return group

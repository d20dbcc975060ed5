"""What the four commands share: errors to exit codes, tables, --json."""

from __future__ import annotations

import argparse
import json
import signal
import sys
import tempfile
import threading
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NoReturn

USER_ERRORS = (ValueError, LookupError, OSError)


class Parser(argparse.ArgumentParser):
    """argparse whose errors are one line, like all others; its subcommands are of this class too."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog.split()[0]}: error: {message} (see {self.prog} --help)\n")


def run(main: Callable[[argparse.Namespace], int | None], parser: argparse.ArgumentParser, argv: Sequence[str] | None = None) -> int:
    """Parse, run and turn an error into one line on stderr.

    Exit codes: 0; 2 for bad input (ValueError, LookupError, OSError); 1 for anything unexpected, whose traceback goes
    to a log file; 130 on Ctrl-C. A terminated command (SIGTERM, SIGHUP) cleans up like one that is interrupted, and leaves
    by SystemExit with 143 or 129. `--debug` shows the traceback.
    """
    args = parser.parse_args(argv)
    try:
        with _unwinding(), warnings.catch_warnings():
            warnings.showwarning = _told_once(parser.prog)
            return main(args) or 0
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        return 0
    except Exception as error:
        if getattr(args, "debug", False):
            traceback.print_exc()
        if _out_of_memory(error):
            error = MemoryError(
                f"not enough memory: {str(error).strip().splitlines()[0]}; ask for less, such as a smaller size or fewer frames"
            )
        if isinstance(error, (*USER_ERRORS, MemoryError)) and type(error) not in (KeyError, IndexError):
            print(f"{parser.prog}: error: {error}", file=sys.stderr)
            return 2
        with tempfile.NamedTemporaryFile("w", prefix=f"{parser.prog}-", suffix=".log", delete=False) as log:
            log.write(traceback.format_exc())
        print(f"{parser.prog}: unexpected {type(error).__name__}: {error} (traceback in {log.name})", file=sys.stderr)
        return 1


def _told_once(prog: str) -> Callable[..., None]:
    """What shows a warning as one line, and only once where several steps give the same one."""
    told: set[str] = set()

    def tell(message: Warning | str, *_: object, **__: object) -> None:
        if str(message) not in told:
            told.add(str(message))
            print(f"{prog}: warning: {message}", file=sys.stderr)

    return tell


@contextmanager
def _unwinding() -> Iterator[None]:
    """Signals that ask to end become exceptions, so that scratch files go and outputs stay whole; only a main thread has signals."""
    asked = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]
    mine = [number for number in asked if signal.getsignal(number) is signal.SIG_DFL] if _in_main_thread() else []
    for number in mine:
        signal.signal(number, _leave)
    try:
        yield
    finally:
        for number in mine:
            signal.signal(number, signal.SIG_DFL)


def _in_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()


def _leave(number: int, frame: object) -> NoReturn:
    signal.signal(number, signal.SIG_IGN)  # a second one must not cut the cleaning short
    raise SystemExit(128 + number)


def _out_of_memory(error: Exception) -> bool:
    return type(error).__name__ == "OutOfMemoryError" or (isinstance(error, RuntimeError) and "DefaultCPUAllocator" in str(error))


def add_common(parser: argparse.ArgumentParser, *, listing: bool = False) -> None:
    """The flags every subcommand has: --debug, and --json where it lists something."""
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    if listing:
        parser.add_argument("--json", action="store_true", help="print JSON instead of a table")


def show(rows: Sequence[dict[str, Any]], *, as_json: bool, empty: str = "nothing to list") -> None:
    """Print records as JSON or as an aligned table."""
    if as_json:
        print(json.dumps(list(rows), indent=2, ensure_ascii=False))
    elif not rows:
        print(empty)
    else:
        columns = list(rows[0])
        cells = [columns, *([str(row[column]) for column in columns] for row in rows)]
        widths = [max(len(line[i]) for line in cells) for i in range(len(columns))]
        for line in cells:
            print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())

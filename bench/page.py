"""Markdown of the generated pages: heading, machine, tables."""

from __future__ import annotations

import os
import platform
import re
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

LIBRARIES = ("torch", "diffusers", "transformers")


def header(title: str, script: str, summary: str) -> str:
    """Title, how to make the page again, and what is on it."""
    notice = f"<!-- Written whole by the command below: edit bench/{script}.py instead. -->"
    return f"# {title}\n\n{notice}\n\n`python -m nox -s bench -- {script}` writes this page.\n{summary}"


def machine(threads: int) -> str:
    """One line on the processor and one on the software, without names of hosts or paths."""
    libraries = ", ".join(f"{name} {version(name)}" for name in LIBRARIES)
    return (
        f"- Machine: {processor()}, {os.cpu_count()} cores, {platform.system()} {platform.machine()}; threads: {threads}\n"
        f"- Software: Python {platform.python_version()}, {libraries}\n"
    )


def processor() -> str:
    """The processor's own name where the system tells it."""
    listed = Path("/proc/cpuinfo")
    found = re.search(r"^model name\s*:\s*(.+)$", listed.read_text(), re.MULTILINE) if listed.exists() else None
    return found[1] if found else platform.processor() or platform.machine()


def table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)

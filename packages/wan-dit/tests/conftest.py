"""Plugins for the tests: the package in `thirdparty`, and small ones written into a temporary folder."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"  # before anything imports huggingface_hub, which reads it once
THIRDPARTY = Path(__file__).parent / "thirdparty"
sys.path.insert(0, str(Path(__file__).parent / "processes"))  # what other processes of the tests import
Install = Callable[..., None]


@pytest.fixture
def acme(monkeypatch: pytest.MonkeyPatch) -> Path:
    """Put the third-party package `acme-wan` on the path; returns the folder."""
    monkeypatch.syspath_prepend(str(THIRDPARTY))
    return THIRDPARTY


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Install:
    """Install a distribution with one module: `install("wan-foo", source, entry="wan-foo")`."""
    site = tmp_path / "installed"
    site.mkdir()
    monkeypatch.syspath_prepend(str(site))

    def write(name: str, source: str, *, entry: str | None = None, version: str = "1.0") -> None:
        module = name.replace("-", "_").lower()
        monkeypatch.delitem(sys.modules, module, raising=False)
        (site / f"{module}.py").write_text(source)
        info = site / f"{module}-{version}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        (info / "entry_points.txt").write_text(f"[wan]\n{entry or name} = {module}\n")
        importlib.invalidate_caches()

    return write

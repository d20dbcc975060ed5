"""The documentation keeps its word: the README's Python runs, and every page of the navigation exists."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text() if (ROOT / "README.md").exists() else ""
PAGES = re.findall(r": ([\w-]+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.MULTILINE)


def test_readme_python_runs_as_it_stands(tmp_path: Path) -> None:
    blocks = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert blocks
    for block in blocks:
        environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
        done = subprocess.run([sys.executable, "-c", block], cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, f"{block}\n{done.stderr}"


@pytest.mark.parametrize("page", PAGES)
def test_page_of_the_navigation_exists_and_its_links_lead_somewhere(page: str) -> None:
    text = (ROOT / "docs" / page).read_text()
    for link in re.findall(r"\]\(([^)#:]+\.(?:md|png|svg|gif))(?:#[^)]*)?\)", text):
        assert (ROOT / "docs" / link).exists(), f"docs/{page} links to {link}"


def test_readme_links_lead_somewhere() -> None:
    for link in re.findall(r"(?:\]\(|src=\")([^)\"#:]+)(?:#[^)\"]*)?[)\"]", README):
        assert (ROOT / link).exists(), link


@pytest.mark.parametrize("name", ["parity", "benchmarks"])
def test_generated_page_says_how_it_was_made(name: str) -> None:
    assert f"python -m nox -s bench -- {name}" in (ROOT / "docs" / f"{name}.md").read_text()

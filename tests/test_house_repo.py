"""What holds for the repository as a whole: sessions, commands, pins, imports across packages, sizes, copies."""

from __future__ import annotations

import ast
import re
import subprocess
import tomllib
from functools import cache
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
PACKAGES = ["wan-vae", "wan-text", "wan-dit", "wan-train"]
SOURCES = {name: ROOT / "packages" / name / "src" / name.replace("-", "_") for name in PACKAGES}
SESSIONS = {"dev", "demo", "tests", "tests_all", "lint", "types", "docs", "bench", "tiny", "build", "shared"}
MAY_IMPORT = {"wan-vae": set(), "wan-text": set(), "wan-dit": set(), "wan-train": {"wan_dit", "wan_vae"}}
COMMAND = "python -m pip install nox && python -m nox -s {}"


@cache
def project_files() -> list[Path]:
    """Every file of the project: tracked, or new and not ignored."""
    listed = subprocess.run(["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True, check=True)
    return [path for line in listed.stdout.splitlines() if (path := ROOT / line).is_file() and path != Path(__file__)]


@cache
def noxfile() -> ast.Module:
    return ast.parse((ROOT / "noxfile.py").read_text())


def pins() -> set[str]:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    return {canonicalize_name(Requirement(line).name) for line in lines if line and not line.startswith("#")}


def pyproject(name: str) -> dict:
    return tomllib.loads((ROOT / "packages" / name / "pyproject.toml").read_text())


def test_noxfile_has_every_session_each_with_a_line_that_says_what_it_does() -> None:
    functions = [node for node in noxfile().body if isinstance(node, ast.FunctionDef)]
    marked = [node for node in functions if any("nox.session" in ast.unparse(mark) for mark in node.decorator_list)]
    sessions = {node.name: ast.get_docstring(node) for node in marked}
    assert set(sessions) == SESSIONS
    assert all(sessions.values())


def test_noxfile_needs_only_nox_and_the_standard_library() -> None:
    imported = {alias.name for node in ast.walk(noxfile()) if isinstance(node, ast.Import) for alias in node.names}
    imported |= {str(node.module) for node in ast.walk(noxfile()) if isinstance(node, ast.ImportFrom)}
    assert imported == {"__future__", "hashlib", "os", "shutil", "sys", "pathlib", "nox"}


def test_readme_gives_the_two_commands_and_ci_runs_the_second() -> None:
    readme = (ROOT / "README.md").read_text()
    assert COMMAND.format("demo") in readme
    assert COMMAND.format("tests") in readme
    assert "python3 -m venv" in readme  # where the system's Python is externally managed
    assert (ROOT / ".ci" / "run").read_text().splitlines()[-1] == COMMAND.format("tests")


def test_everything_that_is_installed_is_pinned() -> None:
    groups = [node.value for node in noxfile().body if isinstance(node, ast.Assign) and isinstance(node.value, ast.List)]
    asked = {str(name) for group in groups for name in ast.literal_eval(group)} - set(PACKAGES) - {"tests", "wan-text", "wan-dit"}
    for name in PACKAGES:
        project = pyproject(name)["project"]
        asked |= {Requirement(text).name for text in project["dependencies"]}
    assert {canonicalize_name(name) for name in asked} - set(PACKAGES) - pins() == set()


@pytest.mark.parametrize("name", PACKAGES)
def test_package_metadata_holds_lower_bounds_only(name: str) -> None:
    for text in pyproject(name)["project"]["dependencies"]:
        requirement = Requirement(text)
        if requirement.name not in PACKAGES:
            assert str(requirement.specifier).startswith(">="), text
            assert "," not in str(requirement.specifier), text


def test_torchvision_is_neither_required_nor_imported() -> None:
    assert "torchvision" not in pins()
    for path in project_files():
        if path.suffix == ".py":
            assert not re.search(r"^\s*(import|from) torchvision", path.read_text(), re.MULTILINE), path
        if path.name in ("pyproject.toml", "noxfile.py"):
            assert "torchvision" not in path.read_text(), path


def test_no_file_names_a_machine_or_a_package_index() -> None:
    forbidden = re.compile(r"(?<![\w.~])/(work|root|home|opt)/|pypi\.org|pythonhosted|download\.pytorch|index-url[ =]+.?https?:")
    for path in project_files():
        if path.suffix in (".py", ".md", ".toml", ".txt", ".ini", ".yml", ".json", ".jsonl", "") and path.stat().st_size < 1_000_000:
            assert not (found := forbidden.search(path.read_text(errors="replace"))), f"{path}: {found}"


@pytest.mark.parametrize("name", PACKAGES)
def test_package_imports_only_the_siblings_it_may(name: str) -> None:
    own = name.replace("-", "_")
    for path in SOURCES[name].rglob("*.py"):
        tree = ast.parse(path.read_text())
        modules = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
        modules |= {str(node.module) for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) if not node.level}
        siblings = {module.split(".")[0] for module in modules if module.startswith("wan_")}
        assert siblings <= {own} | MAY_IMPORT[name], path


def test_shared_folders_are_byte_identical() -> None:
    def contents(name: str) -> dict[str, bytes]:
        folder = SOURCES[name] / "_shared"
        return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*.py")}

    assert contents("wan-vae")
    assert contents("wan-text") == contents("wan-vae") == contents("wan-dit")
    assert not (SOURCES["wan-train"] / "_shared").exists()


def test_no_source_file_is_longer_than_400_lines() -> None:
    lengths = {path: len(path.read_text().splitlines()) for path in project_files() if path.suffix == ".py"}
    assert {str(path.relative_to(ROOT)): length for path, length in lengths.items() if length > 400} == {}


def test_test_modules_have_names_of_their_own() -> None:
    names = [path.name for path in project_files() if path.name.startswith("test_")]
    assert sorted(names) == sorted(set(names))


def test_licence_and_changelog_are_there() -> None:
    licences = {(folder / "LICENSE").read_text() for folder in (ROOT, *(ROOT / "packages" / name for name in PACKAGES))}
    assert len(licences) == 1
    assert "Apache License" in licences.pop()
    changes = (ROOT / "CHANGELOG.md").read_text()
    for name in PACKAGES:
        version = re.search(r'__version__ = "(.+)"', (SOURCES[name] / "__init__.py").read_text())
        assert version
        assert f"## [{version[1]}]" in changes

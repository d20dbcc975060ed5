"""Every task of the repository as a nox session: `python -m nox -l` lists them.

Sessions that need torch share one environment, `.venv`, which each completes with what it needs: the demo's environment
is the one to work in, and the tests add to it instead of installing torch again. An unchanged environment is not touched.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import sys
from pathlib import Path

import nox

nox.options.default_venv_backend = "virtualenv"
nox.options.reuse_venv = "yes"
nox.options.sessions = ["tests"]

ROOT = Path(__file__).parent
PACKAGES = ["wan-vae", "wan-text", "wan-dit", "wan-train"]
SOURCES = {name: ROOT / "packages" / name / "src" / name.replace("-", "_") for name in PACKAGES}
SHARED_SOURCE, SHARED_COPIES = "wan-vae", ["wan-text", "wan-dit"]

VENV = ROOT / ".venv"
STAMPS = "installed"
BIN = VENV / ("Scripts" if os.name == "nt" else "bin")
CONSTRAINTS = ROOT / "constraints.txt"
BUILD = ["hatchling", "editables"]
REFERENCES = ["diffusers", "accelerate", "transformers", "scikit-image", "scikit-video"]
TEST = ["pytest", "pytest-xdist", "hypothesis", "build", "gguf", "torchao"]
LINT = ["ruff"]
TYPES = ["mypy", "types-tqdm"]
DOCS = ["mkdocs-material", "mkdocstrings-python", "ruff"]  # ruff formats signatures
TINY = {  # recipe -> trained part -> the package that carries it
    "tiny-vae": {},
    "tiny-vae-refine": {},
    "tiny-vae-mix": {},
    "tiny-vae-film": {},
    "tiny-vae-decoder": {},
    "tiny-vae-long": {},
    "tiny-vae-finish": {"vae": "wan-vae"},
    "tiny-t2v": {},
    "tiny-t2v-refine": {},
    "tiny-t2v-polish": {"backbone": "wan-dit", "text_encoder": "wan-text"},
}
ONE_THREAD = {"OMP_NUM_THREADS": "1"}  # tiny models are slower on more, above all where something else runs


@nox.session(venv_backend="none")
def dev(session: nox.Session) -> None:
    """Make .venv with the four packages, editable, and everything to test, lint and type-check them."""
    environment(session, *TEST, *REFERENCES, *LINT, *TYPES)
    session.log(f"activate it: {'.venv/Scripts/activate' if os.name == 'nt' else 'source .venv/bin/activate'}")


@nox.session(venv_backend="none")
def demo(session: nox.Session) -> None:
    """Generate a video with the built-in tiny model into outputs/; a prompt may follow `--`."""
    environment(session)
    prompt = session.posargs or ["a red circle moves left"]
    (ROOT / "outputs").mkdir(exist_ok=True)
    session.run(str(BIN / "wan-dit"), "generate", *prompt, "--output", "outputs", env=ONE_THREAD, external=True)


@nox.session(venv_backend="none")
def tests(session: nox.Session) -> None:
    """All tests but the slow ones; pytest arguments may follow `--`."""
    pytest(session, "-m", "not slow")


@nox.session(venv_backend="none")
def tests_all(session: nox.Session) -> None:
    """All tests, the slow ones too."""
    pytest(session)


@nox.session
def lint(session: nox.Session) -> None:
    """ruff, its formatter, and the identity of the `_shared` folders."""
    install(session, *LINT)
    session.run("ruff", "check", ".")
    session.run("ruff", "format", "--check", ".")
    if different := differing_shared_files():
        session.error(f"_shared differs from {SHARED_SOURCE}'s, run `nox -s shared`: {', '.join(different)}")


@nox.session(venv_backend="none")
def types(session: nox.Session) -> None:
    """mypy, strict, over the four packages."""
    environment(session, *TYPES)
    session.run(str(BIN / "mypy"), *(str(SOURCES[name].parent) for name in PACKAGES), external=True)


@nox.session
def docs(session: nox.Session) -> None:
    """Build the documentation into site/; `-- serve` shows it while you write."""
    install(session, *DOCS)
    session.run("mkdocs", *(session.posargs or ["build", "--strict"]), env={"NO_MKDOCS_2_WARNING": "1"})


@nox.session(venv_backend="none")
def bench(session: nox.Session) -> None:
    """Measure against diffusers and transformers, and write docs/benchmarks.md and docs/parity.md; `-- parity` does one.

    `-- film` and `-- codecs`, three hours of one core, write others.
    """
    environment(session, *TEST, *REFERENCES)
    for script in session.posargs or ["parity", "benchmarks"]:
        session.run(str(BIN / "python"), f"bench/{script}.py", f"docs/{script}.md", env=ONE_THREAD, external=True)


@nox.session(venv_backend="none")
def tiny(session: nox.Session) -> None:
    """Train the built-in models again, some five hours of one core, and put them, their logs and curves in place."""
    environment(session)
    for recipe, parts in TINY.items():
        session.run(str(BIN / "wan-train"), "run", recipe, "--overwrite", env=ONE_THREAD, external=True)
        for part, package in parts.items():
            shutil.copytree(f"runs/{recipe}/export/{part}", SOURCES[package] / "weights" / "tiny", dirs_exist_ok=True)
    session.run(str(BIN / "python"), "bench/curves.py", *(f"runs/{recipe}" for recipe in TINY), "docs/training", external=True)
    session.run(str(BIN / "python"), "bench/picture.py", "docs/images/demo.png", external=True)


@nox.session
def build(session: nox.Session) -> None:
    """Wheels and sdists of the four packages into dist/."""
    install(session, "build", *BUILD)
    shutil.rmtree(ROOT / "dist", ignore_errors=True)
    for name in PACKAGES:
        session.run("python", "-m", "build", "--no-isolation", "--outdir", "dist", f"packages/{name}")


@nox.session(venv_backend="none")
def shared(session: nox.Session) -> None:
    """Copy wan-vae's `_shared` over those of wan-text and wan-dit."""
    for name in SHARED_COPIES:
        shutil.rmtree(SOURCES[name] / "_shared", ignore_errors=True)
        shutil.copytree(SOURCES[SHARED_SOURCE] / "_shared", SOURCES[name] / "_shared", ignore=shutil.ignore_patterns("__pycache__"))
        session.log(f"copied _shared to {name}")


def pytest(session: nox.Session, *arguments: str) -> None:
    environment(session, *TEST, *REFERENCES)
    session.run(
        str(BIN / "python"), "-m", "pytest", "-n", "2", "--dist", "loadfile", *arguments, *session.posargs, env=ONE_THREAD, external=True
    )  # fmt: skip


def install(session: nox.Session, *requirements: str) -> None:
    session.install("-c", str(CONSTRAINTS), *requirements)


def environment(session: nox.Session, *requirements: str) -> None:
    """Complete .venv with torch, the four packages (editable) and `requirements`; what a stamp says is there is left alone.

    WAN_TORCH_INDEX: package index that torch itself is taken from, such as one with builds for a given accelerator.
    """
    if not (BIN / "python").exists():
        shutil.rmtree(VENV / STAMPS, ignore_errors=True)
        session.run(sys.executable, "-m", "virtualenv", "--quiet", str(VENV), external=True)
    index = os.environ.get("WAN_TORCH_INDEX", "")
    projects = [(ROOT / "packages" / name / "pyproject.toml").read_text() for name in PACKAGES]
    if stamp := missing(index, *projects):
        if index:
            pip_install(session, "--no-deps", "--index-url", index, "torch")
        pip_install(session, "torch", *BUILD)
        pip_install(session, "--no-build-isolation", *(argument for name in PACKAGES for argument in ("-e", f"packages/{name}")))
        stamp.touch()
    if requirements and (stamp := missing(*requirements)):
        pip_install(session, *requirements)
        stamp.touch()


def missing(*parts: str) -> Path | None:
    """The stamp that stands for `parts`, installed with these constraints at this place; None where it is there."""
    state = hashlib.sha256("\0".join((str(VENV), CONSTRAINTS.read_text(), *parts)).encode())
    stamp = VENV / STAMPS / state.hexdigest()
    stamp.parent.mkdir(exist_ok=True)
    return None if stamp.exists() else stamp


def pip_install(session: nox.Session, *arguments: str) -> None:
    """pip into .venv; no bytecode for the thousands of modules that are never imported: Python writes it on first use."""
    session.run(str(BIN / "python"), "-m", "pip", "install", "--quiet", "--no-compile", "-c", str(CONSTRAINTS), *arguments, external=True)


def differing_shared_files() -> list[str]:
    """Files of the `_shared` folders that are missing, left over or different from the source's."""

    def contents(name: str) -> dict[str, bytes]:
        folder = SOURCES[name] / "_shared"
        return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.suffix == ".py"}

    source = contents(SHARED_SOURCE)
    return [
        f"{name}:{file}"
        for name in SHARED_COPIES
        for copy in [contents(name)]
        for file in sorted(source.keys() | copy.keys())
        if source.get(file) != copy.get(file)
    ]

"""Environments with nothing but wheels of this repository and exactly the distributions that these declare."""

from __future__ import annotations

import os
import subprocess
import sys
import venv
import zipfile
from dataclasses import dataclass
from email.parser import Parser
from importlib.metadata import distribution
from pathlib import Path
from typing import Self

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
PACKAGES = ["wan-vae", "wan-text", "wan-dit", "wan-train"]
EXAMPLE, ENCODER, CODEC = EXAMPLES = "wan-scheduler-heun", "wan-text-words", "wan-vae-dct"


@dataclass(frozen=True)
class Environment:
    """A virtual environment without pip; the wheels are installed into it from outside."""

    folder: Path
    wheels: dict[str, Path]

    @classmethod
    def create(cls, folder: Path, wheels: dict[str, Path], *names: str) -> Self:
        """A fresh environment in `folder` with the named wheels."""
        venv.EnvBuilder(symlinks=True).create(folder)
        environment = cls(folder, wheels)
        environment.install(*names)
        return environment

    def run(self, *command: str, code: int = 0, timeout: float = 120) -> subprocess.CompletedProcess[str]:
        """Run a script of the environment, asserting its exit code; no network, no settings of the caller's Python."""
        clean = {key: value for key, value in os.environ.items() if not key.startswith(("PYTHON", "WAN_", "PYTEST"))}
        clean |= {"HF_HUB_OFFLINE": "1", "HOME": str(self.folder), "OMP_NUM_THREADS": "1"}
        script = self.folder / "bin" / command[0]
        done = subprocess.run(
            [script, *command[1:]], capture_output=True, text=True, cwd=self.folder, env=clean, timeout=timeout, check=False
        )
        assert done.returncode == code, f"{' '.join(command)} gave {done.returncode}, expected {code}\n{done.stdout}\n{done.stderr}"
        return done

    def pip(self, *arguments: str) -> None:
        python = self.folder / "bin" / "python"
        subprocess.run([sys.executable, "-m", "pip", "--python", python, *arguments], check=True, capture_output=True)

    def install(self, *names: str) -> None:
        """Install wheels, and link what they require from the environment of the tests."""
        _link(_required([self.wheels[name] for name in names]), self.folder)
        self.pip("install", "--no-index", "--no-deps", "--no-compile", *(str(self.wheels[name]) for name in names))

    def uninstall(self, name: str) -> None:
        self.pip("uninstall", "--yes", name)


def build_wheels(folder: Path) -> dict[str, Path]:
    """Wheels of the four packages and of the example plugins, built from the working tree into `folder`."""
    sources = [f"{ROOT}/packages/{name}" for name in PACKAGES] + [f"{ROOT}/examples/{name}" for name in EXAMPLES]
    command = [sys.executable, "-m", "pip", "wheel", "--no-index", "--no-deps", "--no-build-isolation", "-w", str(folder), *sources]
    built = subprocess.run(command, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    return {canonicalize_name(wheel.name.split("-")[0]): wheel for wheel in folder.glob("*.whl")}


def metadata(wheel: Path) -> dict[str, list[str]]:
    """The fields of a wheel's METADATA, each a list."""
    with zipfile.ZipFile(wheel) as archive:
        text = next(archive.read(name).decode() for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
    message = Parser().parsestr(text)
    return {key: message.get_all(key) or [] for key in message}


def _required(wheels: list[Path]) -> set[str]:
    """Names of all distributions that the wheels require, directly or not; the packages of this repository left out."""
    todo = [Requirement(text) for wheel in wheels for text in metadata(wheel).get("Requires-Dist", [])]
    todo = [requirement for requirement in todo if requirement.marker is None or requirement.marker.evaluate({"extra": ""})]
    seen: set[tuple[str, str]] = set()
    while todo:
        requirement = todo.pop()
        name, extras = canonicalize_name(requirement.name), sorted(requirement.extras) or [""]
        wanted = [extra for extra in extras if (name, extra) not in seen]
        seen |= {(name, extra) for extra in extras}
        if name in PACKAGES or not wanted:
            continue
        needs = [Requirement(text) for text in distribution(name).requires or []]
        todo += [need for need in needs if need.marker is None or any(need.marker.evaluate({"extra": extra}) for extra in wanted)]
    return {name for name, _ in seen} - set(PACKAGES)


def _link(names: set[str], folder: Path) -> None:
    site = next(folder.glob("lib/python*/site-packages"))
    for name in sorted(names):
        installed = distribution(name)
        for top in sorted({file.parts[0] for file in installed.files or ()} - {"..", "__pycache__"}):
            if not (site / top).exists():
                (site / top).symlink_to(Path(str(installed.locate_file(top))))

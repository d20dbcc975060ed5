"""Test modules of the packages, whose cases, configurations and references the parity page measures."""

from __future__ import annotations

import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType

PACKAGES = Path(__file__).parents[1] / "packages"


def load(package: str, name: str) -> ModuleType:
    """The module `packages/PACKAGE/tests/NAME.py`."""
    spec = spec_from_file_location(name, PACKAGES / package / "tests" / f"{name}.py")
    if spec is None or spec.loader is None:
        raise LookupError(f"no test module '{name}' in {package}")
    module = module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module

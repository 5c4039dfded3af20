"""The package as it is imported: `pyproject.toml` says which folder becomes which package."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

if sys.version_info >= (3, 11):
    import tomllib
else:
    tomllib = pytest.importorskip("tomli")

ROOT = Path(__file__).resolve().parent.parent
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
# top-level folder -> package, from the floor below to the one above
PACKAGES: dict[str, str] = {
    folder: package for package, folder in PROJECT["tool"]["setuptools"]["package-dir"].items()
}


def source_of(package: str) -> Path:
    """The folder in the repository that a package is made of."""
    for folder, name in reversed(PACKAGES.items()):
        if package == name or package.startswith(name + "."):
            return ROOT / folder / package[len(name) + 1 :].replace(".", "/")
    raise ValueError(f"{package}: no package of this project; they are {list(PACKAGES.values())}")


def module_of(path: Path) -> str:
    """The dotted name that a file of the project is imported as; a package's for `__init__.py`."""
    folder, *parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join([PACKAGES[folder], *(part for part in parts if part != "__init__")])

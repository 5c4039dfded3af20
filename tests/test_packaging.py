"""What is installed, declared and explained agrees."""

from __future__ import annotations

import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement

from .layout import PACKAGES, PROJECT, ROOT, module_of, source_of


@pytest.fixture(scope="module")
def project() -> dict[str, Any]:
    return PROJECT


def test_every_package_is_listed(project: dict[str, Any]) -> None:
    listed = set(project["tool"]["setuptools"]["packages"])
    found = {
        module_of(init) for folder in PACKAGES for init in (ROOT / folder).rglob("__init__.py")
    }
    assert listed == found


@pytest.mark.alone
def test_every_data_file_of_a_package_ships(project: dict[str, Any]) -> None:
    globs = project["tool"]["setuptools"]["package-data"]
    missing = []
    for package in project["tool"]["setuptools"]["packages"]:
        folder = source_of(package)
        shipped = {path for glob in globs.get(package, []) for path in folder.glob(glob)}
        # Only files in git: editors and runs leave others.
        done = subprocess.run(
            ["git", "ls-files", "."], cwd=folder, capture_output=True, text=True, check=False
        )
        if done.returncode != 0:
            pytest.skip("not a git checkout")
        for name in done.stdout.splitlines():
            path = folder / name
            owner = next((p for p in path.parents if (p / "__init__.py").exists()), None)
            if owner == folder and path.suffix != ".py" and path not in shipped:
                missing.append(path)
    assert missing == []


@pytest.mark.alone
@pytest.mark.parametrize(
    "module", ["vqguard", "vqguard.adapters", "vqguard.recipes", "vqguard.cli"]
)
def test_the_mapping_of_folders_works_away_from_the_repository(module: str, tmp_path: Path) -> None:
    script = f"import {module}, pathlib; print(pathlib.Path({module}.__file__).resolve())"
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert Path(done.stdout.strip()).name == "__init__.py"


@pytest.mark.alone
def test_importing_the_package_is_light(tmp_path: Path) -> None:
    script = (
        "import sys, vqguard\n"
        "print([m for m in ('torch', 'transformers', 'faiss', 'numpy') if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"


def test_the_program_is_installed() -> None:
    (entry,) = (e for e in metadata.entry_points(group="console_scripts") if e.name == "vqguard")
    assert entry.value == "vqguard.cli.main:main"
    assert callable(entry.load())


def test_what_is_installed_satisfies_what_is_declared(project: dict[str, Any]) -> None:
    for text in project["project"]["dependencies"]:
        requirement = Requirement(text)
        installed = metadata.version(requirement.name)
        assert requirement.specifier.contains(installed, prereleases=True), requirement


def test_every_dependency_is_explained_and_nothing_else(project: dict[str, Any]) -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    _, _, tables = text.partition("## Why each dependency is there")
    first, second = re.findall(r"(?:^\|.*\n)+", tables, re.MULTILINE)
    rows = [line.split("|")[1:-1] for line in first.splitlines()[2:]]
    explained = {cells[0].strip() for cells in rows if cells[1].strip()}
    assert explained == {Requirement(t).name for t in project["project"]["dependencies"]}
    for extra, requirements in project["project"]["optional-dependencies"].items():
        (row,) = (line for line in second.splitlines() if line.startswith(f"| `{extra}` |"))
        names = {Requirement(text).name for text in requirements} - {"vqguard"}
        assert [name for name in names if name not in row] == []


def test_the_changelog_has_the_version_or_unreleased_changes(project: dict[str, Any]) -> None:
    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    titles = re.findall(r"^## \[(.*?)\]", text, re.MULTILINE)
    assert titles[0] == "Unreleased" or titles[0] == project["project"]["version"]


def test_ci_runs_lint_and_tests_and_stops_at_the_first_failure() -> None:
    text = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    whole = text.replace("\\\n", " ")
    lines = [line for line in whole.splitlines() if line and not line.startswith("#")]
    assert lines[0] == "set -euo pipefail"
    assert lines[-3:-1] == ["make lint", "make test"]
    assert lines[-1].startswith("make test-lowest ")
    for name in re.findall(r"tests/\S+\.py", lines[-1]):
        assert (ROOT / name).is_file(), name

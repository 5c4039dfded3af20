"""Interpreters that have other people's tools: `make test-serve` makes them beside this one's."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / ".venv-tools"


def python_with(package: str) -> str:
    """The interpreter that can import a package; the test is skipped where there is none."""
    if find_spec(package) is not None:
        return sys.executable
    python = FOLDER / package / "bin" / "python"
    if not python.is_file():
        pytest.skip(f"{package} is not installed: make test-serve installs it")
    return str(python)


def run_tool(
    package: str, *arguments: str | Path, folder: Path | None = None, **environment: str
) -> str:
    """What a program says that needs `package`; it must end with 0."""
    done = subprocess.run(
        [python_with(package), *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        stdin=subprocess.DEVNULL,
        cwd=folder,
        env={
            **os.environ,
            "HF_HUB_OFFLINE": "1",
            "OMP_NUM_THREADS": "1",
            "NO_PROXY": "127.0.0.1",
            **environment,
        },
    )
    assert done.returncode == 0, f"{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    return done.stdout

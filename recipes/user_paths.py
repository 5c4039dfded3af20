"""Paths as people write them: `~`, environment variables, and beside the file that names them."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator


def expanded(path: Path) -> Path:
    """The path with `~` and environment variables filled in; unset ones stay as they are."""
    return Path(os.path.expandvars(path.expanduser()))


UserPath = Annotated[Path, AfterValidator(expanded)]
"""The type of a setting that is a path: `expanded` when it is read."""


def beside(file: Path, path: Path) -> Path:
    """A path that a file names: relative ones start from the file's folder."""
    return file.parent / path

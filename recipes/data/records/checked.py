"""What a pass over a data set found out, kept so that a resumed run need not look again."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from vqguard.errors import ConfigError
from vqguard.files import drafts, text_sha256
from vqguard.recipes.data.records.lazy import Facts
from vqguard.recipes.data.samples import Sample
from vqguard.text_files import parse_json

CheckSample = Callable[[Sample], None]
"""Raises `DataError` for a sample that cannot be trained on."""
NOWHERE = np.empty((0, 2), dtype=np.int64)
"""The places of records that are found by their number alone."""
_FACTS = ("numbers", "names", "pictured", "filmed")


@dataclass(frozen=True)
class Checked:
    """The usable records of one data set."""

    facts: Facts
    skipped: list[str]
    """What was left out, each with its reason."""
    places: NDArray[np.int64]
    """(m, 2): where each record is, for a reader that must know."""


@dataclass
class Checks:
    """How records are checked besides what their reader does, and what is known of them already."""

    check: CheckSample | None = None
    """What each sample must pass."""
    identity: str = ""
    """Changes with what `check` accepts."""
    known: dict[str, Checked] = field(default_factory=dict)
    """By the data's fingerprint: those that were kept, and those that were found since."""

    finished: bool = False
    """The run is over: what it found is taken, whether or not it decoded the pictures for it."""

    def key(self, data: Path, *settings: object) -> str:
        """A fingerprint of data: their files' names, sizes and times, and how they are read."""
        files = [(str(file), *_state(file)) for file in _files(data)]
        parts = [self.identity, str(data.absolute()), files, [str(value) for value in settings]]
        return text_sha256(json.dumps(parts))

    def save(self, path: Path) -> None:
        """Write down what is known."""
        arrays: dict[str, Any] = {}
        for key, checked in self.known.items():
            columns = {**vars(checked.facts), "places": checked.places}
            arrays |= {
                f"{key}.{name}": np.ascontiguousarray(column.astype(np.uint8))
                if column.dtype == np.bool_
                else np.ascontiguousarray(column)
                for name, column in columns.items()
            }
        skipped = {key: checked.skipped for key, checked in self.known.items()}
        with drafts(path) as (draft,):
            save_file(arrays, draft, metadata={"skipped": json.dumps(skipped)})

    def load(self, path: Path) -> None:
        """Read what another process or an earlier attempt wrote down; none or damaged: nothing."""
        if not path.is_file():
            return
        try:
            with safe_open(path, framework="np") as file:
                skipped = parse_json((file.metadata() or {})["skipped"], str(path), strict=False)
                for key, lines in skipped.items():
                    facts = [file.get_tensor(f"{key}.{name}") for name in _FACTS]
                    facts[2:] = [flags.astype(np.bool_) for flags in facts[2:]]
                    places = file.get_tensor(f"{key}.places")
                    self.known[key] = Checked(Facts(*facts), list(map(str, lines)), places)
        except (SafetensorError, OSError, KeyError, ConfigError, AttributeError):
            self.known = {}  # then the data are checked again


def _files(data: Path) -> Iterable[Path]:
    """The files that a data set is made of; images that are named by path are not among them."""
    if not data.is_dir():
        return [data]
    return sorted(Path(folder) / name for folder, _, names in os.walk(data) for name in names)


def _state(file: Path) -> tuple[int, int]:
    try:
        state = file.stat()
    except OSError:
        return (0, 0)
    return (state.st_size, state.st_mtime_ns)

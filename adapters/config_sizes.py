"""Whole numbers of a model's configuration, bounded before a class of transformers sees them.

Classes make lists and mappings of some of these when the configuration is read, and transformers'
Auto classes read it before any weight.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from vqguard.errors import ArtefactError

CONFIG = "config.json"
MAX_LAYERS = 4096
"""Of a number in `config.json` that counts layers or labels, each of which is a Python object
already when the configuration is read. The deepest models have some 130 layers."""
MAX_SIZE = 2**30
"""Of any other whole number there; vocabularies have 300 000, positions 10 million."""

_COUNTS = re.compile(r"layers|depth|blocks|labels|repeats|stages|nextn")


def require_sizes(config: Mapping[str, Any], origin: Path | str) -> None:
    """Check the whole numbers of a `config.json`, before a class of transformers sees them.

    Raises:
        ArtefactError: one is beyond `MAX_LAYERS` or `MAX_SIZE`, naming it and `origin`.
    """
    for path, number in numbers_in(config):
        counts = _COUNTS.search(path.rpartition(".")[2])
        most = MAX_LAYERS if counts else MAX_SIZE
        # a fraction that is no count is none of memory: rope_theta, say
        if abs(number) > most and (counts or isinstance(number, int)):
            raise ArtefactError(
                f"{origin}: {path} is {number:,}, at most {most:,} is accepted; restore the file"
            )


def numbers_in(value: Any, path: str = "") -> Iterator[tuple[str, int | float]]:
    """The numbers of a document with their dotted paths; those of a list have the list's."""
    if isinstance(value, Mapping):
        for key, part in value.items():
            yield from numbers_in(part, f"{path}.{key}" if path else str(key))
    elif isinstance(value, list | tuple):
        for part in value:
            yield from numbers_in(part, path)
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield path, value

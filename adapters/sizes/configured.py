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
from vqguard.text_files import read_json

CONFIG = "config.json"
GENERATION = "generation_config.json"
MAX_LAYERS = 1024
"""Of a number in `config.json` that counts layers, each of which is a Python object already when
the configuration is read. The deepest models have some 130."""
MAX_LABELS = 2**16
"""Of one that counts a classifier's labels, which are objects too; ImageNet has 21 843."""
MAX_BEAMS = 64
"""Of answers searched or given at a time; `generate` takes these from the folder's files."""
MAX_SIZE = 2**30
"""Of any other whole number there; vocabularies have 300 000, positions 10 million."""

_NAMED = (
    (re.compile(r"layers|depth|blocks|repeats|stages|nextn"), MAX_LAYERS),
    (re.compile(r"labels"), MAX_LABELS),
    (re.compile(r"num_beam|num_return_sequences"), MAX_BEAMS),
)


def require_sizes(config: Mapping[str, Any], origin: Path | str) -> None:
    """Check the whole numbers of a `config.json`, before a class of transformers sees them.

    Raises:
        ArtefactError: one is beyond its limit, naming it and `origin`.
    """
    for path, number in numbers_in(config):
        name = path.rpartition(".")[2]
        most = next((limit for names, limit in _NAMED if names.search(name)), MAX_SIZE)
        # a fraction that counts nothing asks for no memory: rope_theta, say
        if abs(number) > most and (most < MAX_SIZE or isinstance(number, int)):
            raise ArtefactError(
                f"{origin}: {path} is {number:,}, at most {most:,} is accepted; restore the file"
            )


def read_sizes(folder: Path, *, strict: bool = False) -> dict[str, Any]:
    """The `config.json` of a folder, whose numbers and those of its generation are bounded.

    `strict`: as `parse_json` takes it.

    Raises:
        ArtefactError: a file cannot be read, or asks for too much.
    """
    path, generation = folder / CONFIG, folder / GENERATION
    config = read_json(path, ArtefactError, strict=strict)
    if not isinstance(config, dict):
        raise ArtefactError(f"{path}: expected the configuration of a model; restore it")
    require_sizes(config, path)
    if generation.is_file():
        require_sizes(read_json(generation, ArtefactError, strict=False), generation)
    return config


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

"""What a large scan is cut into: shards, and lists of files; each is judged as a whole.

A unit is known by a digest of what it names and of the sizes and times of those files. So it is
found again after a kill, and one whose files have changed is another unit.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, Literal, TypeAlias

from vqguard.errors import ConfigError
from vqguard.files import text_sha256
from vqguard.images.image_files import LeftOut, files_below

FILES = 512
"""Files of a unit that lie in folders: some seconds of work, which is what a kill costs."""
Kind: TypeAlias = Literal["files", "webdataset", "parquet"]
_SHARDS: dict[str, Kind] = {".tar": "webdataset", ".parquet": "parquet"}


@dataclass(frozen=True)
class Unit:
    """Pictures that are judged together, and whose verdicts are written as one file."""

    kind: Kind
    paths: tuple[str, ...]
    """The files; of a shard its one."""
    digest: str
    """Names it: SHA-256 of kind, paths, sizes and times."""


def units_of(named: Iterable[Path], left_out: LeftOut) -> list[Unit]:
    """The units of files and folders, each file in one of them; in a fixed order.

    A file that ends in `.tar` is a WebDataset shard, one in `.parquet` a table; both are units of
    their own. All others are listed, `FILES` at a time: their unit finds out what is a picture.

    Args:
        named: files, and folders that are searched with all below.
        left_out: called with a folder that is not searched again, and why.

    Raises:
        ImageError: a folder cannot be listed.
    """
    listed = chain.from_iterable(_files(path, left_out) for path in named)
    loose: list[str] = []
    units: list[Unit] = []
    for name in dict.fromkeys(listed):
        kind = _SHARDS.get(os.path.splitext(name)[1].lower())  # noqa: PTH122 - millions of names
        if kind is None:
            loose.append(name)
        else:
            units.append(_unit(kind, [name]))
    cut = range(0, len(loose), FILES)
    return [*units, *(_unit("files", loose[start : start + FILES]) for start in cut)]


def _files(path: Path, left_out: LeftOut) -> Iterator[str]:
    if not path.is_dir():
        yield str(path)
        return
    yield from sorted(map(str, files_below(path, left_out)), key=_order)


def _order(name: str) -> str:
    """Sorts a folder's files by its parts."""
    return name.replace(os.sep, "\0")


def _unit(kind: Kind, paths: Sequence[str]) -> Unit:
    known = [kind, [[path, *_state(path)] for path in paths]]
    return Unit(kind, tuple(paths), text_sha256(json.dumps(known)))


def _state(path: str) -> tuple[Any, ...]:
    try:
        status = os.stat(path)  # noqa: PTH116 - millions of names
    except (OSError, ValueError):  # opening it says what is wrong
        return ()
    return (status.st_size, status.st_mtime_ns)


def refuse_inside(output: Path, named: Iterable[Path]) -> None:
    """Refuse an output folder in a folder that is scanned: its files would be scanned too.

    Raises:
        ConfigError: it lies there.
    """
    place = output.resolve()
    for path in named:
        if path.is_dir() and place.is_relative_to(path.resolve()):
            raise ConfigError(
                f"{output} lies in {path}, which is scanned: name an --output outside it"
            )

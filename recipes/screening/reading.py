"""The files of a unit, one at a time: from folders, WebDataset shards and parquet.

Shards come from outside. A tar is read by `TarRoot`, within its limits. Of parquet a few rows are
unpacked at a time; a page of it can take 2 GB, which is what the format has room for.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any, TypeAlias

from pyarrow import parquet

from vqguard.bounded import open_regular
from vqguard.errors import DataError, first_line
from vqguard.images.image_files import OTHER_FORMAT, PREFIX, why_left_out, why_no_image
from vqguard.names import nearest
from vqguard.recipes.data.image_roots import MAX_BYTES, TarRoot
from vqguard.recipes.screening.judging import DiskFile, ReadFile, UnusableFile
from vqguard.recipes.screening.units import Unit

IMAGE = "image"
"""The column of a table that holds its pictures, where none is named."""
SIDE = frozenset({".cls", ".json", ".txt"})
"""Endings of what stands beside the picture of a WebDataset's sample, and is no picture."""
_ROWS = 16  # unpacked at a time

AnyFile: TypeAlias = DiskFile | ReadFile | UnusableFile
NotPicture: TypeAlias = tuple[str, str]
"""A file's name, and why it is no picture."""


def files_of(unit: Unit, column: str = IMAGE) -> Iterator[AnyFile | NotPicture]:
    """Every file, member or row of a unit, once and in its order.

    What stands beside a sample's picture (`SIDE`) is left out. A shard that cannot be read, or not
    to its end, is an `UnusableFile` in the place of what could not be.

    Args:
        unit: as `units_of` made it.
        column: of tables: bytes, or Hugging Face's pictures.
    """
    if unit.kind == "files":
        yield from map(_file, map(Path, unit.paths))
        return
    (path,) = map(Path, unit.paths)
    read = _members(path) if unit.kind == "webdataset" else _rows(path, column)
    try:
        yield from read
    except DataError as error:
        yield UnusableFile(str(path), str(error))


def _file(path: Path) -> AnyFile | NotPicture:
    reason = why_left_out(path)
    return DiskFile(path) if reason is None else _without(str(path), reason)


def _without(name: str, reason: str) -> AnyFile | NotPicture:
    # other programs open it, so it is not passed over as something else
    return UnusableFile(name, f"{name}: {reason}") if reason == OTHER_FORMAT else (name, reason)


def _members(path: Path) -> Iterator[AnyFile | NotPicture]:
    """Raises DataError for a file that is no tar."""
    root = TarRoot(path)
    for refused, why in root.refused.items():
        yield UnusableFile(root.where(refused), f"{root.where(refused)} {why}")
    for member in root.names:
        name = root.where(member)
        try:
            with root.stream(member) as stream:
                reason = why_no_image(member, stream.read(PREFIX))
            if reason is None:
                yield ReadFile(name, root.read(member))
            elif PurePosixPath(member).suffix.lower() not in SIDE or reason == OTHER_FORMAT:
                yield _without(name, reason)
        except (DataError, OSError) as error:
            yield UnusableFile(name, f"{name}: {error}")


def _rows(path: Path, column: str) -> Iterator[AnyFile]:
    """Raises DataError for a file that is no parquet, has no such column or is damaged."""
    number = 0
    try:
        with open_regular(path) as file:
            table = parquet.ParquetFile(file, buffer_size=2**20)
            names = table.schema_arrow.names
            if column not in names:
                raise DataError(
                    f"{path}: has no column {column!r}{nearest(column, names)}. Name the pictures' "
                    "column with --image-column"
                )
            for batch in table.iter_batches(_ROWS, columns=[column]):
                for cell in batch.column(0):
                    yield _cell(f"{path}: row {number}", cell.as_py())
                    number += 1
    except DataError:
        raise
    except Exception as error:  # pyarrow raises nearly anything on crafted files
        raise DataError(
            f"{path}: cannot be read from row {number} on: {first_line(error)}"
        ) from error


def _cell(name: str, content: Any) -> AnyFile:
    if isinstance(content, dict):  # as the library `datasets` writes pictures
        content = content.get("bytes")
    if not isinstance(content, bytes):
        return UnusableFile(name, f"{name}: holds no picture's bytes ({type(content).__name__})")
    if len(content) > MAX_BYTES:
        return UnusableFile(
            name, f"{name}: {len(content):,} bytes, at most {MAX_BYTES:,} are taken"
        )
    return ReadFile(name, content)

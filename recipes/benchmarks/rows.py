"""The records of a benchmark's file as rows, whichever form they have."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from vqguard.bounded import read_text
from vqguard.errors import DataError
from vqguard.recipes.benchmarks.layout import Form
from vqguard.recipes.data.records.json_entries import JsonEntries
from vqguard.text_files import read_json

MAX_FILE = 256 * 2**20
"""Bytes of a file of records; COCO's captions of 2014 have 65 MB."""
Row = dict[str, Any]
NUMBER, FILE, KEY = "row", "file", "key"
"""Columns that every row has: its number, its file's stem, and its key where it has one."""


def read_rows(path: Path, form: Form) -> Iterator[Row]:
    """The rows of a file, in order.

    Raises:
        DataError: a file that is not of this form.
    """
    for number, (key, row) in enumerate(_READERS[form](path)):
        if not isinstance(row, dict):
            raise DataError(f"{path}, record {number}: expected an object, got {row!r:.80}")
        yield {NUMBER: number, FILE: path.stem, KEY: key if key is not None else number, **row}


def _csv(path: Path) -> Iterator[tuple[None, Row]]:
    text = read_text(path, MAX_FILE, DataError).removeprefix("\ufeff")
    reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    try:
        for row in reader:
            if None in row or None in row.values():
                raise DataError(
                    f"{path}, line {reader.line_num}: expected {len(reader.fieldnames or ())} "
                    "fields, as in the header; save the file again as its authors publish it"
                )
            yield None, row
    except csv.Error as error:
        raise DataError(f"{path}, line {reader.line_num}: no line of CSV ({error})") from error


def _list(path: Path) -> Iterator[tuple[None, Any]]:
    for entry in JsonEntries(path):
        yield None, entry.value


def _mapping(path: Path) -> Iterator[tuple[str, Any]]:
    document = read_json(path, DataError, MAX_FILE, strict=False)
    if not isinstance(document, dict):
        raise DataError(f"{path}: expected an object of records by their ids")
    yield from document.items()


def _coco_captions(path: Path) -> Iterator[tuple[Any, Row]]:
    """COCO's images, each with all of its captions (github.com/cocodataset/cocoapi)."""
    document = read_json(path, DataError, MAX_FILE, strict=False)
    found: dict[Any, list[Any]] = {}
    try:
        for annotation in document["annotations"]:
            found.setdefault(annotation["image_id"], []).append(annotation["caption"])
        images = [(image["id"], image["file_name"]) for image in document["images"]]
    except (KeyError, TypeError) as error:
        raise DataError(
            f"{path}: expected COCO's captions, 'images' (id, file_name) and 'annotations' "
            f"(image_id, caption); {error} does not fit"
        ) from error
    for number, name in images:
        yield number, {"image_id": number, "file_name": name, "captions": found.get(number, [])}


_READERS: dict[Form, Callable[[Path], Iterator[tuple[Any, Any]]]] = {
    "csv": _csv,
    "list": _list,
    "mapping": _mapping,
    "coco_captions": _coco_captions,
}

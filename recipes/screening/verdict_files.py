"""Verdicts on disk: one parquet file a unit, written whole or not at all, under the unit's digest.

DIR/_scan.json          which map and model judged, and how (libraries of tables pass it over)
DIR/<digest>.parquet    a row for every file of the unit
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
from pyarrow import parquet

from vqguard.errors import ArtefactError, ConfigError
from vqguard.files import DRAFT, drafts, require_empty
from vqguard.recipes.screening.counts import AMBIGUOUS, FLAGGED, UNKNOWN, UNREADABLE, Counts
from vqguard.recipes.screening.units import Unit
from vqguard.strict import StrictConfig

SCAN = "_scan.json"
_NAME = re.compile(r"[0-9a-f]{64}\.parquet")
_ROWS = 4096  # held before they are written

_REGION = pa.struct(
    [
        ("part", pa.string()),
        ("index", pa.int32()),
        ("top", pa.float64()),
        ("left", pa.float64()),
        ("bottom", pa.float64()),
        ("right", pa.float64()),
    ]
)
_REASON = pa.struct(
    [
        ("category", pa.string()),
        ("score", pa.float64()),
        ("threshold", pa.float64()),
        ("token", pa.int32()),
        ("semantic_code", pa.int32()),
        ("action", pa.string()),
        ("map_version", pa.string()),
        ("region", _REGION),
        ("also", pa.list_(pa.string())),
    ]
)
SCHEMA = pa.schema(
    [
        pa.field("image", pa.string(), nullable=False),
        pa.field("verdict", pa.string(), nullable=False),
        ("category", pa.string()),
        ("probability", pa.float64()),
        ("semantic_code", pa.int32()),
        ("quantised", pa.bool_()),
        ("reason", _REASON),
        ("ambiguous", pa.string()),
        ("error", pa.string()),
    ]
)
"""As a line of `vqguard scan --json`, but that `ambiguous` has the words on a file that was refused
as ambiguous too."""


@dataclass(frozen=True)
class ScanFile(StrictConfig):
    """`_scan.json`: who judged, and how."""

    schema: Literal[1]
    map_version: str
    model: str
    """`adapters.storage.manifest.model_checksum` of the run."""
    ambiguous: str
    image_column: str


def claim(folder: Path, scan: ScanFile, *, resume: bool) -> None:
    """Begin a scan in an empty folder, or go on with one that was begun there in the same way.

    Raises:
        ConfigError: the folder holds something else, or verdicts of another map, model or setting.
    """
    place = folder / SCAN
    if not (resume and place.is_file()):
        require_empty(folder, "Go on with --resume, or name another --output.")
        scan.to_json(place)
        return
    before = ScanFile.from_json(place)
    if before != scan:
        raise ConfigError(
            f"{folder} holds verdicts of another map, model, --ambiguous or --image-column than "
            "this run's: name another --output"
        )


def place_of(folder: Path, unit: Unit) -> Path:
    """Where a unit's verdicts are, once they are there."""
    return folder / f"{unit.digest}.parquet"


def remove_others(folder: Path, units: Iterable[Unit]) -> None:
    """Remove the verdicts of files that have changed since, or are gone, and killed drafts."""
    wanted = {place_of(folder, unit) for unit in units}
    for place in folder.iterdir():
        ours = _NAME.fullmatch(place.name) or place.name.startswith(DRAFT)
        if ours and place not in wanted:
            place.unlink()


def write_rows(place: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Write a unit's verdicts: what is not whole is not there. Raises OSError."""
    rows = iter(rows)
    with (
        drafts(place) as (draft,),
        parquet.ParquetWriter(draft, SCHEMA, compression="zstd") as writer,
    ):
        while held := list(islice(rows, _ROWS)):
            writer.write_table(pa.Table.from_pylist(list(map(_storable, held)), schema=SCHEMA))


def _storable(row: dict[str, Any]) -> dict[str, Any]:
    """A row whose texts are UTF-8: names of files need not be."""
    return {
        name: value.encode(errors="backslashreplace").decode() if isinstance(value, str) else value
        for name, value in row.items()
    }


def count(folder: Path, units: Iterable[Unit]) -> Counts:
    """What stands in the verdicts of all units.

    Raises:
        ArtefactError: a unit has none, or they cannot be read.
    """
    words: Counter[str] = Counter()
    ambiguous = 0
    for unit in units:
        place = place_of(folder, unit)
        try:
            table = parquet.read_table(place, columns=["verdict", "ambiguous"])
        except (OSError, ValueError) as error:
            raise ArtefactError(
                f"{place} cannot be read ({error}): remove it, and go on with --resume"
            ) from error
        for pair in table.column("verdict").value_counts().to_pylist():
            words[pair["values"]] += pair["counts"]
        ambiguous += table.num_rows - table.column("ambiguous").null_count
    unread = {UNREADABLE, UNKNOWN}
    return Counts(
        judged=sum(number for word, number in words.items() if word not in unread),
        flagged=words[FLAGGED] + words[AMBIGUOUS],
        ambiguous=ambiguous,
        bad=words[UNREADABLE],
        unknown=words[UNKNOWN],
    )

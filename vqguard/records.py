"""The record of every number: one measurement, one JSON object, always the same keys.

Reports, attack suites and benchmarks write lists of these and are rendered from them, so
a number on a page can be traced to its sample size, its threat model and its command.
"""

from __future__ import annotations

import json
import platform
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from importlib import metadata as distributions
from numbers import Integral, Real
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn, TypeAlias

from pydantic import BeforeValidator, Field, ValidationInfo, field_validator

from vqguard.bounded import read_bytes
from vqguard.errors import ConfigError, DataError
from vqguard.files import replace_text
from vqguard.names import nearest
from vqguard.strict import Must, StrictData
from vqguard.text_files import parse_json

__all__ = [
    "ATTACK_METRICS",
    "RATE_METRICS",
    "SCHEMA",
    "SECTIONS",
    "UTILITY_METRICS",
    "Record",
    "RecordFile",
    "read_record_file",
    "read_records",
    "select",
    "versions",
    "write_records",
]

SCHEMA = 1
MAX_RECORDS = 64 * 2**20
"""Bytes of a record file: 100 000 records have 40 MB."""

UTILITY_METRICS = (
    "naming_single",
    "naming_recall",
    "count",
    "colour",
    "presence",
    "text_only",
    "refusal",
    "benign_compliance",
)
"""What a model can do, in the order in which it is shown."""

RATE_METRICS = frozenset({*UTILITY_METRICS, "dsr", "fpr", "asr", "unfamiliar", "called_toxic"})
"""Metrics that are shares of a sample, in [0, 1]; each needs an interval."""

ATTACK_METRICS = frozenset({"asr", "dsr"})
"""Metrics that mean nothing without the attacker they were measured against."""

SECTIONS = ("series", "semantic_codes", "pictures", "mistakes", "alarms")
"""What a record file may hold besides its records: curves, tables, pictures, mistakes and doubts to
show."""

Scalar: TypeAlias = "str | int | float | bool"


def _plain(value: object) -> object:
    """Other libraries' numbers, which JSON cannot write, as Python's."""
    if isinstance(value, bool) or not isinstance(value, Real):
        return value
    return int(value) if isinstance(value, Integral) else float(value)


_ANY_NUMBER = BeforeValidator(_plain)
_Text: TypeAlias = Annotated[str, Field(min_length=1), Must("must be a non-empty string")]
_Finite: TypeAlias = Annotated[float, _ANY_NUMBER, Must("must be a finite number")]
_End: TypeAlias = Annotated[
    float | None, _ANY_NUMBER, Must("and the other end must both be finite or both None")
]
_Size: TypeAlias = Annotated[
    int, Field(ge=1), _ANY_NUMBER, Must("must be an integer of at least 1")
]
_Seed: TypeAlias = Annotated[
    int, Field(ge=0), _ANY_NUMBER, Must("must be an integer of at least 0")
]
_Setting: TypeAlias = Annotated[
    str | int | float | bool,
    _ANY_NUMBER,
    Must("must be a string, a finite number or a boolean"),
]
_Condition: TypeAlias = Annotated[
    Mapping[Annotated[str, Must("must be strings")], _Setting], Must("must be a mapping")
]
_Versions: TypeAlias = Annotated[
    Mapping[str, str], Field(min_length=1), Must("must map package names to versions")
]


@dataclass(frozen=True)
class Record(StrictData):
    """One measurement.

    Raises:
        DataError: listing everything that is wrong with the record.
    """

    metric: _Text
    """What was measured: `asr`, `dsr`, `latency_ratio`, ..."""
    subject: _Text
    """What it was measured on: `base`, `guarded`, `quantiser_removed`, `finetuned_control`, or a
    peer's name."""
    condition: _Condition
    """Settings, flat: `attack`, `gradient`, `eps_255` (pixel budget in 1/255), `category`,
    `distractors`, `level`, `stage`, ..."""
    threat_model: _Text
    """Name of the threat model; "none" where no attacker acts. Attack metrics must name one."""
    value: _Finite
    """The number; rates lie in [0, 1]."""
    n: _Size
    """Sample size, at least 1."""
    low: _End
    """Lower end of the 95 % interval, None where there is none."""
    high: _End
    """Upper end of it."""
    seed: _Seed
    """Seed of the measurement."""
    command: _Text
    """The command that makes this number again."""
    versions: _Versions
    """Package name to version, see `versions()`."""

    @property
    def is_rate(self) -> bool:
        """Whether the value is a share of a sample, in [0, 1]."""
        return _is_rate(self.metric)

    @classmethod
    def from_dict(cls, data: object) -> Record:
        """The inverse of `to_dict`; keys must match exactly.

        Raises:
            DataError: if it is not a mapping, keys are unknown or missing, or values are
                not valid.
        """
        return super().from_dict(data)

    @classmethod
    def _refuse(cls, data: Any, problems: list[str]) -> NoReturn:
        if not isinstance(data, Mapping):
            raise DataError(f"a record must be a JSON object, got {type(data).__name__}")
        name = f"{data.get('metric')!r} of {data.get('subject')!r}"
        raise DataError(f"record {name} is not valid: " + "; ".join(problems))

    @field_validator("threat_model")
    @classmethod
    def _names_the_attacker(cls, name: str, known: ValidationInfo) -> str:
        metric = known.data.get("metric")
        if metric in ATTACK_METRICS and name == "none":
            raise ValueError(f'{metric} needs its threat model, got "none"')
        return name

    @field_validator("value")
    @classmethod
    def _is_a_share(cls, value: float, known: ValidationInfo) -> float:
        metric = known.data.get("metric", "")
        if _is_rate(metric) and not 0 <= value <= 1:
            raise ValueError(f"{metric} is a rate and must lie in 0..1, got {value!r}")
        return value

    @field_validator("high")
    @classmethod
    def _is_an_interval(cls, high: float | None, known: ValidationInfo) -> float | None:
        if not {"metric", "value", "low"} <= known.data.keys():
            return high  # refused already
        metric, value, low = (known.data[name] for name in ("metric", "value", "low"))
        if (low is None) != (high is None):
            raise ValueError(f"low and high must both be finite or both None, got {low}, {high}")
        if low is None and _is_rate(metric):
            raise ValueError(f"{metric} is a rate and needs low and high (see vqguard.intervals)")
        if low is not None and not low <= value <= high:
            raise ValueError(f"low <= value <= high does not hold: {low}, {value}, {high}")
        return high


@dataclass(frozen=True)
class RecordFile:
    """What a record file holds: its records, the run's metadata and things to show.

    `series`, `semantic_codes`, `pictures` and `mistakes` are described at
    `vqguard.recipes.report.page`, `alarms` at `vqguard.recipes.attacking.alarms`.
    """

    records: list[Record]
    metadata: dict[str, Any]
    sections: dict[str, Any]


_List: TypeAlias = Annotated[list[Any], Must("must be a list")]


@dataclass(frozen=True)
class _Document(StrictData):
    schema: Literal[1]
    metadata: dict[str, Any]
    records: list[Record]
    series: dict[str, Any] = field(default_factory=dict)
    semantic_codes: _List = field(default_factory=list)
    pictures: _List = field(default_factory=list)
    mistakes: _List = field(default_factory=list)
    alarms: _List = field(default_factory=list)


def write_records(
    path: Path | str,
    records: Iterable[Record],
    metadata: Mapping[str, Any],
    sections: Mapping[str, Any] | None = None,
) -> None:
    """Writes a record file, whole or not at all.

    Args:
        path: the JSON file; its folder is made if missing.
        records: the measurements.
        metadata: JSON-ready facts about the run.
        sections: JSON-ready things of `SECTIONS`, where there are any.

    Raises:
        DataError: if a section is unknown, or a value cannot be written as strict JSON
            (NaN and infinity cannot).
        OSError: if the disk is full or the folder cannot be written; an older file of that
            name is then still there.
    """
    path = Path(path)
    extra = dict(sections or {})
    for name in extra:
        if name not in SECTIONS:
            raise DataError(
                f"unknown section {name!r}.{nearest(name, SECTIONS)} Expected one of {SECTIONS}."
            )
    document = {
        "schema": SCHEMA,
        "metadata": dict(metadata),
        "records": [record.to_dict() for record in records],
        **extra,
    }
    try:
        text = json.dumps(document, indent=1, allow_nan=False, ensure_ascii=False)
    except (TypeError, ValueError) as error:
        raise DataError(
            f"cannot write {path} as JSON: {error}; use plain finite numbers, strings, lists "
            "and mappings in metadata and sections"
        ) from error
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_text(path, text + "\n")


def read_record_file(path: Path | str) -> RecordFile:
    """Reads a record file with everything in it.

    Raises:
        DataError: naming the file and what is wrong: missing, not JSON, another schema, a
            section of the wrong type, or a record that is not valid (all of them listed).
    """
    path = Path(path)
    try:
        text = read_bytes(path, MAX_RECORDS, DataError).decode("utf-8")
        document = parse_json(text, str(path))
    except (UnicodeDecodeError, ConfigError) as error:
        raise DataError(
            f"{path} is not a record file: {error}; write it again with the command that made it"
        ) from error
    if not isinstance(document, dict) or document.get("schema") != SCHEMA:
        schema = document.get("schema") if isinstance(document, dict) else type(document).__name__
        raise DataError(
            f"{path}: expected a JSON object with schema {SCHEMA}, got {schema!r}; this version "
            "reads only that schema, so write the file again or use the version that made it"
        )
    try:
        content = _Document.from_dict(document)
    except ConfigError as error:
        raise DataError(f"{path} is not valid:\n  " + "\n  ".join(error.problems)) from error
    sections = {name: document[name] for name in SECTIONS if name in document}
    return RecordFile(content.records, content.metadata, sections)


def read_records(path: Path | str) -> list[Record]:
    """Reads the records of a file. Raises as `read_record_file`."""
    return read_record_file(path).records


def select(
    records: Iterable[Record],
    metric: str | None = None,
    subject: str | None = None,
    **condition: Scalar,
) -> list[Record]:
    """The records with this metric, this subject and at least these conditions, in order."""
    return [
        record
        for record in records
        if metric in (None, record.metric)
        and subject in (None, record.subject)
        and all(k in record.condition and record.condition[k] == v for k, v in condition.items())
    ]


def versions() -> dict[str, str]:
    """Versions for a record, read from package metadata: nothing heavy is imported."""
    packages = {"python": platform.python_version()}
    for name in ("torch", "transformers", "vqguard"):
        try:
            packages[name] = distributions.version(name)
        except distributions.PackageNotFoundError:
            packages[name] = "not installed"
    return packages


def _is_rate(metric: str) -> bool:
    return metric in RATE_METRICS or metric.endswith("_rate")

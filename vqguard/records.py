"""The record of every number: one measurement, one JSON object, always the same keys.

Reports, attack suites and benchmarks write lists of these and are rendered from them, so
a number on a page can be traced to its sample size, its threat model and its command.
"""

from __future__ import annotations

import json
import math
import platform
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from importlib import metadata as distributions
from numbers import Integral, Real
from pathlib import Path
from typing import Any, TypeAlias, cast

from vqguard.errors import DataError
from vqguard.files import replace_text
from vqguard.names import nearest

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

RATE_METRICS = frozenset({*UTILITY_METRICS, "dsr", "fpr", "asr"})
"""Metrics that are shares of a sample, in [0, 1]; each needs an interval."""

ATTACK_METRICS = frozenset({"asr", "dsr"})
"""Metrics that mean nothing without the attacker they were measured against."""

SECTIONS = ("series", "semantic_codes", "pictures")
"""What a record file may hold besides its records: curves, tables and pictures to show."""

Scalar: TypeAlias = "str | int | float | bool"


@dataclass(frozen=True)
class Record:
    """One measurement.

    Attributes:
        metric: what was measured (`asr`, `dsr`, `latency_ratio`, ...).
        subject: what it was measured on: `base`, `guarded`, `quantiser_removed`,
            `finetuned_control`, or a peer's name.
        condition: flat mapping of settings, such as `attack`, `gradient`, `eps_255`
            (pixel budget in 1/255), `category`, `distractors`, `level`, `stage`.
        threat_model: name of the threat model; "none" where no attacker acts. Attack
            metrics must name one.
        value: the number; rates lie in [0, 1].
        n: sample size, at least 1.
        low: lower end of the 95 % interval, None where there is none.
        high: upper end of the 95 % interval, None where there is none.
        seed: seed of the measurement.
        command: the command that makes this number again.
        versions: package name to version, see `versions()`.

    Raises:
        DataError: listing everything that is wrong with the record.
    """

    metric: str
    subject: str
    condition: Mapping[str, Scalar]
    threat_model: str
    value: float
    n: int
    low: float | None
    high: float | None
    seed: int
    command: str
    versions: Mapping[str, str]

    def __post_init__(self) -> None:
        problems = [*self._check_texts(), *self._check_mappings(), *self._check_numbers()]
        if problems:
            name = f"{self.metric!r} of {self.subject!r}"
            raise DataError(f"record {name} is not valid: " + "; ".join(problems))
        # Plain Python numbers and own copies: JSON cannot write numpy scalars, and the
        # caller may go on using its mappings.
        put = object.__setattr__
        put(self, "value", float(self.value))
        put(self, "low", None if self.low is None else float(self.low))
        put(self, "high", None if self.high is None else float(self.high))
        put(self, "n", int(self.n))
        put(self, "seed", int(self.seed))
        put(self, "condition", {k: _plain(v) for k, v in self.condition.items()})
        put(self, "versions", dict(self.versions))

    @property
    def is_rate(self) -> bool:
        """Whether the value is a share of a sample, in [0, 1]."""
        return self.metric in RATE_METRICS or self.metric.endswith("_rate")

    def to_dict(self) -> dict[str, Any]:
        """The record as JSON-ready values, keys in the order of the attributes."""
        data = {field.name: getattr(self, field.name) for field in fields(self)}
        return {k: dict(v) if isinstance(v, Mapping) else v for k, v in data.items()}

    @classmethod
    def from_dict(cls, data: object) -> Record:
        """The inverse of `to_dict`; keys must match exactly.

        Raises:
            DataError: if it is not a mapping, keys are unknown or missing, or values are
                not valid.
        """
        if not isinstance(data, Mapping):
            raise DataError(f"a record must be a JSON object, got {type(data).__name__}")
        names = [field.name for field in fields(cls)]
        problems = [
            f"unknown key {key!r}.{nearest(str(key), names)}" for key in data if key not in names
        ]
        problems += [f"missing key {name!r}" for name in names if name not in data]
        if problems:
            raise DataError(f"record {data.get('metric')!r} is not valid: " + "; ".join(problems))
        return cls(**cast("dict[str, Any]", dict(data)))

    def _check_texts(self) -> Iterable[str]:
        for name in ("metric", "subject", "threat_model", "command"):
            text = getattr(self, name)
            if not isinstance(text, str) or not text:
                yield f"{name} must be a non-empty string, got {text!r}"
        if self.metric in ATTACK_METRICS and self.threat_model == "none":
            yield f'{self.metric} needs its threat model, got "none"'

    def _check_mappings(self) -> Iterable[str]:
        condition: object = self.condition
        if isinstance(condition, Mapping):
            for key, value in condition.items():
                if not isinstance(key, str):
                    yield f"condition keys must be strings, got {key!r}"
                if not isinstance(value, str | bool) and not _is_finite(value):
                    yield (
                        f"condition {key!r} must be a string, a finite number or a boolean, "
                        f"got {value!r}"
                    )
        else:
            yield f"condition must be a mapping, got {condition!r}"
        found: object = self.versions
        pairs = found.items() if isinstance(found, Mapping) else ()
        if not pairs or not all(isinstance(x, str) for pair in pairs for x in pair):
            yield f"versions must map package names to versions, got {found!r}"

    def _check_numbers(self) -> Iterable[str]:
        for name, least in (("n", 1), ("seed", 0)):
            number: object = getattr(self, name)
            if isinstance(number, bool) or not isinstance(number, Integral) or number < least:
                yield f"{name} must be an integer of at least {least}, got {number!r}"
        if not _is_finite(self.value):
            yield f"value must be a finite number, got {self.value!r}"
            return
        if self.is_rate and not 0 <= self.value <= 1:
            yield f"{self.metric} is a rate and must lie in 0..1, got {self.value!r}"
        if self.low is None and self.high is None:
            if self.is_rate:
                yield f"{self.metric} is a rate and needs low and high (see vqguard.intervals)"
        elif not _is_finite(self.low) or not _is_finite(self.high):
            yield f"low and high must both be finite or both None, got {self.low!r}, {self.high!r}"
        elif not cast(float, self.low) <= self.value <= cast(float, self.high):
            yield f"low <= value <= high does not hold: {self.low}, {self.value}, {self.high}"


@dataclass(frozen=True)
class RecordFile:
    """What a record file holds: its records, the run's metadata and things to show.

    `series`, `semantic_codes` and `pictures` are described at `vqguard.recipes.report.page`.
    """

    records: list[Record]
    metadata: dict[str, Any]
    sections: dict[str, Any]


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
        sections: JSON-ready `series`, `semantic_codes` and `pictures`, where there are any.

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
        document = json.loads(path.read_text(encoding="utf-8"), parse_constant=_refuse_constant)
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise DataError(
            f"{path} is not a record file: {error}; write it again with the command that made it"
        ) from error
    if not isinstance(document, dict) or document.get("schema") != SCHEMA:
        found = document.get("schema") if isinstance(document, dict) else type(document).__name__
        raise DataError(
            f"{path}: expected a JSON object with schema {SCHEMA}, got {found!r}; this version "
            "reads only that schema, so write the file again or use the version that made it"
        )
    kinds: dict[str, type] = {
        "metadata": dict,
        "records": list,
        "series": dict,
        "semantic_codes": list,
        "pictures": list,
    }
    problems = [
        f"unknown key {key!r}.{nearest(str(key), kinds)}"
        for key in document
        if key != "schema" and key not in kinds
    ]
    for key, kind in kinds.items():
        if key in document and not isinstance(document[key], kind):
            problems.append(f"{key} must be a {'list' if kind is list else 'JSON object'}")
        elif key not in document and key not in SECTIONS:
            problems.append(f"missing key {key!r}")
    records: list[Record] = []
    if not problems:
        for index, data in enumerate(document["records"]):
            try:
                records.append(Record.from_dict(data))
            except DataError as error:
                problems.append(f"records[{index}]: {error}")
    if problems:
        raise DataError(f"{path} is not valid:\n  " + "\n  ".join(problems))
    sections = {name: document[name] for name in SECTIONS if name in document}
    return RecordFile(records, document["metadata"], sections)


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
    found = {"python": platform.python_version()}
    for name in ("torch", "transformers", "vqguard"):
        try:
            found[name] = distributions.version(name)
        except distributions.PackageNotFoundError:
            found[name] = "not installed"
    return found


def _is_finite(value: object) -> bool:
    return not isinstance(value, bool) and isinstance(value, Real) and math.isfinite(value)


def _plain(value: object) -> Scalar:
    if isinstance(value, str | bool):
        return value
    return int(value) if isinstance(value, Integral) else float(cast(float, value))


def _refuse_constant(name: str) -> float:
    raise ValueError(f"{name} is not a number that JSON knows")

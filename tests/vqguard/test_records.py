"""Records: validation, round trips, the file format and what survives a failed write."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vqguard.errors import DataError
from vqguard.intervals import wilson
from vqguard.records import (
    RATE_METRICS,
    Record,
    read_record_file,
    read_records,
    select,
    versions,
    write_records,
)

GOLDEN = """\
{
 "schema": 1,
 "metadata": {
  "title": "golden"
 },
 "records": [
  {
   "metric": "asr",
   "subject": "guarded",
   "condition": {
    "attack": "universal",
    "eps_255": 16
   },
   "threat_model": "paper",
   "value": 0.25,
   "n": 4,
   "low": 0.05,
   "high": 0.7,
   "seed": 3,
   "command": "vqguard retrofit",
   "versions": {
    "python": "3.11.2"
   }
  }
 ],
 "pictures": []
}
"""


def make(**changes: Any) -> Record:
    data: dict[str, Any] = {
        "metric": "asr",
        "subject": "guarded",
        "condition": {"attack": "universal", "eps_255": 16},
        "threat_model": "paper",
        "value": 0.25,
        "n": 4,
        "low": 0.05,
        "high": 0.7,
        "seed": 3,
        "command": "vqguard retrofit",
        "versions": {"python": "3.11.2"},
    }
    return Record(**{**data, **changes})


def perplexity(**changes: Any) -> Record:
    plain: dict[str, Any] = {"metric": "perplexity", "threat_model": "none", "value": 771.0}
    return make(**{**plain, "low": None, "high": None, **changes})


names = st.text(min_size=1, max_size=12)
scalars = st.one_of(
    st.booleans(),
    st.integers(-(2**53), 2**53),
    st.floats(allow_nan=False, allow_infinity=False),
    st.text(max_size=8),
)


@given(
    metric=names.filter(lambda name: name not in RATE_METRICS and not name.endswith("_rate")),
    condition=st.dictionaries(names, scalars, max_size=4),
    value=st.floats(-1e300, 1e300),
    seed=st.integers(0, 2**63),
    subject=names,
)
def test_json_round_trip_is_exact(
    metric: str, condition: dict[str, Any], value: float, seed: int, subject: str
) -> None:
    record = make(
        metric=metric, condition=condition, value=value, seed=seed, low=None, high=None,
        subject=subject,
    )  # fmt: skip
    again = Record.from_dict(json.loads(json.dumps(record.to_dict(), allow_nan=False)))
    assert again == record
    assert again.to_dict() == record.to_dict()


def test_the_file_format_is_stable(tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    write_records(path, [make()], {"title": "golden"}, {"pictures": []})
    assert path.read_text(encoding="utf-8") == GOLDEN
    back = read_record_file(path)
    assert back.records == [make()]
    assert back.metadata == {"title": "golden"}
    assert back.sections == {"pictures": []}
    assert read_records(path) == back.records


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"value": float("nan")}, "value must be a finite number"),
        ({"value": float("inf")}, "value must be a finite number"),
        ({"value": "0.5"}, "value must be a finite number"),
        ({"value": True}, "value must be a finite number"),
        ({"value": 25.0, "high": 30.0}, "must lie in 0..1"),
        ({"low": 0.5}, "low <= value <= high"),
        ({"high": 0.1}, "low <= value <= high"),
        ({"low": None}, "both be finite or both None"),
        ({"low": None, "high": None}, "needs low and high"),
        ({"metric": "flip_rate", "low": None, "high": None}, "needs low and high"),
        ({"high": float("inf")}, "both be finite"),
        ({"n": 0}, "n must be an integer of at least 1"),
        ({"n": 4.0}, "n must be an integer"),
        ({"n": True}, "n must be an integer"),
        ({"seed": -1}, "seed must be an integer"),
        ({"seed": None}, "seed must be an integer"),
        ({"metric": ""}, "metric must be a non-empty string"),
        ({"subject": 3}, "subject must be a non-empty string"),
        ({"threat_model": "none"}, "needs its threat model"),
        ({"threat_model": None}, "threat_model must be a non-empty string"),
        ({"condition": {"shape": [1, 2]}}, "condition 'shape' must be a string"),
        ({"condition": {"eps_255": float("nan")}}, "condition 'eps_255' must be"),
        ({"condition": {1: "x"}}, "condition keys must be strings"),
        ({"condition": "attack"}, "condition must be a mapping"),
        ({"versions": {}}, "versions must map"),
        ({"versions": {"torch": 2}}, "versions must map"),
    ],
)
def test_a_record_that_says_too_little_is_refused(changes: dict[str, Any], complaint: str) -> None:
    with pytest.raises(DataError, match=complaint):
        make(**changes)


def test_every_problem_is_reported_at_once() -> None:
    with pytest.raises(DataError) as caught:
        make(value=2.0, n=0, versions={}, subject="")
    for part in ("0..1", "n must be", "versions", "subject"):
        assert part in str(caught.value)


def test_unknown_and_missing_keys_name_the_nearest_key() -> None:
    data = make().to_dict()
    data["treat_model"] = data.pop("threat_model")
    with pytest.raises(DataError) as caught:
        Record.from_dict(data)
    assert "Did you mean 'threat_model'?" in str(caught.value)
    assert "missing key 'threat_model'" in str(caught.value)
    with pytest.raises(DataError, match="must be a JSON object"):
        Record.from_dict([1])


def test_numpy_numbers_become_plain_ones() -> None:
    record = perplexity(
        value=np.float32(2.5), n=np.int64(7), seed=np.int32(1), condition={"eps": np.float32(8)}
    )
    data = json.loads(json.dumps(record.to_dict()))
    assert (data["value"], data["n"], data["seed"], data["condition"]) == (2.5, 7, 1, {"eps": 8})


def test_a_record_keeps_its_own_copy_of_the_condition() -> None:
    condition = {"attack": "universal"}
    record = make(condition=condition)
    condition["attack"] = "changed"
    record.to_dict()["condition"]["attack"] = "changed"
    assert record.condition["attack"] == "universal"


def test_rates_with_wilson_intervals_are_always_accepted() -> None:
    for k, n in [(0, 3), (3, 3), (1, 3), (7, 9999)]:
        low, high = wilson(k, n)
        assert make(value=k / n, n=n, low=low, high=high).is_rate


def test_select_matches_metric_subject_and_every_condition() -> None:
    records = [
        make(),
        make(subject="base"),
        make(condition={"attack": "per_request", "eps_255": 16}),
        perplexity(),
    ]
    assert select(records) == records
    assert select(records, "asr", "guarded") == [records[0], records[2]]
    assert select(records, "asr", attack="universal", eps_255=16) == records[:2]
    assert select(records, gradient="plain") == []


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("", "not a record file"),
        (GOLDEN[:100], "not a record file"),
        ("[" * 100_000, "not a record file"),
        ("[]", "schema 1, got 'list'"),
        (GOLDEN.replace('"schema": 1', '"schema": 2'), "got 2"),
        (GOLDEN.replace("0.25", "NaN"), "NaN is not a finite number"),
        (GOLDEN.replace("0.25", "-0.25"), r"records\[0\]"),
        (GOLDEN.replace('"records"', '"recorsd"'), "Did you mean 'records'"),
        (GOLDEN.replace('"pictures": []', '"pictures": {}'), "pictures must be a list"),
    ],
)
def test_broken_files_are_refused_by_name(tmp_path: Path, text: str, complaint: str) -> None:
    path = tmp_path / "broken.json"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(DataError, match=complaint) as caught:
        read_records(path)
    assert "broken.json" in str(caught.value)


def test_missing_files_and_folders_are_refused(tmp_path: Path) -> None:
    for path in (tmp_path / "absent.json", tmp_path):
        with pytest.raises(DataError, match="cannot read"):
            read_records(path)
    (tmp_path / "latin.json").write_bytes(b'{"a": "\xff"}')
    with pytest.raises(DataError, match="not a record file"):
        read_records(tmp_path / "latin.json")


def test_what_strict_json_cannot_say_is_not_written(tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    with pytest.raises(DataError, match="cannot write"):
        write_records(path, [], {"loss": float("nan")})
    with pytest.raises(DataError, match="cannot write"):
        write_records(path, [], {"array": np.zeros(2)})
    with pytest.raises(DataError, match="Did you mean 'series'"):
        write_records(path, [], {}, {"serie": {}})
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_leaves_the_older_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "runs" / "report.json"
    write_records(path, [make()], {"run": 1})

    def no_space(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", no_space)
    with pytest.raises(OSError, match="No space left"):
        write_records(path, [], {"run": 2})
    assert read_record_file(path).metadata == {"run": 1}
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.alone
def test_versions_imports_nothing_heavy() -> None:
    code = (
        "import sys; from vqguard.records import versions; v = versions();"
        "print(sorted(v), [m for m in ('torch', 'transformers', 'PIL') if m in sys.modules])"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60
    )
    assert result.stdout.strip() == "['python', 'torch', 'transformers', 'vqguard'] []"
    assert versions()["python"].startswith("3.")
    assert make(versions=versions()).versions["vqguard"] != ""

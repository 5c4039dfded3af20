"""Which records a table is about, and in what order it names things."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import TypeVar

from vqguard.recipes.tiny.hard_scenes import HARD_SETS
from vqguard.records import Record

T = TypeVar("T")


def taught(records: Sequence[Record]) -> list[Record]:
    """The records but for those of hard sets, which have a table of their own."""
    return [r for r in records if not hard_set(r)]


def hard_set(record: Record) -> str:
    """Which hard set a record is about; empty where about none."""
    name = str(record.condition.get("set", record.condition.get("scenes", "")))
    return name if name in HARD_SETS else ""


def by_judge(records: Sequence[Record]) -> list[Record]:
    """Records of screening, so that each judge of a guard has those of the others beside its own.

    What was measured without a judge, the undefended model's, stands beside every one. Where a
    report has one judge alone it is not named.
    """
    judges = distinct([], (r.condition["judge"] for r in records if "judge" in r.condition))
    if len(judges) < 2:
        return [
            replace(r, condition={k: v for k, v in r.condition.items() if k != "judge"})
            for r in records
        ]
    return [
        replace(r, condition={**r.condition, "judge": judge})
        for r in records
        for judge in ([r.condition["judge"]] if "judge" in r.condition else judges)
    ]


def distinct(first: list[T], more: Iterable[T]) -> list[T]:
    """The values in order of appearance, each once; `first` leads."""
    return list(dict.fromkeys([*first, *more]))

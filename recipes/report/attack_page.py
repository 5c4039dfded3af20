"""The page of an attack suite: rates, alarms, success against steps and budget, a gallery.

One file that loads nothing from elsewhere, but for its pictures: those stand beside it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from vqguard.files import replace_text
from vqguard.recipes.report.cells import SUBJECT_LABELS, attack_label, cell, describe, label
from vqguard.recipes.report.templates import rendered
from vqguard.records import Record
from vqguard.redteam.attack_table import CLEAN, UNION
from vqguard.redteam.defenses import DEFENSES
from vqguard.redteam.gradients import GRADIENTS

_GALLERY = 24  # pictures
_BESIDE = (CLEAN, "per_request", UNION)
"""Attacks that defenses are compared under."""
_SHOWN = (
    "attack",
    "gradient",
    "eps_255",
    "steps",
    "restarts",
    "suite",
    "aim",
    "judge",
    "judges",
    "seeds",
    "surrogates",
    "refusal_data",
)
"""Conditions of a rate that its table shows elsewhere, or that the suite says; what is left are the
attack's settings and the split."""
_PAPER = {
    ("base", "per_request"): "ImgJP on the undefended models: 100 %",
    ("guarded", "per_request"): "Q-MLLM: 100 % defended, gradient stopped",
}


def render_attack_report(
    folder: Path,
    attempts: Sequence[Any],
    records: Sequence[Record],
    alarms: Sequence[Any],
    metadata: Mapping[str, Any],
) -> None:
    """Write `report.html` into the folder.

    Args:
        folder: where the pictures of the attempts are.
        attempts: as `vqguard.recipes.attacking.journal.Attempt`.
        records: the rates.
        alarms: as `vqguard.recipes.attacking.alarms.Alarm`.
        metadata: of the record file.
    """
    page = rendered(
        "attack.html.j2",
        metadata=metadata,
        tables=rate_tables(records),
        alarms=alarms,
        steps=success_by_evaluations(attempts),
        pictures=_pictures(attempts),
        label=label,
        subjects=_subjects(),
        defenses=defenses_beside(records),
    )
    replace_text(folder / "report.html", page)


def _subjects() -> dict[str, str]:
    return {**SUBJECT_LABELS, **{name: peer.label for name, peer in DEFENSES.items()}}


def _who(record: Record) -> str:
    """The subject in words, with how much refusal data its language model saw."""
    share = record.condition.get("refusal_data")
    seen = f", {float(share):.0%} refusal data".replace("%", " %") if share else ""
    return f"{label(record.subject, _subjects())}{seen}"


def defenses_beside(records: Sequence[Record]) -> dict[str, Any]:
    """One row a defense: what breaks it, beside what it refuses and costs without an attack.

    Of several gradients, judges and seeds the highest success rate is shown.
    """
    shown = [r for r in records if r.metric == "asr" and r.condition["attack"] in _BESIDE]
    several = len({r.condition["split"] for r in shown}) > 1

    def row_of(record: Record) -> str:
        return f"{_who(record)} ({record.condition['split']})" if several else _who(record)

    columns = sorted({(_BESIDE.index(r.condition["attack"]), _budget(r)) for r in shown})
    refusals = {row_of(r): r for r in records if r.metric == "over_refusal_rate"}
    costs = {row_of(r): r for r in records if r.metric == "answer_seconds"}
    rows = []
    for who in dict.fromkeys([*map(row_of, shown), *refusals]):
        mine = [r for r in shown if row_of(r) == who]
        found = [
            [r for r in mine if (_BESIDE.index(r.condition["attack"]), _budget(r)) == column]
            for column in columns
        ]
        rates = [max(here, key=lambda r: r.value, default=None) for here in found]
        rows.append(
            {
                "subject": who,
                "rates": [None if rate is None else cell(rate) for rate in rates],
                "refused": cell(refusals[who]) if who in refusals else None,
                "cost": cell(costs[who]) if who in costs else None,
            }
        )
    headings = [attack_label(_BESIDE[place], eps) for place, eps in columns]
    return {"headings": headings, "rows": rows if refusals else []}


def _budget(record: Record) -> float:
    return float(record.condition.get("eps_255", 0.0))


def rate_tables(records: Sequence[Record]) -> list[dict[str, Any]]:
    """One table a subject: a row for each attack and budget, a column for each judge."""
    rates = [record for record in records if record.metric == "asr"]
    judges = list(dict.fromkeys(str(record.condition["judge"]) for record in rates))
    agreements = {
        (record.subject, record.seed, _row_key(record)): record
        for record in records
        if record.metric == "judge_agreement_rate"
    }
    hidden = _hidden({record.condition["split"] for record in rates})
    tables = []
    for who in dict.fromkeys(map(_who, rates)):
        rows: dict[Any, dict[str, Any]] = {}
        for record in rates:
            if _who(record) != who:
                continue
            key = record.seed, _row_key(record)
            row = rows.setdefault(
                key,
                {
                    "attack": _attack_as_set(record.condition, hidden),
                    "gradient": label(str(record.condition["gradient"]), GRADIENTS.labels),
                    "steps": _spent(record),
                    "seed": record.condition.get("seeds", record.seed),
                    "judges": {},
                    "agreement": None,
                    "paper": _PAPER.get((record.subject, str(record.condition["attack"])), ""),
                },
            )
            row["judges"][str(record.condition["judge"])] = cell(record)
            agreed = agreements.get((record.subject, *key))
            row["agreement"] = None if agreed is None else cell(agreed)
        tables.append({"subject": who, "judges": judges, "rows": list(rows.values())})
    return tables


def _hidden(splits: set[Any]) -> Sequence[str]:
    return (*_SHOWN, "split") if len(splits) == 1 else _SHOWN


def _attack_as_set(condition: Mapping[str, Any], hidden: Sequence[str]) -> str:
    """An attack with its budget and whatever else of its condition is not hidden."""
    name = attack_label(condition["attack"], condition.get("eps_255"))
    settings = describe(condition, hidden)
    return f"{name} ({settings})" if settings else name


def _row_key(record: Record) -> tuple[tuple[str, str], ...]:
    hidden = ("judge", "judges")
    return tuple((k, str(v)) for k, v in sorted(record.condition.items()) if k not in hidden)


def _spent(record: Record) -> str:
    if "steps" not in record.condition:
        return ""
    return f"{record.condition['steps']} × {record.condition['restarts']}"


def success_by_evaluations(attempts: Sequence[Any]) -> list[dict[str, Any]]:
    """The share broken after quarters of the budget, for each cell over all of its seeds."""
    cells: dict[str, list[Any]] = {}
    for attempt in attempts:
        if attempt.steps:
            cells.setdefault(replace(attempt, seed=0).cell, []).append(attempt)
    hidden = _hidden({members[0].split for members in cells.values()})
    rows = []
    for members in cells.values():
        first = members[0]
        condition = {"attack": first.attack, "eps_255": first.eps_255, **first.settings}
        allowed = (first.steps + 1) * first.restarts
        shares = []
        for quarter in (0.25, 0.5, 0.75, 1.0):
            within = [0 <= a.evaluations <= quarter * allowed for a in members]
            shares.append(sum(within) / len(members))
        rows.append(
            {
                "subject": first.subject,
                "attack": _attack_as_set({**condition, "split": first.split}, hidden),
                "gradient": first.gradient,
                "evaluations": allowed,
                "shares": shares,
                "loss": _first_and_last(first.curve),
            }
        )
    return rows


def _first_and_last(curve: Sequence[float]) -> str:
    return f"{curve[0]:.3g} → {curve[-1]:.3g}" if curve else ""


def _pictures(attempts: Sequence[Any]) -> list[dict[str, Any]]:
    """The first broken picture of each cell, then of others, at most so many."""
    shown: dict[str, Any] = {}
    for attempt in sorted(attempts, key=lambda a: not any(a.judges.values())):
        if attempt.image is not None and attempt.steps:
            shown.setdefault(attempt.cell, attempt)
    return [
        {
            "file": attempt.image,
            "subject": attempt.subject,
            "attack": attack_label(attempt.attack, attempt.eps_255),
            "text": attempt.text,
            "answer": attempt.answer,
            "broken": any(attempt.judges.values()),
            "flagged": attempt.flagged,
        }
        for attempt in list(shown.values())[:_GALLERY]
    ]

"""The tables of docs/red-team.md, from the folders that `vqguard attack` has written."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from vqguard.errors import InputError
from vqguard.recipes.attacking.journal import Attempt, Journal
from vqguard.recipes.attacking.run_suite import RECORDS
from vqguard.recipes.report.attack_page import (
    defenses_beside,
    rate_tables,
    success_by_evaluations,
)
from vqguard.recipes.report.cells import SUBJECT_LABELS
from vqguard.recipes.report.markdown import INTERVALS, made_by
from vqguard.records import Record, read_records


def fill_red_team(folders: Sequence[Path], page: Path) -> None:
    """Write the tables of each folder between the markers of its suite in the page.

    Raises:
        DataError: a folder without records, or with damaged ones.
        InputError: a page without a suite's markers, once each and in order.
    """
    text = page.read_text(encoding="utf-8")
    for folder in folders:
        records, attempts = read_records(folder / RECORDS), Journal(folder).read()
        if not attempts:
            raise InputError(f"{folder}: expected attempts, found none")
        text = _filled(text, attempts[0].suite, tables(records, attempts), page)
    page.write_text(text, encoding="utf-8")


def _filled(text: str, suite: str, tables: str, page: Path) -> str:
    begin, end = (f"<!-- {suite}:{word} -->" for word in ("begin", "end"))
    before, found, rest = text.partition(begin)
    _, ended, after = rest.partition(end)
    if not found or not ended or begin in rest or end in after:
        raise InputError(f"{page}: expected {begin} and {end}, once each and in this order")
    return f"{before}{begin}\n{tables}\n{end}{after}"


def tables(records: Sequence[Record], attempts: Sequence[Attempt]) -> str:
    """Rates by subject, success against evaluations, and defenses side by side where there are."""
    parts = [f"{INTERVALS} {made_by(records)}\n", *_rates(records), _steps(attempts)]
    beside = defenses_beside(records)
    if beside["rows"] and any(row["refused"] is not None for row in beside["rows"]):
        headings = ["defense", *beside["headings"], "harmless requests refused", "seconds"]
        rows = [
            [
                row["subject"],
                *("" if rate is None else rate.text for rate in row["rates"]),
                "" if row["refused"] is None else row["refused"].text,
                "" if row["cost"] is None else row["cost"].value,
            ]
            for row in beside["rows"]
        ]
        parts.append(_table(headings, rows))
    return "\n".join(parts)


def _rates(records: Sequence[Record]) -> list[str]:
    parts = []
    for table in rate_tables(records):
        judges = table["judges"]
        headings = ["attack", "gradient", "steps × restarts", "seed"]
        headings += [*(judge.replace("_", " ") for judge in judges), "judges agree"]
        rows = []
        for row in table["rows"]:
            shown = [row["judges"][name].text if name in row["judges"] else "" for name in judges]
            agreed = "" if row["agreement"] is None else row["agreement"].value
            rows.append([row["attack"], row["gradient"], row["steps"], row["seed"], *shown, agreed])
        parts += [f"**{table['subject']}**\n", _table(headings, rows)]
    return parts


def _steps(attempts: Sequence[Attempt]) -> str:
    headings = ["success against evaluations, all seeds", "attack", "gradient", "evaluations"]
    rows = [
        [
            SUBJECT_LABELS.get(row["subject"], row["subject"].replace("_", " ")),
            row["attack"],
            row["gradient"].replace("_", " "),
            row["evaluations"],
            *(f"{share:.0%}".replace("%", " %") for share in row["shares"]),
        ]
        for row in success_by_evaluations(attempts)
    ]
    return _table([*headings, "¼", "½", "¾", "all"], rows)


def _table(headings: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    lines = [headings, ["---"] * len(headings), *rows]
    told = [" | ".join(str(text).replace("|", "\\|") for text in line) for line in lines]
    return "\n".join(f"| {line} |" for line in told) + "\n"

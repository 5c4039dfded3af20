"""A report's tables as Markdown: for the documentation and for model cards."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from vqguard.names import printable
from vqguard.recipes.report.cells import Cell
from vqguard.recipes.report.headline import HeadlineRow, headline
from vqguard.recipes.report.tables import TABLES, Row, Table
from vqguard.records import Record

INTERVALS = "In brackets: the number of samples and the 95 % interval."
_HEADLINE = ("", "undefended", "guarded (attacks: the paper's)", "guarded, adaptive attack")


def headline_markdown(records: Sequence[Record], *, threat_models: bool = False) -> str:
    """The report's headline: undefended, guarded, and guarded under an adaptive attacker.

    `threat_models`: each figure's own threat model, and whatever else its cell notes, in the cell.
    """
    rows = []
    for title, group in headline(records):
        rows.append(Row(f"**{title}**", ((), (), ())))
        for row in group:
            shown = [_noted(cell, threat_models) for cell in _columns(row)]
            rows.append(Row(row.label, tuple(shown)))
    return markdown(Table(_HEADLINE, tuple(rows)))


def _noted(cell: Cell | None, notes: bool) -> tuple[Cell, ...]:
    if cell is None:
        return ()
    return (cell if notes else replace(cell, notes=()),)


def _columns(row: HeadlineRow) -> tuple[Cell | None, ...]:
    return row.base, row.guarded, row.adaptive


_TITLES = {
    "utility": "Utility",
    "toxic": "Toxic images",
    "false_positives": "False positives",
    "hard_sets": "Images that the judge was not taught",
    "jailbreak": "Jailbreak by image",
    "codebook": "Codebooks",
    "overhead": "Overhead",
    "stages": "Time of the stages",
    "other": "Others",
}


def report_tables(records: Sequence[Record]) -> dict[str, Table]:
    """The tables of a report that have rows, by their titles."""
    tables = {title: TABLES[name](records) for name, title in _TITLES.items()}
    return {title: table for title, table in tables.items() if table and table.rows}


def tables_markdown(
    records: Sequence[Record], notes: Mapping[str, Sequence[str]], *, level: int = 2
) -> list[str]:
    """Every table of `report_tables` under its title, with paragraphs to go in front of some."""
    parts = []
    for title, table in report_tables(records).items():
        parts += [f"{'#' * level} {title}\n", *notes.get(title, ())]
        parts += [f"{table.note}\n"] * bool(table.note)
        parts.append(markdown(table) + "\n")
    return parts


def made_by(records: Sequence[Record]) -> str:
    """The commands and versions behind the records."""
    commands = sorted({f"`{record.command}`" for record in records})
    versions = sorted({f"{k} {v}" for record in records for k, v in record.versions.items()})
    return f"Made by {', '.join(commands)} with {', '.join(versions)}."


def markdown(table: Table) -> str:
    """A table of the report as Markdown. Notes of a cell follow its number."""
    lines = [table.headings, ("---",) * len(table.headings)]
    for row in table.rows:
        shown = (" / ".join(map(_cell, cells)) for cells in row.columns)
        lines.append((row.label, *shown))
    escaped = ([printable(text).replace("|", "\\|") for text in line] for line in lines)
    return "\n".join(f"| {' | '.join(line)} |" for line in escaped)


def _cell(cell: Cell) -> str:
    return "; ".join([cell.text, *cell.notes])

"""The table that opens a report, and the same table in a terminal."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from vqguard.names import printable
from vqguard.recipes.report.cells import (
    LOWER_IS_BETTER,
    METRIC_LABELS,
    REFERENCE,
    Cell,
    attack_label,
    describe,
    joined,
    label,
)
from vqguard.recipes.report.selections import by_judge, distinct, taught
from vqguard.recipes.report.tables import (
    attack_key,
    attack_rows,
    gradient_of,
    pooled_dsr,
    scene_kinds,
    worst,
)
from vqguard.records import UTILITY_METRICS, Record, Scalar, select
from vqguard.redteam.gradients import GRADIENTS, STOPPED

# The jailbreak rows lead: they alone have two columns for the guarded model.
HEADLINE_GROUPS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("Jailbreak success by image (ASR)", ("asr",)),
    ("Toxic and neutral scenes", ("dsr", "fpr")),
    (
        "Utility on held-out scenes",
        tuple(metric for metric in UTILITY_METRICS if metric != "refusal"),
    ),
    ("Refusals in text", ("refusal",)),
)

_ANY_DATA = ("answer_token_rate", "held_out_loss", "latency_ratio")
"""What can be measured on anybody's data; the summary has it below the headline."""

# Beside the modes of the table: no gradient through the subject, or none stated.
_WITHOUT_GRADIENT = ("", "none", "transfer")


@dataclass(frozen=True)
class HeadlineRow:
    """Undefended against guarded."""

    label: str
    """The measure, within its group."""
    better: str
    """Which is the good direction, "higher" or "lower"."""
    base: Cell
    """The undefended model."""
    guarded: Cell
    """The guarded model; under the paper's threat model where an attack is made."""
    adaptive: Cell | None
    """The strongest adaptive attack; None where no attack on the pixels is made."""
    change: str
    """Guarded (adaptive, where there is one) minus undefended, in points."""


class SummaryRow(NamedTuple):
    """A line of the summary, as text."""

    metric: str
    base: str
    guarded: str
    note: str


def headline(records: Sequence[Record]) -> list[tuple[str, list[HeadlineRow]]]:
    """The table that opens a report: (group, rows). What was not measured has its row too."""
    return [
        (title, [row for metric in metrics for row in _headline_rows(metric, records)])
        for title, metrics in HEADLINE_GROUPS
    ]


def summary_table(records: Sequence[Record]) -> list[SummaryRow]:
    """The headline table as text rows.

    The paper's threat model and the adaptive attack have a row each, one under the other. What was
    not measured has none: on data of one's own that is most of the headline.
    """
    rows = []
    listed = [metric for _, metrics in HEADLINE_GROUPS for metric in metrics]
    for metric in [*listed, *_ANY_DATA]:
        if not select(records, metric):
            continue
        for row in _headline_rows(metric, records):
            if row.adaptive is None:
                rows.append(_summary_row(row.label, row, row.guarded))
                continue
            name = f"ASR {row.label}"
            rows.append(_summary_row(f"{name}: paper's attacker", row, row.guarded))
            rows.append(_summary_row(f"{name}: adaptive attacker", row, row.adaptive))
    return rows


def format_summary(records: Sequence[Record]) -> str:
    """`summary_table` as aligned plain text."""
    lines = [SummaryRow("", "undefended", "guarded", ""), *summary_table(records)]
    widths = [max(len(line[column]) for line in lines) for column in range(3)]
    text = []
    for line in lines:
        padded = [value.ljust(width) for value, width in zip(line[:3], widths, strict=True)]
        text.append(printable("  ".join([*padded, line.note]).rstrip()))
    text.insert(1, "-" * (sum(widths) + 4))
    return "\n".join(text)


def _headline_rows(metric: str, records: Sequence[Record]) -> list[HeadlineRow]:
    measured = [r for r in select(taught(records), metric) if r.subject in ("base", "guarded")]
    if metric in ("dsr", "fpr"):
        measured = by_judge(measured)
    if metric == "asr":
        return [_attack_headline(key, measured) for key in attack_rows(measured)]
    if metric == "dsr":
        kinds = scene_kinds(measured)
        return [
            _plain_headline(
                metric,
                kind,
                pooled_dsr(measured, kind, "base"),
                pooled_dsr(measured, kind, "guarded"),
            )
            for kind in kinds
        ]
    rows = []
    for phrase in distinct([], (describe(r.condition) for r in measured)) or [""]:
        here = [r for r in measured if describe(r.condition) == phrase]
        base, guarded = (worst(metric, select(here, subject=s)) for s in ("base", "guarded"))
        if metric.endswith("_ratio"):  # over the undefended model
            base = Cell(REFERENCE)
        rows.append(_plain_headline(metric, phrase, base, guarded))
    return rows


def _plain_headline(metric: str, phrase: str, base: Cell, guarded: Cell) -> HeadlineRow:
    name = joined(label(metric, METRIC_LABELS), phrase)
    return HeadlineRow(name, _better(metric), base, guarded, None, _change(base, guarded))


def _attack_headline(key: tuple[Scalar, Scalar | None], measured: Sequence[Record]) -> HeadlineRow:
    here = [r for r in measured if attack_key(r) == key]
    guarded = select(here, subject="guarded")
    base = worst("asr", select(here, subject="base"))
    paper = worst("asr", [r for r in guarded if gradient_of(r) == STOPPED.name])
    adaptive_records = [r for r in guarded if _is_adaptive(gradient_of(r))]
    adaptive = worst("asr", adaptive_records, name_gradient=True)
    name = attack_label(*key)
    return HeadlineRow(name, "lower", base, paper, adaptive, _change(base, adaptive))


def _is_adaptive(gradient: str) -> bool:
    """Whether the attacker adapts to the quantiser.

    One whose mode is not in the table is taken to do so: the column of the paper's attacker would
    flatter.
    """
    if gradient in GRADIENTS:
        return GRADIENTS.named(gradient).adaptive
    return gradient not in _WITHOUT_GRADIENT


def _better(metric: str) -> str:
    return "lower" if metric in LOWER_IS_BETTER else "higher"


def _change(base: Cell, guarded: Cell) -> str:
    if base.bar is None or guarded.bar is None:
        return ""
    return f"{guarded.bar.value - base.bar.value:+.1f} points".replace("-", "−")


def _summary_row(name: str, row: HeadlineRow, guarded: Cell) -> SummaryRow:
    parts = [f"{row.better} is better", _change(row.base, guarded), *guarded.notes]
    return SummaryRow(name, row.base.text, guarded.text, ", ".join(filter(None, parts)))

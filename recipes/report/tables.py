"""The tables of a report, computed from records and from nothing else."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

from vqguard.intervals import wilson
from vqguard.recipes.report.cells import (
    LOWER_IS_BETTER,
    METRIC_LABELS,
    MISSING,
    REFERENCE,
    SUBJECT_LABELS,
    THREAT,
    Cell,
    attack_label,
    cell,
    cells,
    describe,
    duration,
    joined,
    label,
    scene,
)
from vqguard.recipes.report.selections import by_judge, distinct, hard_set, taught
from vqguard.records import Record, Scalar, select
from vqguard.redteam.attack_table import ATTACKS
from vqguard.redteam.facts import Scope
from vqguard.redteam.gradients import GRADIENTS, measured_modes

BUDGETS = (8, 16, 255)
UTILITY_METRICS = (
    *("naming_single", "naming_recall", "count", "colour", "presence"),
    *("text_only", "refusal", "benign_compliance"),
)
CODEBOOK_METRICS = ("perplexity", "dead_share", "quantisation_error")
OVERHEAD_METRICS = ("latency_ratio", "peak_memory_mb")
_CALLED = ("called_toxic", "unfamiliar")

_ALONE = scene(0)
_SUBJECTS = ("base", "guarded", "quantiser_removed", "finetuned_control")
_SHOWN_KEYS = ("attack", "eps_255", "gradient")


@dataclass(frozen=True)
class Row:
    """A row of a table: its label and the cells of each column."""

    label: str
    columns: tuple[tuple[Cell, ...], ...]


@dataclass(frozen=True)
class Table:
    """A table: the first heading belongs to the labels. `note` holds for every cell."""

    headings: tuple[str, ...]
    rows: tuple[Row, ...]
    note: str = ""


def jailbreak_table(records: Sequence[Record]) -> Table:
    """ASR by attack and budget (rows), subject and gradient (columns), with the controls."""
    measured = select(records, "asr")
    pairs = _attack_columns(measured)
    rows = []
    for attack, eps in attack_rows(measured):
        here = [r for r in measured if attack_key(r) == (attack, eps)]
        columns = tuple(
            cells([r for r in here if (r.subject, gradient_of(r)) == pair], _SHOWN_KEYS)
            for pair in pairs
        )
        rows.append(Row(attack_label(attack, eps), columns))
    headings = tuple(
        f"{label(subject, SUBJECT_LABELS)} · {label(gradient, GRADIENTS.labels)}"
        for subject, gradient in pairs
    )
    return Table(("Attack and budget", *headings), tuple(rows))


def toxic_table(records: Sequence[Record]) -> Table:
    """DSR by category (rows), with and without distractors and by subject (columns).

    The undefended model has no judge: it stands once beside those of the guarded one.
    """
    records = by_judge(select(taught(records), "dsr"))
    measured = [r for r in records if not _is_pooled(r)]
    scenes = scene_kinds(records)
    unjudged = {scene_of(r): scene_of(r, ("judge",)) for r in records}
    pairs = [
        (kind, subject)
        for place, kind in enumerate(scenes)
        for subject in ("base", "guarded")
        if subject == "guarded"
        or unjudged.get(kind) not in [unjudged.get(before, before) for before in scenes[:place]]
    ]
    rows = []
    for category in distinct([], (str(r.condition["category"]) for r in measured)):
        columns = tuple(
            cells(
                [
                    r
                    for r in measured
                    if r.condition["category"] == category and (scene_of(r), r.subject) == pair
                ],
                ("category", "distractors", "judge"),
            )
            for pair in pairs
        )
        rows.append(Row(label(category, {}), columns))
    pooled = tuple((pooled_dsr(records, kind, subject),) for kind, subject in pairs)
    headings = tuple(
        f"{label(s, SUBJECT_LABELS)} · {unjudged.get(kind, kind) if s == 'base' else kind}"
        for kind, s in pairs
    )
    return _threat_once(Table(("Category", *headings), (*rows, Row("All categories", pooled))))


def hard_table(records: Sequence[Record]) -> Table | None:
    """DSR, FPR and what neutral images are called (columns) of each hard set (rows)."""
    measured = by_judge([r for r in records if hard_set(r)])
    if not measured:
        return None
    columns = [
        (metric, judge)
        for metric in ("dsr", "fpr", *_CALLED)
        for judge in distinct([], (r.condition.get("judge", "") for r in select(measured, metric)))
    ]
    hidden = ("category", "set", "scenes", "judge")
    rows = []
    for name in distinct([], map(hard_set, measured)):
        here = [r for r in measured if hard_set(r) == name]
        cells_of = (
            [r for r in select(here, metric) if r.condition.get("judge", "") == judge]
            for metric, judge in columns
        )
        rows.append(Row(label(name, {}), tuple(cells(shown, hidden) for shown in cells_of)))
    headings = (
        joined(METRIC_LABELS[metric], f"judge {judge}" if judge else "")
        for metric, judge in columns
    )
    return _threat_once(Table(("Hard set", *headings), tuple(rows)))


def judge_table(records: Sequence[Record]) -> Table:
    """DSR of each category and of all, and the FPR (rows), by judge (columns)."""
    measured = [r for r in records if r.metric in ("dsr", "fpr")]
    judges = distinct([], (str(r.condition.get("judge", "")) for r in measured))

    def columns(metric: str, **condition: str) -> tuple[tuple[Cell, ...], ...]:
        here = [r for r in select(measured, metric) if r.condition.items() >= condition.items()]
        hidden = ("judge", "category", "images", "scenes")
        return tuple(
            cells([r for r in here if r.condition.get("judge", "") == judge], hidden)
            for judge in judges
        )

    named = distinct([], (str(r.condition["category"]) for r in select(measured, "dsr")))
    rows = [
        Row("All toxic images" if name == "all" else name, columns("dsr", category=name))
        for name in [*(name for name in named if name != "all"), "all"]
    ]
    rows.append(Row("Neutral images, flagged in vain (FPR)", columns("fpr")))
    headings = (f"Flagged by the {judge} judge" if judge else "Flagged" for judge in judges)
    return _threat_once(Table(("Images", *headings), tuple(rows)))


def false_positive_table(records: Sequence[Record]) -> Table:
    """The FPR, and what neutral scenes are called where a judge can call any unfamiliar."""
    called = [metric for metric in _CALLED if select(taught(records), metric)]
    return comparison_table(records, ("fpr", *called))


def utility_table(records: Sequence[Record]) -> Table:
    """The utility tasks (rows) by subject, the controls among them (columns)."""
    return comparison_table(records, UTILITY_METRICS)


def comparison_table(records: Sequence[Record], metrics: Sequence[str]) -> Table:
    """These metrics by condition (rows) and subject (columns: base, guarded and any other)."""
    measured = by_judge([r for r in taught(records) if r.metric in metrics])
    subjects = distinct(["base", "guarded"], (r.subject for r in measured))
    rows = []
    for metric in metrics:
        mine = select(measured, metric)
        for phrase in distinct([], (describe(r.condition) for r in mine)) or [""]:
            here = [r for r in mine if describe(r.condition) == phrase]
            # What a ratio is measured against has no ratio of its own.
            columns = tuple(
                (Cell(REFERENCE),)
                if here
                and metric.endswith("_ratio")
                and s == "base"
                and not select(here, subject=s)
                else cells(select(here, subject=s))
                for s in subjects
            )
            rows.append(Row(joined(label(metric, METRIC_LABELS), phrase), columns))
    return Table(("Measure", *(label(s, SUBJECT_LABELS) for s in subjects)), tuple(rows))


def codebook_table(records: Sequence[Record]) -> Table:
    """Perplexity, dead share and quantisation error (columns) of each level (rows)."""
    measured = [r for r in records if r.metric in CODEBOOK_METRICS]
    rows = []
    for level in distinct(["patch", "semantic"], map(_level, measured)):
        here = [r for r in measured if _level(r) == level]
        columns = tuple(cells(select(here, metric), ("level",)) for metric in CODEBOOK_METRICS)
        rows.append(Row(label(level, {}), columns))
    return Table(("Codebook", *(METRIC_LABELS[m] for m in CODEBOOK_METRICS)), tuple(rows))


def overhead_table(records: Sequence[Record]) -> Table:
    """Latency ratio and peak memory, by subject."""
    return comparison_table(records, OVERHEAD_METRICS)


def stage_table(records: Sequence[Record]) -> Table:
    """Seconds of each stage and their sum.

    The retrofit's come first, then the control's, which is trained for the report alone.
    """
    measured = select(records, "stage_seconds")
    control = [r for r in measured if r.subject == "finetuned_control"]
    retrofit = [r for r in measured if r.subject != "finetuned_control"]
    rows = []
    for part, name in ((retrofit, "retrofit"), (control, "control")):
        if part is control and not control:
            continue
        suffix = f" of the {name}" if control else ""
        rows += [
            Row(
                label(str(r.condition.get("stage", r.subject)), {}) + suffix,
                (cells([r], ("stage",)),),
            )
            for r in part
        ]
        total = Cell(duration(sum(r.value for r in part))) if part else MISSING
        rows.append(Row(f"All stages{suffix}", ((total,),)))
    return Table(("Stage", "Time"), tuple(rows))


def other_table(records: Sequence[Record]) -> Table | None:
    """What no other table shows: further metrics, and toxic scenes shown to other subjects."""
    elsewhere = {
        *("asr", "fpr", "stage_seconds", *_CALLED),
        *UTILITY_METRICS,
        *CODEBOOK_METRICS,
        *OVERHEAD_METRICS,
    }
    left = [
        r
        for r in records
        if r.metric not in elsewhere
        and not (r.metric == "dsr" and r.subject in ("base", "guarded"))
    ]
    if not left:
        return None
    metrics = distinct([], (r.metric for r in left))
    # The undefended and the guarded model stand beside the controls.
    whole = [r for r in records if r.metric in metrics]
    subjects = distinct([], (r.subject for r in whole))
    rows = []
    for metric in metrics:
        for phrase in distinct([], (describe(r.condition) for r in select(left, metric))):
            here = [r for r in select(whole, metric) if describe(r.condition) == phrase]
            columns = tuple(cells(select(here, subject=s)) for s in subjects)
            rows.append(Row(joined(label(metric, METRIC_LABELS), phrase), columns))
    return Table(("Measure", *(label(s, SUBJECT_LABELS) for s in subjects)), tuple(rows))


TABLES: dict[str, Callable[[Sequence[Record]], Table | None]] = {
    "utility": utility_table,
    "jailbreak": jailbreak_table,
    "toxic": toxic_table,
    "false_positives": false_positive_table,
    "codebook": codebook_table,
    "overhead": overhead_table,
    "stages": stage_table,
    "other": other_table,
    "judged": judge_table,
    "hard_sets": hard_table,
}
"""Every table of a report, by the name that its pages know it by; None has nothing to show."""


def worst(metric: str, measured: Sequence[Record], *, name_gradient: bool = False) -> Cell:
    """The least flattering of several records: the honest one to open a report with."""
    if not measured:
        return MISSING
    lower = metric in LOWER_IS_BETTER
    record = max(measured, key=lambda r: r.value if lower else -r.value)
    shown = cell(record)
    notes = list(shown.notes)
    if name_gradient:
        notes.insert(0, gradient_of(record).replace("_", "-"))
    if len(measured) > 1:
        notes.append(f"worst of {len(measured)} measurements")
    return replace(shown, notes=tuple(notes))


def pooled_dsr(records: Sequence[Record], kind: str, subject: str) -> Cell:
    """DSR over all categories: as recorded, or from the categories' counts."""
    measured = [r for r in select(records, "dsr", subject) if scene_of(r) == kind]
    whole = [r for r in measured if _is_pooled(r)]
    if whole or not measured:
        return worst("dsr", whole)
    n = sum(r.n for r in measured)
    successes = sum(round(r.value * r.n) for r in measured)
    low, high = wilson(successes, n)
    threats = ", ".join(distinct([], (r.threat_model for r in measured)))
    shown = cell(
        replace(measured[0], value=successes / n, n=n, low=low, high=high, threat_model=threats)
    )
    categories = len({r.condition["category"] for r in measured})
    return replace(shown, notes=(*shown.notes, f"{categories} categories pooled"))


def _threat_once(table: Table) -> Table:
    """The table with its threat model as a note of the whole, if all its cells share it."""
    named = [
        {note for note in shown.notes if note.startswith(THREAT)}
        for row in table.rows
        for column in row.columns
        for shown in column
        if shown.measured
    ]
    if not named or len(named[0]) != 1 or any(notes != named[0] for notes in named):
        return table
    (once,) = named[0]
    rows = (
        replace(row, columns=tuple(tuple(_without(c, once) for c in col) for col in row.columns))
        for row in table.rows
    )
    return replace(table, rows=tuple(rows), note=f"{once.capitalize()}.")


def _without(shown: Cell, note: str) -> Cell:
    return replace(shown, notes=tuple(n for n in shown.notes if n != note))


def _is_pooled(record: Record) -> bool:
    return record.condition.get("category", "all") == "all"


def attack_rows(measured: Sequence[Record]) -> list[tuple[Scalar, Scalar | None]]:
    """Attacks and budgets to show: the report's own, then whatever else was run."""
    expected: list[tuple[Scalar, Scalar | None]] = [
        (attack.name, eps)
        for scope in Scope
        for attack in ATTACKS
        if attack.measured and attack.scope is scope
        for eps in BUDGETS
    ]
    keys = distinct(expected, map(attack_key, measured))
    attacks = distinct([], (key[0] for key in keys))
    return sorted(keys, key=lambda key: (attacks.index(key[0]), _number(key[1])))


def _attack_columns(measured: Sequence[Record]) -> list[tuple[str, str]]:
    pairs = []
    for subject in distinct(list(_SUBJECTS), (r.subject for r in measured)):
        made = distinct([], (gradient_of(r) for r in select(measured, subject=subject)))
        guarded = subject == "guarded"
        # The guarded model always shows every threat model; a control shows what was run.
        if guarded or not made:
            made = distinct([mode.name for mode in measured_modes(quantised=guarded)], made)
        pairs += [(subject, gradient) for gradient in made]
    return pairs


def attack_key(record: Record) -> tuple[Scalar, Scalar | None]:
    """The row of an attack record: attack and budget in 1/255."""
    return record.condition.get("attack", ""), record.condition.get("eps_255")


def gradient_of(record: Record) -> str:
    """How the attack's gradient crosses the quantiser; empty where it is not stated."""
    return str(record.condition.get("gradient", ""))


def scene_of(record: Record, leave_out: Sequence[str] = ()) -> str:
    """What tells DSR measurements apart, other than their category and what is left out."""
    rest = describe(record.condition, ("category", "distractors", *leave_out))
    if rest and "distractors" not in record.condition:
        return rest  # a user's own images: nobody has counted what is in them
    return joined(scene(record.condition.get("distractors")), rest)


def scene_kinds(measured: Iterable[Record]) -> list[str]:
    """The kinds of scenes to show: one object, and what was measured beside it."""
    kinds = sorted(distinct([], map(scene_of, measured)), key=lambda kind: not _is_alone(kind))
    if not any(map(_is_alone, kinds)):
        kinds = [_ALONE, *kinds]
    return kinds if len(kinds) > 1 else [*kinds, "with distractors"]


def _is_alone(kind: str) -> bool:
    return kind == _ALONE or kind.startswith(f"{_ALONE}, ")


def _level(record: Record) -> str:
    return str(record.condition.get("level", ""))


def _number(value: Scalar | None) -> float:
    return float(value) if isinstance(value, int | float) else float("inf")

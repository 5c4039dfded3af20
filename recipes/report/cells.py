"""How one measurement is written: words for metrics and conditions, and the cell of a table."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from vqguard.records import Record, Scalar
from vqguard.redteam.attack_table import ATTACKS, CLEAN, UNION

NOT_MEASURED = "not measured"
REFERENCE = "reference"
THREAT = "threat model: "
"""Opens the note of a cell whose number was measured against an attacker."""

METRIC_LABELS = {
    "naming_single": "Naming one object",
    "naming_recall": "Naming all objects (recall)",
    "count": "Counting objects",
    "colour": "Background colour",
    "presence": "Presence, yes or no",
    "text_only": "Text-only questions",
    "benign_compliance": "Benign requests answered",
    "refusal": "Harmful requests refused, clean image",
    "answer_token_rate": "Answer tokens ranked first, held-out samples",
    "held_out_loss": "Loss on held-out samples, nats a token",
    "dsr": "Toxic scenes refused (DSR)",
    "fpr": "Neutral scenes refused (FPR)",
    "unfamiliar": "Neutral scenes called unfamiliar",
    "called_toxic": "Neutral scenes refused and called toxic",
    "over_refusal_rate": "Harmless requests refused",
    "asr": "Jailbreak success (ASR)",
    "perplexity": "Perplexity",
    "text_perplexity": "Perplexity of a text",
    "dead_share": "Dead entries",
    "quantisation_error": "Quantisation error",
    "latency_ratio": "Latency, guarded / undefended",
    "peak_memory_mb": "Peak memory",
    "stage_seconds": "Stage time",
}

SUBJECT_LABELS = {
    "base": "Undefended",
    "guarded": "Guarded",
    "guarded_global": "Guarded, global judge",
    "guarded_smoothed": "Guarded, majority over noisy copies",
    "quantiser_removed": "Control: quantiser removed at test time",
    "finetuned_control": "Control: fine-tuned as long, no quantiser",
}

LOWER_IS_BETTER = frozenset(
    {
        "fpr",
        "called_toxic",
        "asr",
        "over_refusal_rate",
        "dead_share",
        "quantisation_error",
        "latency_ratio",
        "held_out_loss",
    }
)


@dataclass(frozen=True)
class Bar:
    """A rate and its interval as percentages of a bar's width."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Cell:
    """One measurement as text: the value, its n and interval, and what else must be known."""

    value: str = NOT_MEASURED
    detail: str = ""
    notes: tuple[str, ...] = ()
    bar: Bar | None = None

    @property
    def measured(self) -> bool:
        """Whether there is a number at all."""
        return self.value not in (NOT_MEASURED, REFERENCE)

    @property
    def text(self) -> str:
        """Value and detail on one line, for a terminal."""
        return f"{self.value} ({self.detail})" if self.detail else self.value


MISSING = Cell()


def label(name: str, table: Mapping[str, str]) -> str:
    """The table's words for a name, or the name itself made readable."""
    return table.get(name) or name.replace("_", " ").strip().capitalize() or "not stated"


def joined(name: str, phrase: str) -> str:
    """A name with a phrase after it, where there is one."""
    return f"{name}, {phrase}" if phrase else name


def budget(eps_255: Scalar | None) -> str:
    """A pixel budget in 1/255, in words; 255/255 allows any picture."""
    if eps_255 is None:
        return "ε not stated"
    if isinstance(eps_255, int | float) and eps_255 >= 255:
        return "ε unbounded"
    number = f"{eps_255:g}" if isinstance(eps_255, int | float) else str(eps_255)
    return f"ε {number}/255"


def attack_label(attack: Scalar, eps_255: Scalar | None) -> str:
    """An attack and its budget in words; `none` is the clean picture."""
    if attack == CLEAN:
        return "No attack, clean picture"
    if attack == UNION:
        return f"Any of them, {budget(eps_255)}"
    return f"{label(str(attack), ATTACKS.labels)}, {budget(eps_255)}"


def scene(distractors: Scalar | None) -> str:
    """What a scene holds beside its main object."""
    if distractors in (None, False, 0, "", "none", "no"):
        return "one object"
    if isinstance(distractors, int) and not isinstance(distractors, bool):
        return f"{distractors} distractor{'s' if distractors > 1 else ''}"
    return "with distractors"


def describe(condition: Mapping[str, Scalar], leave_out: Iterable[str] = ()) -> str:
    """A condition as a short phrase, without the keys that a table already shows."""
    hidden = set(leave_out)
    parts = []
    for key, value in condition.items():
        if key in hidden:
            continue
        words = key.replace("_", " ")
        if key == "eps_255":
            parts.append(budget(value))
        elif key.endswith("_255"):
            parts.append(f"{words.removesuffix(' 255')} {value:g}/255")
        elif key == "distractors":
            parts.append(scene(value))
        elif isinstance(value, bool):
            parts.append(words if value else f"not {words}")
        else:
            number = f"{value:g}" if isinstance(value, float) else str(value)
            parts.append(f"{words} {number}")
    return ", ".join(parts)


def duration(seconds: float) -> str:
    """Seconds in the unit one would say them in."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    hours, rest = divmod(whole, 3600)
    minutes, left = divmod(rest, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {left} s"


def format_number(record: Record, value: float) -> str:
    """A value of this record's metric, in its unit."""
    if record.is_rate or record.metric == "dead_share":
        return f"{100 * value:.1f} %"
    if record.metric == "stage_seconds":
        return duration(value)
    if record.metric.endswith("_ratio"):
        return f"{value:.3f} ×"
    if record.metric.endswith("_mb"):
        return f"{value:,.0f} MB"
    if record.metric == "perplexity":
        return f"{value:,.1f}"
    if record.metric == "quantisation_error":
        return f"{value:#.3g}"
    return f"{value:.4g}"


def cell(record: Record, leave_out: Iterable[str] | None = None) -> Cell:
    """The cell of a record.

    Args:
        record: the measurement.
        leave_out: condition keys that the table shows elsewhere; the others are noted in
            the cell. None: note no condition.
    """
    parts = []
    if record.n > 1 or record.is_rate:
        parts.append(f"n {record.n}")
    bar = None
    if record.low is not None and record.high is not None:
        parts.append(interval(record))
        if record.is_rate:
            bar = Bar(100 * record.value, 100 * record.low, 100 * record.high)
    notes = []
    if leave_out is not None and (extra := describe(record.condition, leave_out)):
        notes.append(extra)
    if record.threat_model != "none":
        notes.append(THREAT + record.threat_model.replace("_", " "))
    return Cell(format_number(record, record.value), ", ".join(parts), tuple(notes), bar)


def interval(record: Record) -> str:
    """The 95 % interval of a record, the unit written once."""
    if record.low is None or record.high is None:
        return ""
    low, high = format_number(record, record.low), format_number(record, record.high)
    for unit in (" %", " ×", " MB"):
        if low.endswith(unit):
            return f"{low.removesuffix(unit)}–{high}"
    return f"{low}–{high}"


def cells(records: Iterable[Record], leave_out: Iterable[str] | None = None) -> tuple[Cell, ...]:
    """One cell a record, told apart by seed where that is all that differs."""
    measured = list(records)
    if not measured:
        return (MISSING,)
    if len(measured) == 1:
        return (cell(measured[0], leave_out),)
    made = []
    for record in measured:
        plain = cell(record, leave_out)
        notes = (*plain.notes, f"seed {record.seed}")
        made.append(Cell(plain.value, plain.detail, notes, plain.bar))
    return tuple(made)

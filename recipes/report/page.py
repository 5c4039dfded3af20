"""One self-contained HTML page from a record file.

The file is what `vqguard.records.write_records` writes. Its metadata and sections:

- `metadata`: `title`, `created`, `command`, `seed`, `model`, `recipe` (mapping), `machine`
  (mapping), `threat_models` (name to one sentence), `notes` (list of sentences), `levels`
  ("semantic": the page is that of a judge alone);
- `series`: `roc` (list of `{tau, fpr, tpr}`), `curves` (category to a list of
  `{tau, fpr, tpr, precision}`), `training` (stage to a list of
  `{step, loss, patch_perplexity, ...}`), `attack_losses` (label to a list of numbers);
- `semantic_codes`: list of `{code, category, probability, counts: {category: n}}`;
- `pictures`: list of `{file, caption, group}`, files inside `pictures/` beside the record file;
- `mistakes`: list of `{kind, shown, file, why, examples}`: what a picture is, an
  `explain.Explained` as plain values, and calibration images of its code as `{file, labels}`.

Every number of the page comes from a record. What was not measured says so.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml

from vqguard.errors import ConfigError, DataError, ImageError
from vqguard.files import replace_text
from vqguard.images import open_image
from vqguard.recipes.report.cells import NOT_MEASURED, SUBJECT_LABELS, label
from vqguard.recipes.report.cells import describe as describe_condition
from vqguard.recipes.report.explain import Explained
from vqguard.recipes.report.headline import SummaryRow, format_summary, headline, summary_table
from vqguard.recipes.report.plots import attack_plot, curves_plot, roc_plot, training_plot
from vqguard.recipes.report.selections import distinct
from vqguard.recipes.report.tables import TABLES
from vqguard.recipes.report.templates import rendered
from vqguard.records import Record, RecordFile, read_record_file
from vqguard.strict import StrictData

__all__ = ["SummaryRow", "format_summary", "render_report", "summary_table"]

NOT_RECORDED = "not recorded"


@dataclass(frozen=True)
class CodeRow:
    """A row of the semantic-code table."""

    code: int
    category: str
    probability: float
    counts: tuple[int, ...]
    flagged: bool


@dataclass(frozen=True)
class Picture:
    """A picture of the page; no `source` where its file cannot be shown."""

    caption: str
    source: str | None
    problem: str = ""
    group: str = ""


@dataclass(frozen=True)
class ExampleEntry(StrictData):
    """A calibration image beside a mistake."""

    file: str
    labels: tuple[str, ...]


@dataclass(frozen=True)
class MistakeEntry(StrictData):
    """One of a record file's `mistakes`."""

    kind: Literal["false positive", "miss"]
    shown: str
    file: str
    why: Explained
    examples: tuple[ExampleEntry, ...] = ()


@dataclass(frozen=True)
class MistakeRow:
    """A false positive or a miss, with its reasons."""

    kind: str
    picture: Picture
    why: Explained
    examples: list[Picture]
    """Calibration images that were counted in its code, the nearest first."""


def render_report(report_json: Path, out_html: Path) -> None:
    """Renders a record file as one HTML file that loads nothing from elsewhere.

    Args:
        report_json: the record file, with `pictures/` beside it.
        out_html: the page; it is written whole or not at all.

    Raises:
        DataError: if the record file or one of its sections is not valid.
        OSError: if the page cannot be written.
    """
    report_json, out_html = Path(report_json), Path(out_html)
    file = read_record_file(report_json)
    alone = file.metadata.get("levels") == "semantic"
    page = rendered(
        "judge.html.j2" if alone else "page.html.j2",
        **_tables(file.records),
        **_figures(file.sections.get("series", {})),
        **_codes(file.sections.get("semantic_codes", [])),
        **_facts(file),
        pictures=_pictures(file.sections.get("pictures", []), report_json.parent),
        mistakes=_mistakes(file.sections.get("mistakes", []), report_json.parent),
        not_measured=NOT_MEASURED,
        label=label,
        subject_labels=SUBJECT_LABELS,
        describe=describe_condition,
    )
    out_html.parent.mkdir(parents=True, exist_ok=True)
    replace_text(out_html, page)


def _tables(records: Sequence[Record]) -> dict[str, Any]:
    return {
        "records": records,
        "headline": headline(records),
        **{name: make(records) for name, make in TABLES.items()},
    }


def _figures(series: Mapping[str, Any]) -> dict[str, Any]:
    roc = _list(series.get("roc", []), "series.roc")
    training = _mapping(series.get("training", {}), "series.training")
    losses = _mapping(series.get("attack_losses", {}), "series.attack_losses")
    curves = {
        stage: training_plot(stage, _list(points, f"series.training.{stage}"))
        for stage, points in training.items()
    }
    for name, values in losses.items():
        _list(values, f"series.attack_losses.{name}")
    drawn = {name: values for name, values in losses.items() if values}
    by_category = _mapping(series.get("curves", {}), "series.curves")
    for name, points in by_category.items():
        _list(points, f"series.curves.{name}")
    return {
        "roc": roc_plot(roc) if roc else None,
        "training": {stage: curve for stage, curve in curves.items() if curve},
        "attack_losses": attack_plot(drawn) if drawn else None,
        "curves": curves_plot(by_category) if by_category else None,
    }


def _codes(entries: Sequence[Any]) -> dict[str, Any]:
    rows = []
    categories = distinct([], _counted(entries))
    # The neutral column closes the table: it is what the others are held against.
    categories = [c for c in categories if c != "neutral"] + ["neutral"] * ("neutral" in categories)
    for index, entry in enumerate(entries):
        where = f"semantic_codes[{index}]"
        try:
            counts = {str(k): int(v) for k, v in entry["counts"].items()}
            category = str(entry["category"])
            rows.append(
                CodeRow(
                    code=int(entry["code"]),
                    category=category,
                    probability=float(entry["probability"]),
                    counts=tuple(counts.get(name, 0) for name in categories),
                    flagged=category != "neutral",
                )
            )
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise DataError(
                f"{where}: expected code, category, probability and counts, got {entry!r}"
            ) from error
    used = [row for row in rows if sum(row.counts) > 0]
    used.sort(key=lambda row: (not row.flagged, row.category, -sum(row.counts), row.code))
    return {
        "codes": used,
        "code_categories": categories,
        "codes_flagged": sum(row.flagged for row in used),
    }


def _counted(entries: Sequence[Any]) -> list[str]:
    names = []
    for entry in entries:
        counts = entry.get("counts") if isinstance(entry, Mapping) else None
        if isinstance(counts, Mapping):
            names += [str(name) for name in counts]
    return names


def _facts(file: RecordFile) -> dict[str, Any]:
    metadata = file.metadata
    sentences = _mapping(metadata.get("threat_models", {}), "metadata.threat_models")
    named = distinct([], (r.threat_model for r in file.records if r.threat_model != "none"))
    versions: dict[str, list[str]] = {}
    for record in file.records:
        for package, version in record.versions.items():
            versions[package] = distinct(versions.get(package, []), [version])
    run = {
        "Model": _text(metadata.get("model")),
        "Created": _text(metadata.get("created")),
        "Seed": _text(metadata.get("seed")),
        **{
            f"Version of {package}": ", ".join(installed) for package, installed in versions.items()
        },
    }
    machine = metadata.get("machine") or NOT_RECORDED
    if isinstance(machine, Mapping):
        run |= {label(str(key), {}): _text(value) for key, value in machine.items()}
    else:
        run["Machine"] = _text(machine)
    recipe = metadata.get("recipe")
    return {
        "title": str(metadata.get("title") or "VQGuard report"),
        "model": _text(metadata.get("model")),
        "created": _text(metadata.get("created")),
        "threat_models": {
            name: str(sentences.get(name) or "not described")
            for name in distinct(list(sentences), named)
        },
        "notes": [str(note) for note in _list(metadata.get("notes", []), "metadata.notes")],
        "command": str(metadata.get("command") or NOT_RECORDED),
        "run": run,
        "recipe": _text(recipe) if recipe else None,
    }


def _text(value: object) -> str:
    if value is None or value == "":
        return NOT_RECORDED
    if isinstance(value, Mapping | list):
        return str(yaml.safe_dump(value, sort_keys=False, allow_unicode=True)).rstrip()
    return str(value)


def _pictures(entries: Sequence[Any], folder: Path) -> list[Picture]:
    pictures = []
    for index, entry in enumerate(entries):
        if not isinstance(entry, Mapping) or not isinstance(entry.get("file"), str):
            raise DataError(f"pictures[{index}]: expected file and caption, got {entry!r}")
        caption, group = str(entry.get("caption", "")), str(entry.get("group", ""))
        pictures.append(_picture(entry["file"], folder, f"pictures[{index}]", caption, group))
    return pictures


def _picture(file: str, folder: Path, where: str, caption: str, group: str = "") -> Picture:
    path, allowed = folder / file, (folder / "pictures").resolve()
    if not path.resolve().is_relative_to(allowed):
        raise DataError(f"{where}: {file!r} is outside {allowed}; copy it there")
    try:
        # Decoded and encoded again: only pixels enter the page.
        image = open_image(path, min_side=1)
    except ImageError as error:
        return Picture(caption, None, f"{file}: {str(error).removeprefix(f'{path}: ')}", group)
    buffer = io.BytesIO()
    image.save(buffer, "PNG", optimize=True)
    encoded = base64.b64encode(buffer.getvalue()).decode("ascii")
    return Picture(caption, f"data:image/png;base64,{encoded}", group=group)


def _mistakes(entries: Sequence[Any], folder: Path) -> list[MistakeRow]:
    rows = []
    for index, entry in enumerate(_list(entries, "mistakes")):
        where = f"mistakes[{index}]"
        try:
            read = MistakeEntry.from_dict(entry)
        except ConfigError as error:
            raise DataError(f"{where}: {error}") from error
        picture = _picture(read.file, folder, where, read.shown)
        examples = [
            _picture(example.file, folder, where, ", ".join(example.labels))
            for example in read.examples
        ]
        rows.append(MistakeRow(read.kind, picture, read.why, examples))
    return rows


def _mapping(value: object, where: str) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise DataError(f"{where} must be a JSON object, got {type(value).__name__}")
    return value


def _list(value: object, where: str) -> Sequence[Any]:
    if not isinstance(value, list):
        raise DataError(f"{where} must be a list, got {type(value).__name__}")
    return value

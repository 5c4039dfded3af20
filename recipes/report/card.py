"""The model card of a run: what was measured, each figure with its attacker."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vqguard.adapters.catalogue import resolve_model
from vqguard.adapters.storage.card import NO_FIGURES, OTHER_MAP, model_card
from vqguard.adapters.storage.manifest import read_manifest
from vqguard.recipes.judging.recipe import JudgeRecipe
from vqguard.recipes.recipe import RetrofitRecipe
from vqguard.recipes.report.markdown import (
    INTERVALS,
    headline_markdown,
    made_by,
    markdown,
    tables_markdown,
)
from vqguard.recipes.report.tables import judge_table
from vqguard.recipes.run import JUDGE, RECIPE, model_folder
from vqguard.records import Record, read_record_file

REPORT = "report.json"


def run_card(run: Path, folder: Path) -> str:
    """README.md for `folder`, which holds the guarded model of `run`.

    Args:
        run: with `report.json`; a run that was not measured yet gets a card that says so.

    Raises:
        DataError: the report is damaged.
        ArtefactError: `folder` holds no guarded model.
    """
    name = run_base(run)
    entry = resolve_model(name)
    results = NO_FIGURES
    if (run / REPORT).is_file():
        report = read_record_file(run / REPORT)
        results = OTHER_MAP
        # reports of earlier versions do not say whose figures they hold
        judged = report.metadata.get("guard_sha256")
        if judged in (None, read_manifest(model_folder(run)).guard_sha256):
            results = measured(
                report.records,
                report.metadata.get("threat_models"),
                alone=report.metadata.get("levels") == "semantic",
            )
    return model_card(
        folder,
        title=f"{Path(name).name}, {'judged' if (run / JUDGE).is_file() else 'guarded'}",
        base=entry.location if entry.source == "hub" else None,
        results=results,
    )


def run_base(run: Path) -> str:
    """The model that a run was made from, as its recipe names it. Raises ConfigError."""
    if (run / JUDGE).is_file():
        return JudgeRecipe.from_yaml(run / JUDGE).model
    return RetrofitRecipe.from_yaml(run / RECIPE).model


def measured(records: Sequence[Record], threat_models: Any, *, alone: bool = False) -> str:
    """Markdown of a report: the threat models that act in it, its headline and its tables.

    `alone`: the report is that of a judge alone, which has one table.
    """
    if not records:
        return NO_FIGURES
    texts = threat_models if isinstance(threat_models, Mapping) else {}
    named = dict.fromkeys(r.threat_model for r in records if r.threat_model != "none")
    lines = [f"- *{name.replace('_', ' ')}*: {texts.get(name, 'not described')}" for name in named]
    legend = ["Who attacks:\n", "\n".join(lines) + "\n"] if lines else []
    if alone:
        table = markdown(judge_table(records))
        return "\n".join([f"{INTERVALS} {made_by(records)}\n", *legend, table])
    return "\n".join(
        [
            f"{INTERVALS} {made_by(records)}\n",
            *legend,
            headline_markdown(records, threat_models=True) + "\n",
            *tables_markdown(records, {}, level=3),
        ]
    ).rstrip()

"""What a judge alone catches and flags on images that it was not made from, and its report."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from vqguard.adapters.encoders.stored import ENCODER, holds_encoder
from vqguard.adapters.features import pad_semantic
from vqguard.adapters.storage.manifest import read_manifest
from vqguard.errors import ArtefactError
from vqguard.files import replace_text
from vqguard.judging.rules import JudgeRules
from vqguard.recipes.evaluation.ledger import Ledger
from vqguard.recipes.evaluation.machine import machine
from vqguard.recipes.evaluation.pictures import FOLDER
from vqguard.recipes.evaluation.result import REPORT_HTML, REPORT_JSON, VERDICTS, RetrofitResult
from vqguard.recipes.evaluation.toxic import semantic_code_table
from vqguard.recipes.judge_alone.gallery import Gallery, JudgedImage
from vqguard.recipes.judge_alone.images import images_of, parts_of
from vqguard.recipes.judge_alone.judged_model import open_judge
from vqguard.recipes.judging.both import read_global_map, screen_with_both
from vqguard.recipes.judging.recipe import JudgeRecipe
from vqguard.recipes.report.page import render_report
from vqguard.recipes.run import JUDGE, model_folder
from vqguard.recipes.run_folder import stage_seconds
from vqguard.records import write_records
from vqguard.redteam.threat import ThreatModel
from vqguard.safety_map import NEUTRAL, SafetyMap, Verdict
from vqguard.text_files import read_json

log = logging.getLogger(__name__)

JUDGES_ALONE = (
    "This guard judges alone: visual tokens are judged, not quantised. What is not flagged reaches "
    "the language model as it is, so nothing here says how it withstands an image that was "
    "optimised against it."
)
_HELD_OUT = "held out"


def rules_of(recipe: JudgeRecipe) -> JudgeRules:
    """The recipe's rules; without a file, those of its training alone."""
    return JudgeRules() if recipe.rules is None else JudgeRules.from_yaml(recipe.rules)


def measure_judge(run: Path, *, command: str) -> RetrofitResult:
    """Measure a run's judge on its held-out images and write the report (again).

    Args:
        run: a finished run's directory, whose only writer this is.
        command: what the records say makes them again.

    Raises:
        ArtefactError: the run is not finished, or its images are others by now.
    """
    recipe = JudgeRecipe.from_yaml(run / JUDGE)
    loaded = open_judge(run, recipe)
    guard = loaded.model.vqguard
    if guard.safety_map is None:
        raise ArtefactError(f"{run}: the judge has no safety map; make it again")
    images = images_of(recipe)
    tested = parts_of(images, recipe, rules_of(recipe)).tested.tolist()
    log.info("evaluation: %d held-out images", len(tested))
    opened: list[int] = []

    def pictures() -> Any:
        for number, picture in images.opened(tested, skip_bad=True):
            opened.append(number)
            yield picture

    global_map = read_global_map(run, guard)
    by_judge = screen_with_both(loaded.model, loaded.processor, pictures(), global_map)
    ledger = Ledger(command, recipe.seed)
    for stage, seconds in stage_seconds(run).items():
        ledger.value("stage_seconds", "guarded", seconds, 1, stage=stage)
    labels = [images.images[number].labels for number in opened]
    for judge, verdicts in by_judge.items():
        _measure(ledger, judge, verdicts, labels)
    own = by_judge[guard.config.judge]
    judged = [
        JudgedImage(number, images.images[number].name, images.images[number].labels, verdict)
        for number, verdict in zip(opened, own, strict=True)
    ]
    shutil.rmtree(run / FOLDER, ignore_errors=True)
    gallery = Gallery(run, judged, guard.safety_map, loaded.image_processor)
    shown = dict(images.opened(gallery.needed, skip_bad=True))
    sections = {
        "series": {"curves": _curves(guard.safety_map, own, labels)},
        "semantic_codes": semantic_code_table(guard),
        "pictures": gallery.write(shown),
    }
    return _write(run, recipe, ledger, sections, images.warnings)


def _measure(
    ledger: Ledger, judge: str, verdicts: Sequence[Verdict], labels: Sequence[tuple[str, ...]]
) -> None:
    """DSR of each category and of all, FPR of the neutral images; an image of two counts in both.

    An image counts as found when it is flagged, in whatever category.
    """
    threat = ThreatModel.TOXIC_IMAGE.value
    pairs = list(zip(verdicts, labels, strict=True))
    for category in sorted({name for names in labels for name in names} - {NEUTRAL}):
        mine = [verdict for verdict, names in pairs if category in names]
        ledger.flagged(
            "dsr", mine, threat_model=threat, category=category, images=_HELD_OUT, judge=judge
        )
    toxic = [verdict.flagged for verdict, names in pairs if names != (NEUTRAL,)]
    if toxic:
        ledger.rate(
            "dsr",
            "guarded",
            toxic,
            threat_model=threat,
            category="all",
            images=_HELD_OUT,
            judge=judge,
        )
    neutral = [verdict for verdict, names in pairs if names == (NEUTRAL,)]
    if neutral:
        ledger.flagged("fpr", neutral, scenes=_HELD_OUT, judge=judge)


def _curves(
    safety_map: SafetyMap, verdicts: Sequence[Verdict], labels: Sequence[tuple[str, ...]]
) -> dict[str, list[dict[str, float]]]:
    """By category the points of its ROC and precision-recall curve, over the threshold.

    `tau`, `fpr`, `tpr` (the recall) and `precision`, its own images against the neutral ones.
    """
    codes, mask = pad_semantic([torch.tensor(verdict.codes) for verdict in verdicts])
    neutral = [n for n, names in enumerate(labels) if names == (NEUTRAL,)]
    curves: dict[str, list[dict[str, float]]] = {}
    for category in safety_map.categories:
        mine = [n for n, names in enumerate(labels) if category in names]
        if not mine or not neutral:
            continue
        chosen = torch.tensor([*mine, *neutral])
        points = safety_map.roc(
            codes[chosen],
            [category] * len(mine) + [NEUTRAL] * len(neutral),
            None if mask is None else mask[chosen],
        )
        curves[category] = [
            {"tau": tau, "fpr": fpr, "tpr": tpr, "precision": _precision(fpr, tpr, mine, neutral)}
            for tau, fpr, tpr in points
        ]
    return curves


def _precision(fpr: float, tpr: float, toxic: Sequence[int], neutral: Sequence[int]) -> float:
    """The share of toxic images among the flagged; 1 where none is flagged."""
    found, alarms = tpr * len(toxic), fpr * len(neutral)
    return found / (found + alarms) if found + alarms else 1.0


def _write(
    run: Path,
    recipe: JudgeRecipe,
    ledger: Ledger,
    sections: dict[str, Any],
    warnings: Sequence[str],
) -> RetrofitResult:
    threats = {record.threat_model for record in ledger.records} - {"none"}
    metadata = {
        "title": f"{recipe.model}: a judge alone",
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": ledger.command,
        "seed": recipe.seed,
        "model": recipe.model,
        "levels": "semantic",
        "guard_sha256": _guard_sha256(run),
        "recipe": recipe.to_dict(),
        "machine": machine(),
        "threat_models": {
            threat.value: threat.sentence
            for threat in (ThreatModel.TOXIC_IMAGE,)
            if threat.value in threats
        },
        "notes": [JUDGES_ALONE, *(f"{text[:1].upper()}{text[1:]}." for text in warnings)],
    }
    report_json, report_html = run / REPORT_JSON, run / REPORT_HTML
    lines = "".join(json.dumps(verdict) + "\n" for verdict in ledger.verdicts)
    replace_text(run / VERDICTS, lines)
    write_records(report_json, ledger.records, metadata, sections)
    render_report(report_json, report_html)
    return RetrofitResult(run, report_html, report_json, ledger.records)


def _guard_sha256(run: Path) -> str:
    folder = model_folder(run)
    if holds_encoder(folder):
        return str(read_json(folder / ENCODER, ArtefactError)["guard_sha256"])
    return read_manifest(folder).guard_sha256

"""Everything a report says about a run, undefended against guarded, from the models themselves."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from vqguard.adapters.storage.folder_lock import only_writer
from vqguard.adapters.storage.manifest import read_manifest
from vqguard.errors import ConfigError
from vqguard.files import replace_text
from vqguard.recipes.benchmarks.benchmark import Benchmark, Tests, open_tests
from vqguard.recipes.data.labelled_images import LeftOutImages
from vqguard.recipes.data.samples import AttackCase, World, pictures_of
from vqguard.recipes.evaluation import pictures
from vqguard.recipes.evaluation.codebooks import measure_codebooks
from vqguard.recipes.evaluation.heldout import measure_held_out, measure_own_latency
from vqguard.recipes.evaluation.jailbreak import (
    Jailbreak,
    JailbreakFindings,
    measure_guarded,
)
from vqguard.recipes.evaluation.ledger import Ledger
from vqguard.recipes.evaluation.machine import machine
from vqguard.recipes.evaluation.mistakes import explain_mistakes, worst_mistakes
from vqguard.recipes.evaluation.result import (
    REPORT_HTML,
    REPORT_JSON,
    VERDICTS,
    RetrofitResult,
)
from vqguard.recipes.evaluation.screened import ScreenedSet, Screening, own_sets, world_sets
from vqguard.recipes.evaluation.text import measure_text
from vqguard.recipes.evaluation.toxic import (
    measure_screening,
    semantic_code_table,
)
from vqguard.recipes.evaluation.ungraded import answer_ungraded
from vqguard.recipes.evaluation.utility import measure_utility
from vqguard.recipes.evaluation.world import CODEBOOK_IMAGES, WorldParts
from vqguard.recipes.judge_alone.measure import measure_judge
from vqguard.recipes.models import CONTROL, base_model
from vqguard.recipes.placement import place
from vqguard.recipes.recipe import RetrofitRecipe
from vqguard.recipes.report.page import render_report
from vqguard.recipes.run import JUDGE, RECIPE, LoadedRun, model_folder, open_run
from vqguard.recipes.run_folder import stage_seconds
from vqguard.recipes.run_samples import checks_of
from vqguard.recipes.sources import source_of, world_of
from vqguard.recipes.training.progress import read_steps
from vqguard.records import write_records
from vqguard.redteam import threat_models

log = logging.getLogger(__name__)


def evaluate_run(run: Path, *, command: str, overrides: tuple[str, ...] = ()) -> RetrofitResult:
    """Measure a run's model and write its report again.

    Args:
        run: a finished run's directory.
        command: what the records say makes them again.
        overrides: `evaluation.…=value` changes to the run's recipe, for this report only.

    Raises:
        ConfigError: an override outside `evaluation`, or another process writes into the run.
        ArtefactError: the run is not finished, or cannot be written.
    """
    with only_writer(run):
        return measure_run(run, command=command, overrides=overrides)


def measure_run(run: Path, *, command: str, overrides: tuple[str, ...] = ()) -> RetrofitResult:
    """`evaluate_run` for the run's only writer."""
    wrong = [o for o in overrides if not o.strip().startswith("evaluation.")]
    if wrong:
        raise ConfigError(
            f"only evaluation.… can be set for an evaluation, got {', '.join(wrong)}: the rest of "
            "the recipe made the model and stays"
        )
    if (run / JUDGE).is_file():
        if overrides:
            raise ConfigError(
                f"{run} has a judge alone, whose evaluation has no settings: leave --set out"
            )
        return measure_judge(run, command=command)
    loaded = open_run(run)
    recipe = RetrofitRecipe.from_yaml(run / RECIPE).override(overrides)
    ledger = Ledger(command, recipe.seed)
    report = _Report(run, recipe, loaded, ledger)
    for stage, seconds in stage_seconds(run).items():
        subject = "finetuned_control" if stage.startswith(f"{CONTROL}_") else "guarded"
        name = stage.removeprefix(f"{CONTROL}_")
        ledger.value("stage_seconds", subject, seconds, 1, stage=name)
    world = world_of(recipe)
    if world is None:
        report.held_out()
    else:
        report.world(world)
    return report.write()


class _Report:
    """The report in the making."""

    def __init__(
        self, run: Path, recipe: RetrofitRecipe, loaded: LoadedRun, ledger: Ledger
    ) -> None:
        self.run = run
        self.recipe = recipe
        self.model = loaded.model
        self.processor = loaded.processor
        self.ledger = ledger
        self.findings = JailbreakFindings()
        self.sections: dict[str, Any] = {
            "series": {
                "training": {
                    stage: read_steps(run / stage / "metrics.jsonl")
                    for stage in ("stage1", "stage2")
                }
            },
            "semantic_codes": semantic_code_table(self.model.vqguard),
            "pictures": [],
            "mistakes": [],
        }

    def world(self, world: World) -> None:
        """All measurements, where the data's world is known."""
        parts = WorldParts(
            self.run,
            self.recipe,
            world,
            self.processor,
            self.ledger.command,
            self.model.dtype,
            self.model,
        )
        found = parts.measure()
        self.ledger.records += found.ledger.records
        self.ledger.verdicts += found.ledger.verdicts
        self.findings = found.findings
        self.sections["series"]["roc"] = found.roc
        self.sections["series"]["attack_losses"] = self.findings.losses
        self.sections["pictures"] = [
            *pictures.code_map(self.run, self.model, self.processor, parts.images[1]),
            *pictures.adversarial(self.run, self.findings.adversarial),
        ]
        self._explain(world_sets(world, *self._screened_counts))

    @property
    def _screened_counts(self) -> tuple[int, int]:
        """How many toxic images a category are screened, and how many neutral ones a kind."""
        return self.recipe.evaluation.toxic_per_category, self.recipe.evaluation.neutral

    def _screen(self, tests: Screening) -> None:
        """Screen images of a user's own, by category, and explain what is wrong."""
        log.info("evaluation: screening")
        counts = self._screened_counts
        measure_screening(self.ledger, self.model, self.processor, tests, *counts)
        self._explain(own_sets(tests, *counts))

    def _explain(self, sets: Sequence[ScreenedSet]) -> None:
        judge = self.model.vqguard.config.judge
        mistakes = worst_mistakes(sets, self.ledger.verdicts, judge)
        self.sections["mistakes"] = explain_mistakes(self.run, self.model, self.processor, mistakes)

    def _base(self) -> Any:
        """The undefended model, with numbers of the guarded one's kind."""
        return place(base_model(self.recipe, self.model.dtype)[0]).eval()

    def held_out(self) -> None:
        """What can be measured on a user's data, and on the tests that they brought."""
        # The training has refused or listed bad entries; what is left are the run's samples.
        checks = checks_of(self.recipe, self.run)
        checks.finished = True
        source = source_of(self.recipe, skip_bad=True, checks=checks)
        base = self._base()
        measure_held_out(self.ledger, "base", base, self.processor, source, self.recipe)
        measure_held_out(self.ledger, "guarded", self.model, self.processor, source, self.recipe)
        samples = source.captions(CODEBOOK_IMAGES)
        openers = [opener for sample in samples for opener in sample.shown]
        images = [picture for opener in openers for picture in pictures_of(opener)]
        measure_codebooks(self.ledger, self.model, self.processor, images)
        log.info("evaluation: latency")
        measure_own_latency(self.ledger, self.model, self.processor, source, self.recipe)
        if self.recipe.evaluation.held_out is None:
            self._own_folders()
        else:
            folder, links = self.recipe.evaluation.held_out, self.recipe.follow_links
            self._own_tests(open_tests(folder, follow_links=links), base)

    def _own_folders(self) -> None:
        """Screening of the images that were left out of the calibration."""
        folder = self.recipe.calibration_images
        if folder is None or self.model.vqguard.safety_map is None:
            return
        tests = LeftOutImages(folder, self.recipe.calibration_labels)
        if tests.categories:
            self._screen(tests)

    def _own_tests(self, tests: Tests, base: Any) -> None:
        settings = self.recipe.evaluation
        text = tests.text
        if text is not None:
            for subject, model in (("base", base), ("guarded", self.model)):
                measure_text(self.ledger, subject, model, self.processor, text)
        if self.model.vqguard.safety_map is None:
            log.warning(
                "the guarded model has no safety map, so it refuses to judge pictures: %s was read "
                "for its text only. Set calibration_images.",
                tests.folder,
            )
            return
        tasks = tests.questions(settings.utility)
        for subject, model in (("base", base), ("guarded", self.model)):
            log.info("evaluation: utility, %s", subject)
            measure_utility(self.ledger, subject, model, self.processor, tasks)
            if isinstance(tests, Benchmark):
                answer_ungraded(
                    self.ledger, subject, model, self.processor, tests, settings.utility, self.run
                )
        if tests.categories:
            self._screen(tests)
        cases = tests.attack_cases(Jailbreak.cases_needed(settings.attack))
        if cases:
            self._attacks(cases, base)
            self.sections["series"]["attack_losses"] = self.findings.losses

    def _attacks(self, cases: Sequence[AttackCase], base: Any) -> None:
        recipe = self.recipe.evaluation.attack
        jailbreak = Jailbreak(recipe, cases, self.processor, self.recipe.seed)
        jailbreak.measure(self.ledger, "base", base, self.findings)
        measure_guarded(jailbreak, self.ledger, self.model, self.processor, self.findings)

    def write(self) -> RetrofitResult:
        threats = {r.threat_model for r in self.ledger.records}
        metadata = {
            "title": f"{self.recipe.model}: retrofit report",
            "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "command": self.ledger.command,
            "seed": self.recipe.seed,
            "model": self.recipe.model,
            "guard_sha256": read_manifest(model_folder(self.run)).guard_sha256,
            "recipe": self.recipe.to_dict(),
            "machine": machine(),
            "threat_models": {t.value: t.sentence for t in threat_models() if t.value in threats},
            "notes": self.findings.notes,
        }
        report_json = self.run / REPORT_JSON
        lines = "".join(json.dumps(verdict) + "\n" for verdict in self.ledger.verdicts)
        replace_text(self.run / VERDICTS, lines)
        write_records(report_json, self.ledger.records, metadata, self.sections)
        report_html = self.run / REPORT_HTML
        render_report(report_json, report_html)
        return RetrofitResult(self.run, report_html, report_json, self.ledger.records)

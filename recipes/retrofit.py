"""The whole line: undefended model → features → k-means → stage 1 → stage 2 → map → report.

Each part leaves its mark in the run's directory when it is whole; a resumed run starts at the
first part without one, and inside a stage at its last checkpoint.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import torch

from vqguard.adapters import get_adapter, guard_model, load_guarded, resolve_model
from vqguard.adapters.storage.folder_lock import only_writer
from vqguard.errors import ConfigError
from vqguard.files import replace_text
from vqguard.names import printable
from vqguard.recipes.calibrate import PAPER_RULES, calibrate_model
from vqguard.recipes.control import Control
from vqguard.recipes.data.code_cache import CodeCache
from vqguard.recipes.data.encoding import EncodedSamples
from vqguard.recipes.data.feature_cache import CacheIdentity, FeatureCache
from vqguard.recipes.data.picture_codes import NoCodesError, shared_codes
from vqguard.recipes.data.records.lazy import LazySamples
from vqguard.recipes.data.samples import Sample
from vqguard.recipes.evaluate import measure_run
from vqguard.recipes.evaluation.result import REPORT_HTML, REPORT_JSON, RetrofitResult
from vqguard.recipes.image_batches import collect_features
from vqguard.recipes.judging.both import save_global_map
from vqguard.recipes.judging.examples import ExampleKeeper
from vqguard.recipes.judging.regional import HALF_WAY, train_judge
from vqguard.recipes.models import base_model
from vqguard.recipes.placement import loading, place
from vqguard.recipes.planning.plan import plan
from vqguard.recipes.processes import first_alone, is_first, together, wait
from vqguard.recipes.public_sizes import check_loaded
from vqguard.recipes.recipe import RetrofitRecipe, StageRecipe
from vqguard.recipes.run import save_run_model
from vqguard.recipes.run_folder import RunFolder, is_guarded
from vqguard.recipes.run_samples import RunSamples
from vqguard.recipes.training.codebooks import check_codebooks, guard_for, start_codebooks
from vqguard.recipes.training.nf4 import require_bitsandbytes
from vqguard.recipes.training.stage1 import Stage1Trainer
from vqguard.recipes.training.stage2 import Stage2Trainer
from vqguard.recipes.training.trainer import StageTrainer
from vqguard.search.backend_table import AUTO, backend_class
from vqguard.verdict_rules import verdict_rule

log = logging.getLogger(__name__)

STARTED, FEATURES, CODES, SKIPPED = "start", "features", "codes", "skipped.txt"
_CHECKED_SAMPLES = 1000


def retrofit(
    recipe: RetrofitRecipe,
    output: Path,
    *,
    resume: bool = False,
    skip_bad: bool = False,
    command: str,
) -> RetrofitResult:
    """Retrofit the guard on a model, from its undefended weights to the report.

    Args:
        recipe: everything that decides the run.
        output: the run's directory.
        resume: go on where an earlier run of the same recipe stopped.
        skip_bad: leave unusable samples and images out and list them in `skipped.txt`.
        command: what the records say makes them again.

    Where a launcher started several processes, all of them train; the first does the rest, and the
    others return a result without records before the evaluation.

    Raises:
        ConfigError: `output` is not empty, holds another recipe's run, or is being written by
            another process.
        TrainingError: another process of the run was lost.
        VQGuardError: as each part raises it; what was finished before stays.
    """
    with ExitStack() as held:
        with together():
            first = is_first()
            folder = RunFolder(output)
            first_alone(lambda: held.enter_context(only_writer(output)))
            first_alone(lambda: folder.refuse_other_runs(recipe, resume=resume))
            refuse_early(recipe)
            # The first process checks the data, before anything is written; the others take over
            # what it found.
            checked: list[RunSamples] = []
            read = partial(RunSamples, recipe, skip_bad=skip_bad, run=output)
            first_alone(lambda: checked.append(read()))
            first_alone(lambda: checked[0].calibration.check())

            def begin() -> None:
                folder.open(recipe)
                checked[0].keep_checks(output)

            first_alone(begin)
            run = _Run(recipe, folder, checked[0] if checked else read(), resume=resume)
            run.load_base()
            run.start()
            run.cache_features()
            with run.control.beside(run.features_folder):
                run.train_stage1()
                run.encode_pictures()
                run.train_stage2()
            first_alone(run.calibrate)
            run.control.train(run.cache)
            first_alone(run.finish)
        if not first:
            return RetrofitResult(output, output / REPORT_HTML, output / REPORT_JSON)
        return measure_run(output, command=command)


def refuse_early(recipe: RetrofitRecipe) -> None:
    """Refuse now what would be refused hours from here."""
    if recipe.stage1.nf4 or recipe.stage2.nf4:
        require_bitsandbytes()
    verdict_rule(recipe.calibration.rule)
    search = recipe.guard.search
    problem = None if search == AUTO else backend_class(search).problem()
    if problem:
        raise ConfigError(
            f"guard.search={search} does not run here: {problem}. Install what it needs ("
            "pip install 'vqguard[cpu]' for faiss), or set it to auto."
        )


class _Run:
    """A retrofit in the making. Its steps are methods, in the order in which they are taken."""

    def __init__(
        self, recipe: RetrofitRecipe, folder: RunFolder, samples: RunSamples, *, resume: bool
    ) -> None:
        self.recipe = recipe
        self.folder = folder
        self.samples = samples
        self.resume = resume
        self.control = Control(recipe, folder, samples, resume)
        self.model: Any = None
        self.processor: Any = None
        self.cache: FeatureCache | None = None
        self.codes: CodeCache | None = None

    def load_base(self) -> None:
        """The undefended model."""
        torch.manual_seed(self.recipe.seed)
        self.model, self.processor = base_model(self.recipe)
        warn_of_other_sizes(self.recipe, self.model)
        samples = LazySamples.joined([self.samples.captions, self.samples.instructions])
        seams = get_adapter(self.model).seams(self.model)
        if samples.facts.filmed.any() and all(seam.modality != "video" for seam in seams):
            raise ConfigError(
                f"{self.recipe.model}: some samples show videos, and no guarded way for them is "
                "known in this family. Leave them out of the data."
            )

    def start(self) -> None:
        """Install a guard whose codebooks start on k-means centres.

        The first process starts them, so that they do not depend on how many there are.
        """
        started = self.folder.stage(STARTED)
        was_there = is_guarded(started)
        wait()  # all have looked before it is written
        if not was_there:
            first_alone(lambda: self._start(started))
        if was_there or not is_first():
            self._load(started)

    def cache_features(self) -> None:
        """The vision encoder's outputs for both stages and the control, if the recipe wants it."""
        folder = self.features_folder
        if folder is None or self._is_trained():
            return
        samples = LazySamples.joined([self.samples.captions, self.samples.instructions])

        def build() -> None:
            place(self.model)
            self.cache = FeatureCache.build(folder, self.model, self.processor, samples)

        first_alone(lambda: self.folder.timed("feature_cache", build))
        if self.cache is None:
            self.cache = FeatureCache(folder, CacheIdentity.of(self.model, self.processor))

    @property
    def features_folder(self) -> Path | None:
        """Where the vision encoder's outputs are kept; None where the recipe does not want it."""
        features = self.recipe.features
        return (features.folder or self.folder.path / FEATURES) if features.cache else None

    def train_stage1(self) -> None:
        """Projector and codebooks, from the last checkpoint if there is one."""
        recipe, captions = self.recipe.stage1, self.samples.captions
        self._train_stage("stage1", Stage1Trainer, recipe, captions, self._check_codebooks)

    def encode_pictures(self) -> None:
        """Stage 2's pictures as codes, unless the recipe or the model is against it."""
        wanted = self.recipe.stage2.from_codes
        if wanted is False or is_guarded(self.folder.result("stage2")):
            return
        folder = self.folder.path / CODES
        data = self._encoded(self.recipe.stage2, self.samples.instructions)

        place(self.model)
        try:
            self.codes = self.folder.timed("codes", lambda: shared_codes(folder, self.model, data))
        except NoCodesError as error:
            if wanted is True:
                raise ConfigError(
                    f"stage2.from_codes=true: {error}. Set it to auto or false."
                ) from error
            log.warning("stage 2 does not train from codes: %s", error)

    def train_stage2(self) -> None:
        """The language model, from the last checkpoint if there is one."""
        recipe, instructions = self.recipe.stage2, self.samples.instructions
        self._train_stage("stage2", Stage2Trainer, recipe, instructions, codes=self.codes)
        self.codes = None

    def calibrate(self) -> None:
        """The safety map, from the world's images or the user's folders.

        A regional judge is trained first. Then the global judge's map goes into a file of its own:
        the report tells what either catches.
        """
        numbers = self.recipe.calibration
        images = self.samples.calibration
        place(self.model)
        if not images.there_are:
            log.warning(
                "no calibration images: the model quantises but has no safety map and refuses to "
                "screen. Give it one with `vqguard calibrate %s --images DIR`.",
                self.folder.path,
            )
            return
        rules = self.recipe.rules
        is_own = self.model.vqguard.regional is None
        keeper = ExampleKeeper() if self.recipe.keep_examples else None
        made = self.folder.timed(
            "calibration",
            lambda: calibrate_model(
                self.model,
                self.processor,
                images.counted(),
                tau=numbers.tau,
                fpr=numbers.fpr,
                rule=numbers.rule,
                rules=rules if is_own else PAPER_RULES,
                seed=self.recipe.seed,
                level="semantic",
                keeper=keeper if is_own else None,
            ),
        )
        if is_own:
            if keeper is not None:
                keeper.write(self.folder.path, made.map)
            return
        save_global_map(self.folder.path, made.map)
        taught = self.folder.timed(
            "regional_judge",
            lambda: train_judge(
                self.model,
                self.processor,
                images.taught(),
                self.recipe.regional,
                rules=rules,
                seed=self.recipe.seed,
                checkpoint=self.folder.path / HALF_WAY,
                keeper=keeper,
            ),
        )
        if keeper is not None:
            keeper.write(self.folder.path, taught)

    def finish(self) -> None:
        """Write the guarded model, and the list of what was skipped."""
        self.model.eval()
        if self.recipe.features.folder is None:
            # Of an attempt that was stopped here as well: then no cache was opened.
            shutil.rmtree(self.folder.path / FEATURES, ignore_errors=True)
        shutil.rmtree(self.folder.path / CODES, ignore_errors=True)
        save_run_model(self.folder.path, self.model, self.processor)
        (self.folder.path / HALF_WAY).unlink(missing_ok=True)
        skipped = self.samples.skipped
        if skipped:
            path = self.folder.path / SKIPPED
            replace_text(path, "\n".join(map(printable, skipped)) + "\n")
            log.warning("%d skipped; see %s", len(skipped), path)

    # -- inside the steps

    def _start(self, folder: Path) -> None:
        recipe, seed, starters = self.recipe.guard, self.recipe.seed, self.samples.starters
        each = max(1, -(-recipe.start_points * recipe.patch_codes // len(starters)))
        place(self.model)
        guard = guard_for(self.model, recipe, seed=seed)
        guard_model(self.model, guard, self.processor)
        patches, semantic = self.folder.timed(
            "features",
            lambda: collect_features(
                self.model,
                self.processor,
                self.samples.pictures(starters),
                tokens_an_image=each,
                seed=seed,
            ),
        )
        self.folder.timed(
            "kmeans", lambda: start_codebooks(guard, patches, semantic, recipe, seed=seed)
        )
        self.model.save_pretrained(folder)

    def _load(self, folder: Path) -> None:
        spread = loading(self.recipe.device_map)
        self.model = load_guarded(folder, processor=self.processor, **spread)

    def _train_stage(
        self,
        name: str,
        kind: type[StageTrainer],
        recipe: StageRecipe,
        samples: Sequence[Sample],
        check: Callable[[], None] | None = None,
        codes: CodeCache | None = None,
    ) -> None:
        """Train a stage that is not done, and keep its model where `check` raises nothing."""
        result = self.folder.result(name)
        if is_guarded(result):
            self._load(result)
            return

        def keep() -> None:
            if check is not None:
                check()
            self.model.save_pretrained(result)

        train = partial(self._train, kind, self.model, recipe, samples, name, codes)
        self.model = self.folder.timed(name, train)
        first_alone(keep)

    def _check_codebooks(self) -> None:
        place(self.model)
        checked = self.samples.pictures(self.samples.captions[:_CHECKED_SAMPLES])
        check_codebooks(self.model, self.processor, checked)

    def _train(
        self,
        kind: type[StageTrainer],
        model: Any,
        recipe: StageRecipe,
        samples: Sequence[Sample],
        name: str,
        codes: CodeCache | None = None,
    ) -> Any:
        data = self._encoded(recipe, samples, codes)
        trainer = kind(model, recipe, data, self.folder.stage(name), seed=self.recipe.seed)
        return trainer.run(resume=self.resume)

    def _encoded(
        self, recipe: StageRecipe, samples: Sequence[Sample], codes: CodeCache | None = None
    ) -> EncodedSamples:
        return EncodedSamples(samples, self.processor, recipe.max_length, self.cache, codes)

    def _is_trained(self) -> bool:
        """Whether neither stage nor the control has anything left to train."""
        return not self.control.missing and is_guarded(self.folder.result("stage2"))


def warn_of_other_sizes(recipe: RetrofitRecipe, model: Any) -> None:
    """Say where the package's sizes are not the checkpoint's, and what it takes with its own."""
    different = check_loaded(model, resolve_model(recipe.model).location)
    if not different:
        return
    again = plan(recipe, gpus=int(torch.cuda.is_available()), config=model.config)
    totals = [f"stage {stage.stage} {stage.memory.total / 1e9:.1f} GB" for stage in again.stages]
    log.warning(
        "%s has other sizes than its plan was made with: %s. Training goes by the checkpoint; "
        "planned again: %s.",
        recipe.model,
        "; ".join(different),
        ", ".join(totals),
    )

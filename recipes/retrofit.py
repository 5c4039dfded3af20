"""The whole line: undefended model → features → k-means → stage 1 → stage 2 → map → report.

Each part leaves its mark in the run's directory when it is whole; a resumed run starts at the
first part without one, and inside a stage at its last checkpoint.
"""

from __future__ import annotations

import functools
import json
import logging
import shutil
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from vqguard.adapters import build_guard, guard_model, load_guarded, unguard_model
from vqguard.adapters.storage.manifest import MANIFEST
from vqguard.errors import ConfigError, InputError
from vqguard.files import RESUME_OR_ANOTHER, replace_text, require_empty
from vqguard.quantizer import use_estimator
from vqguard.recipes.calibrate import calibrate_model, read_categories
from vqguard.recipes.data.encoding import EncodedSamples
from vqguard.recipes.data.feature_cache import CacheIdentity, FeatureCache
from vqguard.recipes.data.samples import Sample
from vqguard.recipes.evaluate import (
    REPORT_HTML,
    REPORT_JSON,
    TIMES,
    RetrofitResult,
    evaluate_run,
)
from vqguard.recipes.evaluation.codebooks import usage
from vqguard.recipes.evaluation.heldout import split_held_out
from vqguard.recipes.image_batches import collect_features
from vqguard.recipes.models import CONTROL, base_model, source_of, world_of
from vqguard.recipes.placement import loading, place
from vqguard.recipes.processes import first_alone, is_first, together, wait
from vqguard.recipes.recipe import RetrofitRecipe, StageRecipe
from vqguard.recipes.run import MODEL, RECIPE, save_run_model
from vqguard.recipes.training.nf4 import require_bitsandbytes
from vqguard.recipes.training.stage1 import Stage1Trainer, refuse_collapsed
from vqguard.recipes.training.stage2 import ProjectorTrainer, Stage2Trainer
from vqguard.redteam.gradients import plain_estimator

log = logging.getLogger(__name__)

_SEMANTIC_ITERATIONS = 25  # so few entries cost next to nothing: let them converge
SKIPPED = "skipped.txt"
FEATURES = "features"


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
        skip_bad: leave unusable samples and images out and list them in ``skipped.txt``.
        command: what the records say makes them again.

    Where a launcher started several processes, all of them train; the first does the rest, and the
    others return a result without records before the evaluation.

    Raises:
        ConfigError: ``output`` is not empty, or holds another recipe's run.
        TrainingError: another process of the run was lost.
        VQGuardError: as each part raises it; what was finished before stays.
    """
    with together():
        first = is_first()
        first_alone(lambda: _refuse_other_runs(recipe, output, resume))
        run = _Run(recipe, output, resume, skip_bad)  # refuses bad data before anything is written
        first_alone(lambda: _open(recipe, output))
        run.prepare()
        run.cache_features()
        run.train()
        first_alone(run.calibrate)
        run.control()
        first_alone(run.finish)
    if not first:
        return RetrofitResult(output, output / REPORT_HTML, output / REPORT_JSON)
    return evaluate_run(output, command=command)


def _refuse_other_runs(recipe: RetrofitRecipe, output: Path, resume: bool) -> None:
    path = output / RECIPE
    if not (resume and output.is_dir()):
        require_empty(output, RESUME_OR_ANOTHER)
    elif path.exists() and RetrofitRecipe.from_yaml(path) != recipe:
        raise ConfigError(
            f"{output} was started with another recipe ({path}). Resume it with the same options, "
            "or name another --output."
        )


def _open(recipe: RetrofitRecipe, output: Path) -> None:
    path = output / RECIPE
    output.mkdir(parents=True, exist_ok=True)
    if not path.exists():
        recipe.to_yaml(path)


def _is_guarded(folder: Path) -> bool:
    """Whether a guarded model was written there to its end."""
    return (folder / MANIFEST).exists()


class _Run:
    """A retrofit in the making. Parts are methods, in their order."""

    def __init__(self, recipe: RetrofitRecipe, output: Path, resume: bool, skip_bad: bool) -> None:
        if recipe.stage1.nf4 or recipe.stage2.nf4:
            require_bitsandbytes()  # stage 2 may be hours away
        self.recipe = recipe
        self.output = output
        self.resume = resume
        self.skip_bad = skip_bad
        self.skipped: list[str] = []
        self.world = world_of(recipe)
        source = source_of(recipe, skip_bad=skip_bad, skipped=self.skipped)
        many = max(recipe.stage1.samples, recipe.guard.start_samples)
        captions = list(source.captions(many))
        self.instructions = (
            list(source.instructions(recipe.stage2.samples))
            if self.world is not None
            else split_held_out(source, recipe)[0][: recipe.stage2.samples]
        )
        if self.world is None:
            seen = {s.id for s in split_held_out(source, recipe)[1]}
            captions = [s for s in captions if s.id not in seen]
        self.captions = captions[: recipe.stage1.samples]
        self.starters = captions[: recipe.guard.start_samples]
        times = output / TIMES
        self.seconds: dict[str, float] = json.loads(times.read_text()) if times.exists() else {}
        self.model: Any = None
        self.processor: Any = None
        self.cache: FeatureCache | None = None

    def prepare(self) -> None:
        """Load the model, install a guard, start its codebooks by k-means.

        The first process starts them, so that they do not depend on how many there are.
        """
        torch.manual_seed(self.recipe.seed)
        self.model, self.processor = base_model(self.recipe)
        marked = self.output / "start"
        found = _is_guarded(marked)
        wait()  # all have looked before it is written
        if not found:
            first_alone(lambda: self._start(marked))
        if found or not is_first():
            self.model = self._load(marked)

    def _load(self, folder: Path) -> Any:
        spread = loading(self.recipe.device_map)
        return load_guarded(folder, processor=self.processor, **spread)

    def _start(self, marked: Path) -> None:
        guard = self.recipe.guard
        place(self.model)
        built = build_guard(
            self.model,
            site=guard.site,
            patch_codes=guard.patch_codes,
            semantic_codes=guard.semantic_codes,
            commitment_weight=guard.commitment_weight,
            search=guard.search,
            refusal_text=guard.refusal_text,
            seed=self.recipe.seed,
        )
        guard_model(self.model, built, self.processor)
        each = max(1, -(-guard.start_points * guard.patch_codes // len(self.starters)))

        def features() -> tuple[torch.Tensor, torch.Tensor]:
            return collect_features(
                self.model,
                self.processor,
                self._pictures(self.starters),
                tokens_an_image=each,
                seed=self.recipe.seed,
            )

        patches, semantic = self._timed("features", features)

        def start() -> None:
            many = max(guard.kmeans_iterations, _SEMANTIC_ITERATIONS)
            for level, points, iterations in (
                (built.patch, patches, guard.kmeans_iterations),
                (built.semantic, semantic, many),
            ):
                level.codebook.start_from(points, seed=self.recipe.seed, iterations=iterations)

        self._timed("kmeans", start)
        self.model.save_pretrained(marked)

    def cache_features(self) -> None:
        """The vision encoder's outputs for both stages and the control, if the recipe wants it."""
        features = self.recipe.features
        if not features.cache or self._trained():
            return
        folder = features.folder or self.output / FEATURES
        samples = [*self.captions, *self.instructions]

        def build() -> None:
            place(self.model)
            self.cache = FeatureCache.build(folder, self.model, self.processor, samples)

        first_alone(lambda: self._timed("feature_cache", build))
        if self.cache is None:
            self.cache = FeatureCache(folder, CacheIdentity.of(self.model, self.processor))

    def train(self) -> None:
        """Both stages, each from its last checkpoint if there is one."""
        recipe = self.recipe
        if not self._done("stage1"):
            trainer = Stage1Trainer(
                self.model,
                recipe.stage1,
                self._encoded(self.captions, recipe.stage1),
                self.output / "stage1",
                seed=recipe.seed,
            )
            self.model = self._timed("stage1", lambda: trainer.run(resume=self.resume))
            first_alone(self._end_of_stage1)
        else:
            self.model = self._load(self.output / "stage1" / MODEL)
        if self._done("stage2"):
            self.model = self._load(self.output / "stage2" / MODEL)
            return
        second = Stage2Trainer(
            self.model,
            recipe.stage2,
            self._encoded(self.instructions, recipe.stage2),
            self.output / "stage2",
            seed=recipe.seed,
        )
        self.model = self._timed("stage2", lambda: second.run(resume=self.resume))
        first_alone(lambda: self._mark("stage2"))

    def calibrate(self) -> None:
        """The safety map, from the world's images or the user's folders."""
        numbers = self.recipe.calibration
        place(self.model)
        images: Iterable[tuple[str, Image.Image]]
        if self.recipe.calibration_images is not None:
            images = read_categories(
                self.recipe.calibration_images, skip_bad=self.skip_bad, skipped=self.skipped
            )
        elif self.world is not None:
            images = self.world.calibration(numbers.per_category, numbers.neutral)
        else:
            log.warning(
                "no calibration images: the model quantises but has no safety map and refuses to "
                "screen. Give it one with `vqguard calibrate %s --images DIR`.",
                self.output,
            )
            return
        self._timed(
            "calibration",
            lambda: calibrate_model(
                self.model,
                self.processor,
                images,
                tau=numbers.tau,
                fpr=numbers.fpr,
                seed=self.recipe.seed,
            ),
        )

    def control(self) -> None:
        """The same base, the same data, as long, without a quantiser."""
        if not self.recipe.evaluation.finetuned_control or self.world is None:
            return
        folder = self.output / CONTROL
        if (folder / MODEL / "config.json").exists():
            return
        torch.manual_seed(self.recipe.seed)
        model, _ = base_model(self.recipe)
        model = self._train_control(model, folder)

        def keep() -> None:
            model.save_pretrained(folder / "model.new")
            (folder / "model.new").replace(folder / MODEL)

        first_alone(keep)

    def _train_control(self, model: Any, folder: Path) -> Any:
        for kind, samples, stage, name in (
            (ProjectorTrainer, self.captions, self.recipe.stage1, "projector"),
            (Stage2Trainer, self.instructions, self.recipe.stage2, "stage2"),
        ):

            def train(
                model: Any,
                kind: Any = kind,
                data: Any = samples,
                stage: Any = stage,
                to: str = name,
            ) -> Any:
                encoded = self._encoded(data, stage)
                trainer = kind(model, stage, encoded, folder / to, seed=self.recipe.seed)
                return trainer.run(resume=self.resume)

            work = functools.partial(self._without_quantiser, model, train)
            model = self._timed(f"control_{name}", work)
        return model

    def _without_quantiser(self, model: Any, train: Callable[[Any], Any]) -> Any:
        """Kept features enter a model by its guard; this one lets every feature through."""
        if self.cache is None:
            return train(model)
        site = self.recipe.guard.site
        open_guard = build_guard(model, site=site, patch_codes=1, semantic_codes=1)
        guard_model(model, open_guard, self.processor)
        with use_estimator(open_guard, plain_estimator):
            trained = train(model)
        return unguard_model(trained)

    def finish(self) -> None:
        """Write the guarded model, and the list of what was skipped."""
        self.model.eval()
        if self.recipe.features.folder is None:
            # Of an attempt that was stopped here as well: then no cache was opened.
            shutil.rmtree(self.output / FEATURES, ignore_errors=True)
        save_run_model(self.output, self.model, self.processor)
        if self.skipped:
            (self.output / SKIPPED).write_text("\n".join(self.skipped) + "\n", encoding="utf-8")
            log.warning("%d skipped; see %s", len(self.skipped), self.output / SKIPPED)

    # -- helpers

    def _encoded(self, samples: list[Sample], stage: StageRecipe) -> EncodedSamples:
        return EncodedSamples(samples, self.processor, stage.max_length, self.cache)

    def _pictures(self, samples: list[Sample]) -> Iterable[Image.Image]:
        for sample in samples:
            for opener in sample.images:
                try:
                    yield opener()
                except InputError as error:
                    if not self.skip_bad:
                        raise
                    self.skipped.append(str(error))

    def _check_codebooks(self) -> None:
        place(self.model)
        patches, semantic = collect_features(
            self.model, self.processor, self._pictures(self.captions[:1000])
        )
        guard = self.model.vqguard
        for name, level, points in (
            ("patch", guard.patch, patches),
            ("semantic", guard.semantic, semantic),
        ):
            perplexity, _ = usage(level, points)
            # Few features cannot use many entries; they are no sign of a collapse.
            refuse_collapsed(name, perplexity, min(level.codebook.codes, len(points)))

    def _end_of_stage1(self) -> None:
        self._check_codebooks()
        self._mark("stage1")

    def _done(self, stage: str) -> bool:
        return _is_guarded(self.output / stage / MODEL)

    def _trained(self) -> bool:
        """Whether neither stage nor the control has anything left to train."""
        wants_control = self.recipe.evaluation.finetuned_control and self.world is not None
        control = (self.output / CONTROL / MODEL / "config.json").exists()
        return self._done("stage2") and (control or not wants_control)

    def _mark(self, stage: str) -> None:
        self.model.save_pretrained(self.output / stage / MODEL)

    def _timed(self, name: str, work: Callable[[], Any]) -> Any:
        start = time.perf_counter()
        if not is_first():
            return work()
        log.info("%s", name)
        result = work()
        # A resumed part adds to the seconds of its first attempt's finished parts only.
        self.seconds[name] = time.perf_counter() - start
        replace_text(self.output / TIMES, json.dumps(self.seconds, indent=1))
        return result

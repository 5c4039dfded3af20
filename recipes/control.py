"""The control: the same base, the same data, as long, without a quantiser.

It needs nothing of the guarded model's stages but the kept features: where there are two threads or
more it is trained in a process of its own beside them.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from vqguard.adapters import build_guard, guard_model, unguard_model
from vqguard.codebooks.quantizer import use_estimator
from vqguard.recipes.beside import beside, half_the_threads, threads_beside
from vqguard.recipes.data.encoding import EncodedSamples
from vqguard.recipes.data.feature_cache import CacheIdentity, FeatureCache
from vqguard.recipes.models import CONTROL, base_model, has_control, save_control
from vqguard.recipes.processes import first_alone
from vqguard.recipes.recipe import RetrofitRecipe, StageRecipe
from vqguard.recipes.run import RECIPE, TIMES
from vqguard.recipes.run_folder import RunFolder
from vqguard.recipes.run_samples import RunSamples
from vqguard.recipes.training.stage2 import ProjectorTrainer, Stage2Trainer
from vqguard.recipes.training.trainer import StageTrainer
from vqguard.redteam.gradients import plain_estimator


@dataclass
class Control:
    """A run's control in the making."""

    recipe: RetrofitRecipe
    folder: RunFolder
    samples: RunSamples
    resume: bool
    """Go on from the last checkpoint."""

    @property
    def wanted(self) -> bool:
        """Whether the recipe wants one, and the data's world is known."""
        return self.recipe.evaluation.finetuned_control and self.samples.world is not None

    @property
    def missing(self) -> bool:
        """Whether one is wanted and not whole yet."""
        return self.wanted and not has_control(self.folder.path)

    def train(self, cache: FeatureCache | None) -> None:
        """Train it, unless that is done; `cache` has the vision encoder's outputs."""
        if not self.missing:
            return
        torch.manual_seed(self.recipe.seed)
        model, processor = base_model(self.recipe)
        for kind, recipe, samples in (
            (ProjectorTrainer, self.recipe.stage1, self.samples.captions),
            (Stage2Trainer, self.recipe.stage2, self.samples.instructions),
        ):
            data = EncodedSamples(samples, processor, recipe.max_length, cache)
            model = self._train_stage(kind, model, recipe, data)
        first_alone(lambda: save_control(self.folder.path, model))

    def _train_stage(
        self, kind: type[StageTrainer], model: Any, recipe: StageRecipe, data: EncodedSamples
    ) -> Any:
        folder = self.folder.stage(f"{CONTROL}/{kind.stage}")
        seed = self.recipe.seed

        def train() -> Any:
            return kind(model, recipe, data, folder, seed=seed).run(resume=self.resume)

        timed = partial(self.folder.timed, f"{CONTROL}_{kind.stage}", train)
        if data.cache is None:
            return timed()
        # Kept features enter a model by its guard; this one lets every feature through.
        site = self.recipe.guard.site
        open_guard = build_guard(model, site=site, patch_codes=1, semantic_codes=1)
        guard_model(model, open_guard, data.processor)
        with use_estimator(open_guard, plain_estimator):
            trained = timed()
        return unguard_model(trained)

    # -- beside the guarded model's stages

    @contextmanager
    def beside(self, features: Path | None) -> Iterator[None]:
        """Inside, a process of its own trains it, and this one has half the threads.

        Both have as many whether or not there is anything left to train, so that a resumed run
        computes what an uninterrupted one does. Where the machine has no two threads to share,
        nothing happens, and `train` trains it.

        Args:
            features: the folder of the feature cache; None without one.

        Raises:
            TrainingError: the process failed.
        """
        if not self.wanted or threads_beside() is None:
            yield
            return
        request = {
            "run": str(self.folder.path.resolve()),
            "features": None if features is None else str(features.resolve()),
            "skip_bad": self.samples.skip_bad,
            "resume": self.resume,
        }
        work = "vqguard.recipes.control:train_in"
        with beside(work, request, "the control") if self.missing else half_the_threads():
            yield
        self.folder.adopt(self.folder.path / CONTROL / TIMES)


def train_in(request: dict[str, Any]) -> None:
    """Train the control of a run, as `Control.beside` asks for it."""
    run = Path(request["run"])
    recipe = RetrofitRecipe.from_yaml(run / RECIPE)
    folder = RunFolder(run, run / CONTROL / TIMES)
    folder.read_times()
    samples = RunSamples(recipe, skip_bad=request["skip_bad"], run=run)
    cache = None
    if request["features"] is not None:
        cache = FeatureCache(Path(request["features"]), CacheIdentity.of(*base_model(recipe)))
    Control(recipe, folder, samples, request["resume"]).train(cache)

"""A recipe's two stages without what surrounds them in a retrofit, to be measured."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from vqguard.adapters import build_guard, guard_model
from vqguard.recipes.data.encoding import EncodedSamples
from vqguard.recipes.data.feature_cache import FeatureCache
from vqguard.recipes.data.samples import SampleSource
from vqguard.recipes.models import base_model
from vqguard.recipes.recipe import RetrofitRecipe
from vqguard.recipes.training.stage1 import Stage1Trainer
from vqguard.recipes.training.stage2 import Stage2Trainer


def fresh(recipe: RetrofitRecipe) -> tuple[Any, Any]:
    """The recipe's base with a guard that was not started, and its processor."""
    model, processor = base_model(recipe)
    guard = build_guard(
        model,
        site=recipe.guard.site,
        patch_codes=recipe.guard.patch_codes,
        semantic_codes=recipe.guard.semantic_codes,
        refusal_text=recipe.guard.refusal_text,
    )
    return guard_model(model, guard, processor), processor


def train(
    recipe: RetrofitRecipe,
    number: int,
    model: Any,
    processor: Any,
    source: SampleSource,
    cache: FeatureCache | None = None,
) -> Any:
    """The model after stage `number`."""
    kind: Any = Stage1Trainer if number == 1 else Stage2Trainer
    stage: Any = recipe.stage1 if number == 1 else recipe.stage2
    draw = source.captions if number == 1 else source.instructions
    data = EncodedSamples(draw(stage.samples), processor, stage.max_length, cache)
    with tempfile.TemporaryDirectory() as folder:
        return kind(model, stage, data, Path(folder), seed=recipe.seed).run(resume=False)


def shortened(recipe: RetrofitRecipe, steps: int) -> RetrofitRecipe:
    """The recipe with `steps` optimiser steps in each stage."""
    return recipe.override(
        [
            f"stage1.samples={steps * recipe.stage1.batch}",
            f"stage2.samples={steps * recipe.stage2.batch}",
        ]
    )

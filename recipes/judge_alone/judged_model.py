"""The model or vision encoder that a judge alone stands behind."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from vqguard.adapters import build_guard, guard_encoder, guard_model, resolve_model, save_guard_only
from vqguard.adapters.encoders.guard_encoder import FAMILIES
from vqguard.adapters.encoders.stored import local_part, save_encoder
from vqguard.encoder import GuardedEncoder
from vqguard.recipes.judging.recipe import JudgeRecipe
from vqguard.recipes.models import named_model
from vqguard.recipes.placement import place
from vqguard.recipes.run import MODEL, LoadedRun, open_run, save_run_model


def is_encoder(name: str) -> bool:
    """Whether a recipe's model is a vision encoder by its name, as in `timm:NAME`."""
    return name.partition(":")[0] in FAMILIES and ":" in name


def judged_model(recipe: JudgeRecipe, most_codes: int) -> LoadedRun:
    """The recipe's model with a judge alone in it, whose codebooks are random yet.

    Args:
        recipe: of the judge.
        most_codes: entries of the global codebook at most: k-means has so many images.
    """
    codes = min(recipe.guard.semantic_codes, most_codes)
    sizes = replace(recipe.guard, semantic_codes=codes).settings()
    sizes |= {"levels": "semantic", "seed": recipe.seed}
    if is_encoder(recipe.model):
        del sizes["site"]  # there is nothing behind the encoder
        weights: Any = recipe.weights
        return LoadedRun(place(guard_encoder(recipe.model, pretrained=weights, **sizes)), None)
    model, processor = named_model(recipe.model)
    guard_model(place(model), build_guard(model, **sizes), processor)
    return LoadedRun(model.eval(), processor)


def save_judge(run: Path, loaded: LoadedRun, recipe: JudgeRecipe) -> None:
    """Write the judge into its run: without the model, where that can be found again by its name.

    A local model is written whole: nothing on disk ever becomes a path.
    """
    if isinstance(loaded.model, GuardedEncoder):
        save_encoder(run / MODEL, loaded.model, recipe.model, recipe.weights)
    elif resolve_model(recipe.model).source == "path":
        save_run_model(run, loaded.model, loaded.processor)
    else:
        save_guard_only(loaded.model, run / MODEL, recipe.model, processor=loaded.processor)


def open_judge(run: Path, recipe: JudgeRecipe) -> LoadedRun:
    """The judge of a run, with the model that its recipe names."""
    encoder = is_encoder(recipe.model)
    return open_run(run, base=local_part(recipe.model, recipe.weights) if encoder else None)

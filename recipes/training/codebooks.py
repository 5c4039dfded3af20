"""Codebooks before and after stage 1: started by k-means, checked for a collapse."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from PIL import Image

from vqguard.adapters import build_guard
from vqguard.guard import VQGuard
from vqguard.recipes.evaluation.codebooks import usage
from vqguard.recipes.image_batches import collect_features
from vqguard.recipes.recipe import GuardRecipe
from vqguard.recipes.training.stage1 import refuse_collapsed

_SEMANTIC_ITERATIONS = 25  # so few entries cost next to nothing: let them converge


def guard_for(model: Any, recipe: GuardRecipe, *, seed: int) -> VQGuard:
    """A guard of the recipe's sizes for a model; its codebooks are random yet."""
    return build_guard(model, **recipe.settings(), seed=seed)


def start_codebooks(
    guard: VQGuard, patches: torch.Tensor, semantic: torch.Tensor, recipe: GuardRecipe, *, seed: int
) -> None:
    """k-means centres of features become the entries: patches (n, d), semantic (m, d_s)."""
    many = max(recipe.kmeans_iterations, _SEMANTIC_ITERATIONS)
    for level, points, iterations in (
        (guard.patch, patches, recipe.kmeans_iterations),
        (guard.semantic, semantic, many),
    ):
        level.codebook.start_from(points, seed=seed, iterations=iterations)


def check_codebooks(model: Any, processor: Any, images: Iterable[Image.Image]) -> None:
    """Stop a run whose codebooks are used by a few entries only.

    Raises:
        CodebookCollapseError: as `refuse_collapsed` says.
    """
    patches, semantic = collect_features(model, processor, images)
    guard: VQGuard = model.vqguard
    for name, level, points in (
        ("patch", guard.patch, patches),
        ("semantic", guard.semantic, semantic),
    ):
        perplexity, _ = usage(level, points)
        # Few features cannot use many entries; they are no sign of a collapse.
        refuse_collapsed(name, perplexity, min(level.codebook.codes, len(points)))

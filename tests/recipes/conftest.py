"""Shared models of the recipes' tests."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from vqguard.adapters import build_guard, guard_model
from vqguard.recipes.recipe import Stage1Recipe, Stage2Recipe
from vqguard.recipes.tiny.model import TinySizes, build_model, build_processor, build_tokenizer

SIZES = TinySizes(
    patch_size=32,
    vision_width=24,
    vision_layers=1,
    vision_heads=2,
    vision_mlp=32,
    text_width=24,
    text_layers=1,
    text_heads=2,
    text_mlp=32,
)
MakeModel = Callable[..., tuple[Any, Any]]


@pytest.fixture
def small_model() -> MakeModel:
    """Makes an untrained model of the world's family, of a size that trains in a second."""

    def make(seed: int = 0) -> tuple[Any, Any]:
        torch.manual_seed(seed)
        tokenizer = build_tokenizer()
        model = build_model(SIZES, tokenizer)
        return model.eval(), build_processor(SIZES, tokenizer)

    return make


@pytest.fixture
def small_guarded(small_model: MakeModel) -> MakeModel:
    """Makes the same with a guard of 32 patch codes and 8 semantic codes."""

    def make(seed: int = 0, **options: Any) -> tuple[Any, Any]:
        model, processor = small_model(seed)
        sizes = {"patch_codes": 32, "semantic_codes": 8, "refusal_text": "sorry ."}
        guard_model(model, build_guard(model, **{**sizes, **options}), processor)
        return model, processor

    return make


@pytest.fixture
def small_sizes() -> TinySizes:
    return SIZES


@pytest.fixture
def stage1_recipe() -> Stage1Recipe:
    return Stage1Recipe(
        samples=32, batch=4, learning_rate=1e-3, checkpoint_every=2, revive_every=3, max_length=128
    )


@pytest.fixture
def stage2_recipe() -> Stage2Recipe:
    return Stage2Recipe(samples=32, batch=4, learning_rate=1e-3, checkpoint_every=2, max_length=256)

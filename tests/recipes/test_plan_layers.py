"""A step of many layers, from a step of a few of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from vqguard.adapters import build_guard, get_adapter
from vqguard.recipes.planning import step_peak as plan_peak
from vqguard.recipes.planning.layers import KEPT, alike_layers, deep_peak
from vqguard.recipes.planning.plan import plan
from vqguard.recipes.recipe import load_recipe, recipe_names
from vqguard.recipes.tiny.model import TinySizes, build_model, build_tokenizer
from vqguard.recipes.training.step import checkpointing_on

LAYERS = 9
MakeDeep = Callable[[], Any]


@pytest.fixture
def deep(small_sizes: TinySizes) -> MakeDeep:
    """Makes a guarded model of many layers on the meta device."""

    def make() -> Any:
        with torch.device("meta"):
            model: Any = build_model(replace(small_sizes, text_layers=LAYERS), build_tokenizer())
            model.vqguard = build_guard(model, patch_codes=32, semantic_codes=8)
        return model.train()

    return make


def text_layers(model: Any) -> nn.ModuleList:
    found = alike_layers(model, get_adapter(model).language_model(model))
    assert found is not None
    return found[2]


def peak(model: Any, stage: int, *, accumulate: bool, history: bool) -> plan_peak.Step:
    shape = plan_peak.StepShape(2, 30, 16)
    return plan_peak.step_peak(
        model, get_adapter(model), shape, stage=stage, accumulate=accumulate, history=history
    )


@pytest.mark.parametrize("stage", [1, 2])
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("accumulate", [False, True])
def test_few_layers_give_the_peak_of_all(
    deep: MakeDeep, stage: int, checkpointing: bool, accumulate: bool
) -> None:
    model = deep()
    trained = get_adapter(model).stage1_trainable if stage == 1 else None
    if trained is not None:
        names = {name for name, _ in trained(model)}
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name in names)
    if checkpointing:
        checkpointing_on(model)
    whole = peak(model, stage, accumulate=accumulate, history=True)
    few = peak(model, stage, accumulate=accumulate, history=False)
    assert few == plan_peak.Step(whole.peak)
    assert len(text_layers(model)) == LAYERS
    assert all(p.grad is None for p in model.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in text_layers(model))


def test_layers_of_other_sizes_or_kinds_are_not_alike(deep: MakeDeep) -> None:
    model = deep()
    language = get_adapter(model).language_model(model)
    assert alike_layers(model, language) is not None
    layers = text_layers(model)
    other: Any = layers[5]
    other.mlp.up_proj = nn.Linear(24, 40, bias=False, device="meta")
    assert alike_layers(model, language) is None
    model = deep()
    model.config.get_text_config().layer_types = ["full_attention", "sliding_attention"]
    assert alike_layers(model, get_adapter(model).language_model(model)) is None


def test_layers_that_only_run_differently_are_all_run(
    deep: MakeDeep, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = deep()
    for number, layer in enumerate(text_layers(model)):
        # Each holds more than the one before it: none repeats another.
        def forward(x: Any, *a: Any, _of: Any = layer.forward, _n: int = number, **k: Any) -> Any:
            extra = torch.empty(_n + 1, 7, device="meta", requires_grad=True) * 2
            return _of(x, *a, **k) + extra.exp().sum()

        monkeypatch.setattr(layer, "forward", forward)
    whole = peak(model, 2, accumulate=False, history=True)
    few = peak(model, 2, accumulate=False, history=False)
    assert few.peak == whole.peak


def test_repeated_layers_by_hand() -> None:
    # Before the layers 100; each layer keeps 10 and takes 5 for a moment; its backward pass takes
    # 40 (20 of it for good) and lets its 10 go.
    events, marks, block = [(1, 100)], [], 1
    kept = []
    for _ in range(KEPT):
        marks.append(len(events))
        events += [(block + 1, 10), (block + 2, 5), (block + 2, 0)]
        kept.append(block + 1)
        block += 2
    for layer in reversed(kept):
        marks.append(len(events))
        events += [(block + 1, 20), (block + 2, 20), (layer, 0), (block + 2, 0)]
        block += 2
    assert deep_peak(events, marks, KEPT) == 100 + 10 + KEPT * 20 + 20
    assert deep_peak(events, marks, 40) == 100 + 10 + 40 * 20 + 20
    assert deep_peak(events, marks[:-1], 40) is None


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in recipe_names() if name != "llava-tiny"])
@pytest.mark.parametrize("lora", [True, False])
def test_every_named_recipe_is_planned_as_with_all_its_layers(
    monkeypatch: pytest.MonkeyPatch, name: str, lora: bool
) -> None:
    recipe = load_recipe(name)
    if not lora:
        recipe = replace(recipe, stage2=replace(recipe.stage2, lora=None))
    few = plan(recipe)
    monkeypatch.setattr(plan_peak, "alike_layers", lambda *a: None)
    assert plan(recipe) == few

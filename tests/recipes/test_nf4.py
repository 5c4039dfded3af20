"""Stages beside a language model of 4 bits."""

from __future__ import annotations

import importlib.util
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from vqguard.errors import ConfigError
from vqguard.recipes.data.encoding import EncodedSamples
from vqguard.recipes.recipe import LoraRecipe, Stage1Recipe, Stage2Recipe
from vqguard.recipes.tiny.world import TinyWorld
from vqguard.recipes.training.nf4 import hold_in_4_bits
from vqguard.recipes.training.progress import read_steps
from vqguard.recipes.training.stage1 import Stage1Trainer
from vqguard.recipes.training.stage2 import Stage2Trainer

WORLD = TinyWorld(0)
LORA = LoraRecipe(rank=4, alpha=8, dropout=0.0)
needs_bitsandbytes = pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None, reason="needs bitsandbytes"
)


def packed(model: Any) -> set[str]:
    return {n for n, p in model.named_parameters() if p.dtype == torch.uint8}


def second_stage(
    make: Any, recipe: Stage2Recipe, folder: Path
) -> tuple[Stage2Trainer, dict[str, torch.Tensor]]:
    model, processor = make()
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    data = EncodedSamples(WORLD.instructions(32), processor, recipe.max_length)
    return Stage2Trainer(model, recipe, data, folder, seed=0), before


@needs_bitsandbytes
def test_the_updates_are_learnt_beside_4_bits_and_added_to_whole_weights(
    small_guarded: Any, stage2_recipe: Stage2Recipe, tmp_path: Path
) -> None:
    recipe = replace(stage2_recipe, lora=LORA, nf4=True)
    stage, before = second_stage(small_guarded, recipe, tmp_path / "nf4")
    model: Any = stage.model
    layers = packed(model)
    assert len(layers) == 7  # of the one layer: q, k, v, o, gate, up, down
    assert all("language_model" in name and "_proj" in name for name in layers)
    trained = [n for n, p in model.named_parameters() if p.requires_grad]
    assert trained
    assert all(".lora_" in name for name in trained)
    assert stage.run(resume=False) is model
    after = dict(model.named_parameters())
    assert after.keys() == before.keys()
    assert not packed(model)
    changed = {name for name, value in before.items() if not torch.equal(value, after[name])}
    assert changed == {name.replace(".base_layer", "") for name in layers}
    for name in changed:
        # What was added to the whole weight is an update of rank 4, not the error of rounding.
        values = torch.linalg.svdvals(after[name].detach() - before[name])
        assert int((values > 1e-4 * values[0]).sum()) <= LORA.rank
    whole, _ = second_stage(small_guarded, replace(recipe, nf4=False), tmp_path / "whole")
    whole.run(resume=False)
    lost, kept = (read_steps(tmp_path / name / "metrics.jsonl") for name in ("nf4", "whole"))
    assert lost[-1]["loss"] < lost[0]["loss"]
    assert lost[0]["loss"] != kept[0]["loss"]  # the 4 bits were used
    assert lost[-1]["loss"] == pytest.approx(kept[-1]["loss"], rel=0.05)


@needs_bitsandbytes
def test_stage_1_leaves_the_language_model_as_it_was(
    small_guarded: Any, stage1_recipe: Stage1Recipe, tmp_path: Path
) -> None:
    model, processor = small_guarded()
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    recipe = replace(stage1_recipe, nf4=True, bf16=False)
    data = EncodedSamples(WORLD.captions(16), processor, recipe.max_length)
    stage = Stage1Trainer(model, replace(recipe, samples=16), data, tmp_path, seed=0)
    assert packed(model)
    stage.run(resume=False)
    changed = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert changed
    assert all(n.startswith("vqguard.") or "projector" in n for n in changed)


@needs_bitsandbytes
def test_a_run_that_was_stopped_goes_on_to_the_same_weights(
    small_guarded: Any, stage2_recipe: Stage2Recipe, tmp_path: Path
) -> None:
    recipe = replace(stage2_recipe, lora=LORA, nf4=True)
    whole, _ = second_stage(small_guarded, recipe, tmp_path / "whole")
    expected: Any = whole.run(resume=False)
    cut, _ = second_stage(small_guarded, recipe, tmp_path / "cut")
    step = cut.training_step

    def stops(*given: Any, **more: Any) -> Any:
        if cut.state.global_step == 5:
            raise KeyboardInterrupt
        return step(*given, **more)

    cut.training_step = stops  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        cut.run(resume=False)
    again, _ = second_stage(small_guarded, recipe, tmp_path / "cut")
    found: Any = again.run(resume=True)
    for (name, one), two in zip(expected.named_parameters(), found.parameters(), strict=True):
        torch.testing.assert_close(two, one, rtol=0, atol=1e-6, msg=name)


def test_what_would_be_trained_is_not_rounded(stage2_recipe: Stage2Recipe) -> None:
    """It is refused with the recipe, not after the hours of stage 1."""
    with pytest.raises(ConfigError, match="set lora as well"):
        replace(stage2_recipe, nf4=True)


def test_without_bitsandbytes_it_is_said_what_to_install(
    small_guarded: Any, stage1_recipe: Stage1Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, _ = small_guarded()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"vqguard\[qlora\]"):
        hold_in_4_bits(model, None, replace(stage1_recipe, nf4=True))  # type: ignore[arg-type]

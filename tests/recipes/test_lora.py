"""Stage 2 with low-rank adapters, micro batches, bfloat16 and checkpointing."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from vqguard.adapters import get_adapter
from vqguard.errors import ConfigError
from vqguard.recipes.data.encoding import EncodedSamples
from vqguard.recipes.recipe import LoraRecipe, Stage1Recipe, Stage2Recipe, StageRecipe
from vqguard.recipes.tiny.world import TinyWorld
from vqguard.recipes.training.checkpoints import last_checkpoint
from vqguard.recipes.training.lora import add_lora, merge_lora
from vqguard.recipes.training.progress import read_steps
from vqguard.recipes.training.stage1 import Stage1Trainer
from vqguard.recipes.training.stage2 import Stage2Trainer
from vqguard.recipes.training.step import micro_batches

WORLD = TinyWorld(0)
LORA = LoraRecipe(rank=4, alpha=8)


def instructions(processor: Any, recipe: StageRecipe, number: int = 16) -> EncodedSamples:
    return EncodedSamples(WORLD.instructions(number), processor, recipe.max_length)


def test_only_the_adapters_train_and_they_end_up_in_the_weights(
    small_guarded: Any, stage2_recipe: Stage2Recipe, tmp_path: Path
) -> None:
    model, processor = small_guarded()
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    recipe = replace(stage2_recipe, lora=LORA)
    stage = Stage2Trainer(model, recipe, instructions(processor, recipe), tmp_path, seed=0)
    trained = [n for n, p in model.named_parameters() if p.requires_grad]
    assert trained
    assert all(".lora_" in name and "language_model" in name for name in trained)
    stage.run(resume=False)
    after = dict(model.named_parameters())
    assert after.keys() == before.keys()  # merged: no trace of the adapters
    changed = {n for n in before if not torch.equal(before[n], after[n])}
    assert changed
    assert all("language_model" in n and "_proj" in n for n in changed)


def test_the_kept_adapter_makes_the_merged_model_of_the_base(
    small_guarded: Any, stage2_recipe: Stage2Recipe, tmp_path: Path
) -> None:
    from peft import PeftModel

    model, processor = small_guarded()
    recipe = replace(stage2_recipe, lora=LORA)
    Stage2Trainer(model, recipe, instructions(processor, recipe), tmp_path, seed=0).run(
        resume=False
    )
    base, _ = small_guarded()
    merged: Any = PeftModel.from_pretrained(base, tmp_path / "lora").merge_and_unload()
    names = dict(merged.named_parameters())
    for name, parameter in model.named_parameters():
        assert torch.allclose(parameter, names[name], atol=1e-6), name


def test_a_resumed_lora_run_ends_where_an_uninterrupted_one_does(
    small_guarded: Any, stage2_recipe: Stage2Recipe, tmp_path: Path
) -> None:
    recipe = replace(stage2_recipe, lora=replace(LORA, dropout=0.0))
    model, processor = small_guarded()
    data = instructions(processor, recipe)
    Stage2Trainer(model, recipe, data, tmp_path / "whole", seed=0).run(resume=False)
    stopped, _ = small_guarded()
    trainer = Stage2Trainer(stopped, recipe, data, tmp_path / "cut", seed=0)
    losses, calls = trainer.losses, []

    def failing(inner: Any, inputs: Any) -> Any:
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return losses(inner, inputs)

    trainer.losses = failing  # type: ignore[method-assign, assignment]
    with pytest.raises(KeyboardInterrupt):
        trainer.run(resume=False)
    assert last_checkpoint(tmp_path / "cut") is not None
    again, _ = small_guarded()
    Stage2Trainer(again, recipe, data, tmp_path / "cut", seed=0).run(resume=True)
    for (name, one), two in zip(model.named_parameters(), again.parameters(), strict=True):
        assert torch.equal(one, two), name


def test_adapters_start_without_effect_and_leave_no_trace(small_guarded: Any) -> None:
    model, _ = small_guarded()
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    ids = torch.arange(5, 15)[None]
    with torch.no_grad():
        first = model(input_ids=ids).logits
        add_lora(model, get_adapter(model), LORA)
        assert torch.equal(model(input_ids=ids).logits, first)
    merge_lora(model)
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())
    assert not any("lora" in name for name, _ in model.named_modules())


def test_an_unknown_target_is_answered_with_those_there_are(small_guarded: Any) -> None:
    model, _ = small_guarded()
    with pytest.raises(ConfigError, match=r"c_attn.*down_proj"):
        add_lora(model, get_adapter(model), LoraRecipe(targets=("c_attn",)))


def test_micro_batches_make_the_step_of_the_whole_batch(
    small_guarded: Any, stage1_recipe: Stage1Recipe, tmp_path: Path
) -> None:
    recipe = replace(stage1_recipe, samples=16, batch=8, revive_every=0)
    results, losses = [], []
    for name, one in (("whole", recipe), ("micro", replace(recipe, micro_batch=2))):
        model, processor = small_guarded()
        data = EncodedSamples(WORLD.captions(16), processor, recipe.max_length)
        Stage1Trainer(model, one, data, tmp_path / name, seed=0).run(resume=False)
        results.append(model.vqguard.patch.codebook.weight.detach())
        steps = read_steps(tmp_path / name / "metrics.jsonl")
        assert len(steps) == 2
        losses.append([step["vq_patch"] for step in steps])
    # AdamW's first step has the size of the learning rate whatever the gradient: signs must agree.
    assert torch.allclose(results[0], results[1], atol=1e-4)
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)


@pytest.mark.parametrize("lora", [None, LORA])
def test_bf16_and_checkpointing(
    small_guarded: Any,
    stage1_recipe: Stage1Recipe,
    stage2_recipe: Stage2Recipe,
    tmp_path: Path,
    lora: LoraRecipe | None,
) -> None:
    model, processor = small_guarded()
    first = replace(stage1_recipe, samples=8, bf16=True, gradient_checkpointing=True)
    data = EncodedSamples(WORLD.captions(8), processor, first.max_length)
    trainer = Stage1Trainer(model, first, data, tmp_path / "1", seed=0)
    for name, parameter in model.named_parameters():
        codebook = name.startswith("vqguard.")
        wanted = torch.float32 if parameter.requires_grad or codebook else torch.bfloat16
        assert parameter.dtype == wanted, name
    trainer.run(resume=False)
    second = replace(stage2_recipe, bf16=True, gradient_checkpointing=True, lora=lora)
    Stage2Trainer(model, second, instructions(processor, second, 8), tmp_path / "2", seed=0).run(
        resume=False
    )
    for name, parameter in model.named_parameters():
        codebook = name.startswith("vqguard.")
        assert parameter.dtype == (torch.float32 if codebook else torch.bfloat16), name
        assert bool(torch.isfinite(parameter).all()), name
    # It answers outside of the trainer's autocast.
    pixels = data[0]["pixel_values"].to(torch.bfloat16)
    with torch.no_grad():
        ids = torch.tensor([data[0]["input_ids"]])
        assert model(input_ids=ids, pixel_values=pixels).logits.dtype == torch.bfloat16


def test_checkpointing_changes_no_gradient(
    small_guarded: Any,
    stage2_recipe: Stage2Recipe,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # With it the last layer is computed whole, which sums in another order.
    monkeypatch.setattr(Stage2Trainer, "reading", lambda *_: nullcontext())
    results = []
    for on in (False, True):
        model, processor = small_guarded()
        recipe = replace(stage2_recipe, gradient_checkpointing=on)
        data = instructions(processor, recipe, 8)
        Stage2Trainer(model, recipe, data, tmp_path / str(on), seed=0).run(resume=False)
        results.append([p.detach() for p in model.parameters()])
    assert all(torch.equal(one, two) for one, two in zip(*results, strict=True))


def test_a_batch_is_shared_out_evenly_or_not_at_all() -> None:
    recipe = StageRecipe(samples=8, batch=12, micro_batch=2)
    assert micro_batches(recipe, 1) == (2, 6)
    assert micro_batches(recipe, 3) == (2, 2)
    assert micro_batches(replace(recipe, micro_batch=None), 4) == (3, 1)
    with pytest.raises(ConfigError, match="4 devices"):
        micro_batches(recipe, 4)
    with pytest.raises(ConfigError, match="micro_batch"):
        StageRecipe(samples=8, batch=12, micro_batch=5)

"""The two stages: what moves, what stays, what stops a run, and what a kill leaves."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from vqguard.errors import (
    CodebookCollapseError,
    ConfigError,
    FrozenTensorMovedError,
    TrainingError,
)
from vqguard.recipes.data.encoding import EncodedSamples
from vqguard.recipes.recipe import Stage1Recipe, StageRecipe
from vqguard.recipes.tiny.model import TinySizes
from vqguard.recipes.tiny.world import TinyWorld
from vqguard.recipes.training import checkpoints as checkpointed_module
from vqguard.recipes.training.checkpoints import last_checkpoint, mark_complete
from vqguard.recipes.training.stage1 import Stage1Trainer, refuse_collapsed
from vqguard.recipes.training.stage2 import Stage2Trainer
from vqguard.recipes.training.step import in_halves

WORLD = TinyWorld(0)


def snapshot(model: Any) -> dict[str, torch.Tensor]:
    return {n: p.detach().clone() for n, p in model.named_parameters()}


def moved(model: Any, before: dict[str, torch.Tensor]) -> set[str]:
    return {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}


def captions(processor: Any, recipe: StageRecipe) -> EncodedSamples:
    return EncodedSamples(WORLD.captions(recipe.samples), processor, recipe.max_length)


@pytest.mark.parametrize("site", ["projected", "encoder"])
def test_stage_1_moves_projector_and_codebooks_alone(
    small_guarded: Any, stage1_recipe: Stage1Recipe, tmp_path: Path, site: str
) -> None:
    model, processor = small_guarded(site=site)
    before = snapshot(model)
    data = captions(processor, stage1_recipe)
    Stage1Trainer(model, stage1_recipe, data, tmp_path, seed=0).run(resume=False)
    changed = moved(model, before)
    assert {n.split(".")[0] for n in changed} == {"vqguard", "model"}
    assert all("multi_modal_projector" in n or n.startswith("vqguard.") for n in changed)
    assert len(changed) == 4 + 2
    lines = [json.loads(s) for s in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, 9))
    for line in lines:
        total = line["generative"] + 0.5 * (line["vq_patch"] + line["vq_semantic"])
        assert line["loss"] == pytest.approx(total + 0.1 * line["semantic"], rel=1e-5)


def test_stage_2_moves_the_language_model_alone(
    small_guarded: Any, stage2_recipe: StageRecipe, tmp_path: Path
) -> None:
    model, processor = small_guarded()
    before = snapshot(model)
    settings = model.config.to_dict()
    data = EncodedSamples(WORLD.instructions(16), processor, stage2_recipe.max_length)
    Stage2Trainer(model, stage2_recipe, data, tmp_path, seed=0).run(resume=False)
    assert model.config.to_dict() == settings  # the trainer would leave the cache turned off
    changed = moved(model, before)
    assert changed
    assert all("language_model" in n or "lm_head" in n for n in changed)


def test_a_frozen_tensor_that_moves_stops_the_run(
    small_guarded: Any, stage2_recipe: StageRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, processor = small_guarded()
    data = EncodedSamples(WORLD.instructions(8), processor, stage2_recipe.max_length)
    stage = Stage2Trainer(model, stage2_recipe, data, tmp_path, seed=0)
    losses = stage.losses

    def meddling(inner: Any, inputs: Any) -> Any:
        with torch.no_grad():
            model.vqguard.patch.codebook.weight[0, 0] += 1e-3
        return losses(inner, inputs)

    monkeypatch.setattr(stage, "losses", meddling)
    with pytest.raises(FrozenTensorMovedError, match=r"patch\.codebook\.weight"):
        stage.run(resume=False)


def test_a_loss_that_is_not_finite_stops_the_run(
    small_guarded: Any, stage2_recipe: StageRecipe, tmp_path: Path
) -> None:
    model, processor = small_guarded()
    with torch.no_grad():
        model.model.language_model.layers[0].mlp.up_proj.weight.fill_(float("nan"))
    data = EncodedSamples(WORLD.instructions(8), processor, stage2_recipe.max_length)
    with pytest.raises(TrainingError, match=r"learning_rate.*--resume"):
        Stage2Trainer(model, stage2_recipe, data, tmp_path, seed=0).run(resume=False)


def test_a_collapsed_codebook_stops_the_run() -> None:
    refuse_collapsed("semantic", 12.8, 128)
    with pytest.raises(CodebookCollapseError, match=r"12\.7 of 128.*revive"):
        refuse_collapsed("semantic", 12.7, 128)
    with pytest.raises(CodebookCollapseError):
        refuse_collapsed("patch", float("nan"), 128)


def test_a_full_disk_leaves_the_previous_checkpoint(
    small_guarded: Any,
    stage2_recipe: StageRecipe,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, processor = small_guarded()
    data = EncodedSamples(WORLD.instructions(24), processor, stage2_recipe.max_length)
    real, written = save_file, list[Path]()

    def full(tensors: Any, path: Path) -> None:
        if len(written) == 2:
            path.write_bytes(b"the first bytes")
            raise OSError(28, "No space left on device")
        written.append(path)
        real(tensors, path)

    monkeypatch.setattr(checkpointed_module, "save_file", full)
    with pytest.raises(TrainingError, match=r"No space left.*checkpoint-4 is whole.*--resume"):
        Stage2Trainer(model, stage2_recipe, data, tmp_path, seed=0).run(resume=False)
    assert last_checkpoint(tmp_path) == tmp_path / "checkpoint-4"
    monkeypatch.undo()
    again, processor = small_guarded()
    Stage2Trainer(again, stage2_recipe, data, tmp_path, seed=0).run(resume=True)
    assert last_checkpoint(tmp_path) == tmp_path / "checkpoint-6"


def test_a_truncated_checkpoint_is_passed_over(tmp_path: Path) -> None:
    for step in (2, 10):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        (folder / "weights").write_bytes(b"12345")
        (folder / "complete.json").write_text('{"weights": 5}')
    assert last_checkpoint(tmp_path) == tmp_path / "checkpoint-10"
    (tmp_path / "checkpoint-10" / "weights").write_bytes(b"123")
    assert last_checkpoint(tmp_path) == tmp_path / "checkpoint-2"
    (tmp_path / "checkpoint-2" / "complete.json").unlink()
    assert last_checkpoint(tmp_path) is None


def test_checkpoints_of_an_earlier_run_are_not_overwritten(
    small_guarded: Any, stage2_recipe: StageRecipe, tmp_path: Path
) -> None:
    model, processor = small_guarded()
    data = EncodedSamples(WORLD.instructions(8), processor, stage2_recipe.max_length)
    Stage2Trainer(model, stage2_recipe, data, tmp_path, seed=0).run(resume=False)
    with pytest.raises(ConfigError, match="--resume"):
        Stage2Trainer(model, stage2_recipe, data, tmp_path, seed=0).run(resume=False)


def test_a_checkpoint_of_another_engine_is_not_gone_on_from(
    small_guarded: Any, stage2_recipe: Any, tmp_path: Path
) -> None:
    model, processor = small_guarded()
    data = EncodedSamples(WORLD.instructions(stage2_recipe.samples), processor, 256)
    Stage2Trainer(model, stage2_recipe, data, tmp_path, seed=0).run(resume=False)
    checkpoint = last_checkpoint(tmp_path)
    assert checkpoint is not None
    # As two processes under DeepSpeed leave it.
    (checkpoint / "optimizer.pt").rename(checkpoint / "optimizer-0-of-2.pt")
    mark_complete(checkpoint)
    model, _ = small_guarded()
    with pytest.raises(ConfigError, match=r"another engine.*optimizer\.pt.*optimizer-0-of-2\.pt"):
        Stage2Trainer(model, stage2_recipe, data, tmp_path, seed=0).run(resume=True)


def test_a_stage_that_had_ended_takes_no_step_more(
    small_guarded: Any, stage2_recipe: StageRecipe, tmp_path: Path
) -> None:
    recipe = replace(stage2_recipe, epochs=0.5)
    model, processor = small_guarded()
    data = EncodedSamples(WORLD.instructions(16), processor, recipe.max_length)
    Stage2Trainer(model, recipe, data, tmp_path, seed=0).run(resume=False)
    assert last_checkpoint(tmp_path) == tmp_path / "checkpoint-2"
    again, _ = small_guarded()
    Stage2Trainer(again, recipe, data, tmp_path, seed=0).run(resume=True)
    assert last_checkpoint(tmp_path) == tmp_path / "checkpoint-2"
    assert not moved(again, snapshot(model))


def test_revival_draws_from_all_micro_batches_of_a_step(
    small_guarded: Any, stage1_recipe: Stage1Recipe, tmp_path: Path
) -> None:
    recipe = replace(
        stage1_recipe, samples=16, batch=16, epochs=2, revive_every=1, revive_until=0.5
    )
    results = []
    for name, one in (("whole", recipe), ("micro", replace(recipe, micro_batch=4))):
        model, processor = small_guarded()
        data = captions(processor, one)
        Stage1Trainer(model, one, data, tmp_path / name, seed=0).run(resume=False)
        results.append(model.vqguard.patch.codebook.weight.detach())
    # The second step moves entries by the learning rate at most: rows of other features are apart.
    assert torch.allclose(results[0], results[1], atol=1e-4)


def test_a_processor_takes_stage_2_in_halves(
    small_guarded: Any, stage2_recipe: StageRecipe, tmp_path: Path
) -> None:
    recipe = replace(stage2_recipe, samples=16, batch=16)
    model, processor = small_guarded()
    data = EncodedSamples(WORLD.instructions(16), processor, recipe.max_length)
    trainer = Stage2Trainer(model, recipe, data, tmp_path, seed=0)
    halves = 1 if torch.cuda.is_available() else 2
    assert trainer.args.per_device_train_batch_size == 16 // halves
    assert trainer.args.gradient_accumulation_steps == halves


@pytest.mark.parametrize(("batch", "micro_batch"), [(8, None), (17, None), (16, 4)])
def test_small_odd_and_chosen_batches_are_not_halved(batch: int, micro_batch: int | None) -> None:
    recipe = StageRecipe(samples=64, batch=batch, micro_batch=micro_batch)
    assert in_halves(recipe) == recipe


def test_micro_batches_hold_like_lengths(
    small_guarded: Any, stage2_recipe: StageRecipe, tmp_path: Path
) -> None:
    recipe = replace(stage2_recipe, samples=16, batch=16, micro_batch=4)
    model, processor = small_guarded()
    data = EncodedSamples(WORLD.instructions(16), processor, recipe.max_length)
    trainer = Stage2Trainer(model, recipe, data, tmp_path, seed=0)
    lengths = sorted((len(data[number]["input_ids"]) for number in range(16)), reverse=True)
    step = iter([[data[number] for number in range(first, first + 4)] for first in (0, 4, 8, 12)])
    batches, _ = trainer.get_batch_samples(step, 4, torch.device("cpu"))
    assert len(set(lengths)) > 1
    assert [batch["input_ids"].shape[1] for batch in batches] == lengths[::4]


SCRIPT = textwrap.dedent(
    """
    import sys, time
    from pathlib import Path
    import torch
    from vqguard.adapters import build_guard, guard_model
    from vqguard.recipes.data.encoding import EncodedSamples
    from vqguard.recipes.recipe import Stage1Recipe
    from vqguard.recipes.training.stage1 import Stage1Trainer
    from vqguard.recipes.tiny.model import *
    from vqguard.recipes.tiny.world import TinyWorld

    torch.set_num_threads(1)
    sizes = TinySizes.from_json(sys.argv[1])
    recipe = Stage1Recipe.from_json(sys.argv[2])
    torch.manual_seed(0)
    tokenizer = build_tokenizer()
    model = build_model(sizes, tokenizer)
    processor = build_processor(sizes, tokenizer)
    guard = build_guard(model, patch_codes=32, semantic_codes=8, refusal_text="sorry .")
    guard_model(model, guard, processor)
    data = EncodedSamples(TinyWorld(0).captions(recipe.samples), processor, recipe.max_length)
    stage = Stage1Trainer(model, recipe, data, Path(sys.argv[3]), seed=0)
    if sys.argv[4] == "slowly":
        inner = stage.losses
        def slow(*arguments):
            time.sleep(0.2)
            return inner(*arguments)
        stage.losses = slow
    stage.run(resume=sys.argv[4] == "resume")
    torch.save(dict(model.named_parameters()), sys.argv[5])
    """
)


@pytest.mark.alone
def test_a_killed_run_resumes_to_the_uninterrupted_result(
    small_sizes: TinySizes, stage1_recipe: Stage1Recipe, tmp_path: Path
) -> None:
    small_sizes.to_json(tmp_path / "sizes.json")
    stage1_recipe.to_json(tmp_path / "recipe.json")
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}

    def start(folder: str, how: str, result: str) -> subprocess.Popen[bytes]:
        paths = [str(tmp_path / name) for name in ("sizes.json", "recipe.json", folder)]
        command = [sys.executable, "-c", SCRIPT, *paths, how, str(tmp_path / result)]
        return subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL)

    whole_run = start("whole", "fresh", "whole.pt")
    victim = start("killed", "slowly", "never.pt")
    deadline = time.monotonic() + 240
    while last_checkpoint(tmp_path / "killed") is None and time.monotonic() < deadline:
        assert victim.poll() is None, "it ended before it could be killed"
        time.sleep(0.02)
    victim.send_signal(signal.SIGKILL)
    victim.wait()
    assert not (tmp_path / "never.pt").exists()
    assert start("killed", "resume", "resumed.pt").wait(300) == 0
    assert whole_run.wait(300) == 0
    whole = torch.load(tmp_path / "whole.pt", weights_only=True)
    resumed = torch.load(tmp_path / "resumed.pt", weights_only=True)
    assert all(torch.equal(tensor, resumed[name]) for name, tensor in whole.items())
    steps = [
        json.loads(line)["step"]
        for line in (tmp_path / "killed" / "metrics.jsonl").read_text().splitlines()
    ]
    assert steps == list(range(1, 9))

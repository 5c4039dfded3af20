"""The embedded world's refusals beside several pictures: what they are, and stage 2 on them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from vqguard.errors import ConfigError
from vqguard.recipes.attacking.messages import picture_prompt
from vqguard.recipes.data.chat import ChatTemplate
from vqguard.recipes.data.encoding import EncodedSamples
from vqguard.recipes.data.feature_cache import FeatureCache
from vqguard.recipes.data.picture_codes import build_codes
from vqguard.recipes.data.samples import IMAGE_MARK, Sample
from vqguard.recipes.models import base_processor
from vqguard.recipes.planning.embedded import embedded_lengths
from vqguard.recipes.recipe import SafetyRecipe, Stage2Recipe, load_recipe
from vqguard.recipes.run_samples import RunSamples
from vqguard.recipes.tiny import language
from vqguard.recipes.tiny.world import TinyWorld
from vqguard.recipes.training.stage2 import Stage2Trainer

MakeModel = Callable[..., tuple[Any, Any]]
SMALL = ["stage1.samples=40", "stage2.samples=40", "guard.start_samples=8"]
THREE = ["stage2.safety.share=0.5", "stage2.safety.pictures=3"]
BEFORE = "6c55b66fb93c233fe41eb11d0357944ec63b178e73d0801d3aaef2ec653118e8"
"""Of eight samples, as they were before there was a number of pictures."""


def digest(samples: Sequence[Sample]) -> str:
    """SHA-256 over names, turns and pixels."""
    seen = hashlib.sha256()
    for sample in samples:
        seen.update(json.dumps([sample.id, sample.turns]).encode())
        for opener in sample.images:
            seen.update(opener().tobytes())
    return seen.hexdigest()


def run_samples(*changes: str) -> RunSamples:
    return RunSamples(load_recipe("llava-tiny").override([*SMALL, *changes]), skip_bad=False)


def test_one_picture_gives_the_samples_that_always_were() -> None:
    assert digest(TinyWorld(0).refusals(8)) == BEFORE
    assert digest(TinyWorld(0).refusals(8, 1)) == BEFORE


def test_a_sample_shows_one_to_so_many_pictures_by_the_seed() -> None:
    one, three = TinyWorld(0).refusals(60), TinyWorld(0).refusals(60, 3)
    counts = [len(sample.images) for sample in three]
    assert set(counts) == {1, 2, 3}
    assert digest(three) == digest(TinyWorld(0).refusals(60, 3))
    assert counts != [len(sample.images) for sample in TinyWorld(1).refusals(60, 3)]
    for plain, several, count in zip(one, three, counts, strict=True):
        pixels = [opener().tobytes() for opener in several.images]
        assert len(set(pixels)) == count
        assert pixels[0] == plain.images[0]().tobytes()
        assert [answer for _, answer in several.turns] == [answer for _, answer in plain.turns]
        assert several.turns[0][0] == f"{IMAGE_MARK}\n" * (count - 1) + plain.turns[0][0]
        assert (several.id == plain.id) == (count == 1)
        answers = [answer for _, answer in several.turns]
        assert answers.count(language.REFUSAL) == 1


def test_a_name_says_which_pictures_there_are() -> None:
    """Features and codes are kept by name, maybe longer than the setting stays."""
    named: dict[str, list[bytes]] = {}
    for pictures in (1, 2, 3, 5):
        for sample in TinyWorld(0).refusals(40, pictures):
            pixels = [opener().tobytes() for opener in sample.images]
            assert named.setdefault(sample.id, pixels) == pixels


def test_a_message_reads_as_that_of_an_attack() -> None:
    processor = base_processor(load_recipe("llava-tiny"))
    sample = next(s for s in TinyWorld(0).refusals(60, 3) if len(s.images) == 3)
    text, _ = ChatTemplate(processor).conversation(sample)
    request = sample.turns[0][0].replace(f"{IMAGE_MARK}\n", "")
    assert text.startswith(picture_prompt(processor, request, pictures=3))


def test_a_run_mixes_them_and_its_plan_has_room_for_them() -> None:
    samples = run_samples(*THREE)
    refusals = [s for s in samples.instructions if s.id.startswith("refusal-")]
    assert len(samples.instructions) == 2 * len(refusals) == 40
    assert {len(sample.images) for sample in refusals} == {1, 2, 3}
    again = run_samples(*THREE)  # as the control and a resumed run make them
    assert digest(list(again.instructions)) == digest(list(samples.instructions))
    recipe = load_recipe("llava-tiny")
    _, plain = embedded_lengths(recipe.override(["stage2.safety.share=0"]))
    _, planned = embedded_lengths(recipe.override(THREE))
    encoded = EncodedSamples(refusals, base_processor(recipe), 256)
    longest = max(len(encoded[index]["input_ids"]) for index in range(len(encoded)))
    assert plain < longest <= planned


def test_pictures_that_find_no_room_are_refused_before_training() -> None:
    with pytest.raises(ConfigError, match=r"pictures: 9 pictures .*2\.max_length is 256"):
        run_samples("stage2.safety.share=0.5", "stage2.safety.pictures=9")
    run_samples("stage2.safety.share=0.5", "stage2.safety.pictures=9", "stage2.max_length=400")


def test_the_number_is_three_where_none_is_named() -> None:
    assert digest(run_samples("stage2.safety.share=0.5").instructions) == digest(
        run_samples(*THREE).instructions
    )


def test_a_number_without_a_use_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="at least 1, got 0"):
        SafetyRecipe(share=0.1, pictures=0)
    with pytest.raises(ConfigError, match="pictures: is set and share is 0"):
        SafetyRecipe(pictures=3)
    with pytest.raises(ConfigError, match="a file's entries say"):
        SafetyRecipe(share=0.1, pictures=3, data=tmp_path / "train.json")


def test_stage_2_trains_on_them_from_pixels_features_and_codes(
    small_guarded: MakeModel, stage2_recipe: Stage2Recipe, tmp_path: Path
) -> None:
    samples = [*TinyWorld(0).refusals(20, 3)[14:], *TinyWorld(0).instructions(2)]
    assert {len(sample.images) for sample in samples} == {0, 1, 2, 3}
    recipe = replace(stage2_recipe, batch=4, samples=len(samples), epochs=2)
    losses = {}
    for way in ("pixels", "features", "codes"):
        model, processor = small_guarded()
        data = EncodedSamples(samples, processor, 256)
        if way == "features":
            data.cache = FeatureCache.build(tmp_path / "features", model, processor, samples)
        if way == "codes":
            data.codes = build_codes(tmp_path / "codes", model, data)
            kept = build_codes(tmp_path / "codes", model, EncodedSamples(samples, processor, 256))
            assert len(kept[samples[1].id].layout.tokens) == len(samples[1].images)
        folder = tmp_path / way
        Stage2Trainer(model, recipe, data, folder, seed=0).run(resume=False)
        lines = (folder / "metrics.jsonl").read_text().splitlines()
        losses[way] = [json.loads(line)["loss"] for line in lines]
    assert len(losses["pixels"]) == 4
    assert losses["codes"] == losses["pixels"]
    assert losses["features"] == pytest.approx(losses["pixels"], rel=1e-4)


def test_training_on_them_goes_on_where_it_was(
    small_guarded: MakeModel,
    stage2_recipe: Stage2Recipe,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    recipe = replace(stage2_recipe, batch=2, samples=8, checkpoint_every=2)

    def trained(folder: Path, *, resume: bool) -> dict[str, torch.Tensor]:
        model, processor = small_guarded()
        data = EncodedSamples(TinyWorld(0).refusals(8, 3), processor, 256)
        model = Stage2Trainer(model, recipe, data, folder, seed=0).run(resume=resume)
        return dict(model.state_dict())

    whole = trained(tmp_path / "whole", resume=False)
    losses, calls = Stage2Trainer.losses, []

    def dying(*given: Any) -> Any:
        calls.append(given)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return losses(*given)

    monkeypatch.setattr(Stage2Trainer, "losses", dying)
    with pytest.raises(KeyboardInterrupt):
        trained(tmp_path / "halves", resume=False)
    monkeypatch.undo()
    resumed = trained(tmp_path / "halves", resume=True)
    assert all(torch.equal(resumed[name], tensor) for name, tensor in whole.items())

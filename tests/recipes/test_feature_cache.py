"""Features on disk: the same training as with pixels, and refused where they are another's."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import vqguard.recipes.data.feature_cache as feature_cache
import vqguard.recipes.image_batches as image_batches
from vqguard.adapters import (
    VisualFeatures,
    encoder_features,
    get_adapter,
    load_guarded,
    visual_features,
)
from vqguard.errors import ArtefactError, ChecksumError, ConfigError
from vqguard.recipes.data.encoding import (
    CAPTION,
    ENCODER_SEMANTIC,
    ENCODER_TOKENS,
    Collator,
    EncodedSamples,
)
from vqguard.recipes.data.feature_cache import FeatureCache
from vqguard.recipes.data.samples import Sample
from vqguard.recipes.image_batches import pixel_inputs
from vqguard.recipes.recipe import Stage1Recipe
from vqguard.recipes.tiny.world import TinyWorld
from vqguard.recipes.training.stage1 import Stage1Trainer

MakeModel = Callable[..., tuple[Any, Any]]


@pytest.fixture(autouse=True)
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(feature_cache, "SHARD_IMAGES", 5)
    monkeypatch.setattr(image_batches, "IMAGES", 2)


def samples(count: int = 12) -> list[Sample]:
    return list(TinyWorld(0).instructions(count))


def test_features_are_those_of_the_vision_encoder(small_guarded: MakeModel, tmp_path: Path) -> None:
    model, processor = small_guarded()
    every = samples()
    cache = FeatureCache.build(tmp_path, model, processor, every)
    pictured = [sample for sample in every if sample.image is not None]
    assert len(cache) == len(pictured)
    for sample in pictured:
        assert sample.image is not None
        inputs: Any = pixel_inputs(processor, [sample.image()], model.device)
        with torch.no_grad():
            alone = visual_features(model, site="encoder", **inputs)
        (kept,) = cache[sample.id]
        assert torch.allclose(kept.tokens, alone.tokens[0], atol=1e-5)
        assert torch.allclose(kept.semantic, alone.semantic[0], atol=1e-5)
        assert kept.placeholders == len(kept.tokens)


def test_a_sample_is_encoded_as_with_its_pixels(small_guarded: MakeModel, tmp_path: Path) -> None:
    model, processor = small_guarded()
    every = samples()
    cache = FeatureCache.build(tmp_path, model, processor, every)
    plain = EncodedSamples(every, processor, 256)
    cached = EncodedSamples(every, processor, 256, cache)
    for index in range(len(every)):
        one, other = plain[index], cached[index]
        assert one["input_ids"] == other["input_ids"]
        assert one["labels"] == other["labels"]
        assert ("pixel_values" in one) == (ENCODER_TOKENS in other)
        assert "pixel_values" not in other


def test_training_on_kept_features_is_training_on_pixels(
    small_guarded: MakeModel, stage1_recipe: Stage1Recipe, tmp_path: Path
) -> None:
    ends = []
    for name in ("pixels", "kept"):
        model, processor = small_guarded()
        data = TinyWorld(0).captions(stage1_recipe.samples)
        cache = None
        if name == "kept":
            cache = FeatureCache.build(tmp_path / "features", model, processor, data)
            model.model.vision_tower.forward = None  # must not run any more
        encoded = EncodedSamples(data, processor, 128, cache)
        recipe = replace(stage1_recipe, revive_every=0)
        Stage1Trainer(model, recipe, encoded, tmp_path / name, seed=0).run(resume=False)
        ends.append([p.detach() for _, p in get_adapter(model).stage1_trainable(model)])
    for one, other in zip(*ends, strict=True):
        assert torch.allclose(one, other, atol=1e-5)


def test_a_killed_build_goes_on_where_it_was(
    small_guarded: MakeModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, processor = small_guarded()
    every = samples(16)
    real, calls = feature_cache._encode, []

    def failing(*arguments: Any) -> Any:
        calls.append(len(arguments[2]))
        if sum(calls) > 7:
            raise KeyboardInterrupt
        return real(*arguments)

    monkeypatch.setattr(feature_cache, "_encode", failing)
    with pytest.raises(KeyboardInterrupt):
        FeatureCache.build(tmp_path, model, processor, every)
    calls.clear()

    def counting(*arguments: Any) -> Any:
        calls.append(len(arguments[2]))
        return real(*arguments)

    monkeypatch.setattr(feature_cache, "_encode", counting)
    cache = FeatureCache.build(tmp_path, model, processor, every)
    assert sum(calls) == len(cache) - 5  # the first shard was whole
    calls.clear()
    FeatureCache.build(tmp_path, model, processor, every)
    assert not calls


def test_another_s_features_are_refused(small_guarded: MakeModel, tmp_path: Path) -> None:
    model, processor = small_guarded()
    every = samples()
    FeatureCache.build(tmp_path, model, processor, every)
    other, _ = small_guarded(seed=1)
    with pytest.raises(ConfigError, match="tower_sha256"):
        FeatureCache.build(tmp_path, other, processor, every)
    processor.image_processor.image_mean = [0.4] * 3
    with pytest.raises(ConfigError, match="processor_sha256"):
        FeatureCache.build(tmp_path, model, processor, every)
    processor.image_processor.image_mean = [0.5] * 3
    elsewhere = [
        replace(sample, images=every[5].images) if sample.images else sample for sample in every
    ]
    with pytest.raises(ConfigError, match="another picture under the id"):
        FeatureCache.build(tmp_path, model, processor, elsewhere)


def test_a_saved_model_is_the_same_model(small_guarded: MakeModel, tmp_path: Path) -> None:
    """A resumed run builds its model from a saved one and goes on with the same features."""
    model, processor = small_guarded()
    every = samples()
    cache = FeatureCache.build(tmp_path / "cache", model, processor, every)
    model.save_pretrained(tmp_path / "saved")
    again = FeatureCache.build(
        tmp_path / "cache", load_guarded(tmp_path / "saved"), processor, every
    )
    assert again.identity == cache.identity


def test_one_id_names_one_picture(small_guarded: MakeModel, tmp_path: Path) -> None:
    model, processor = small_guarded()
    first, second = samples(3)[1:]
    with pytest.raises(ConfigError, match="ids of their own"):
        FeatureCache.build(tmp_path, model, processor, [first, replace(second, id=first.id)])
    (opener,) = first.images
    again = replace(first, images=(lambda: opener().copy(),))
    assert len(FeatureCache.build(tmp_path, model, processor, [first, first, again])) == 1


def test_a_changed_shard_and_a_damaged_index_are_refused(
    small_guarded: MakeModel, tmp_path: Path
) -> None:
    model, processor = small_guarded()
    every = samples()
    cache = FeatureCache.build(tmp_path, model, processor, every)
    with pytest.raises(ArtefactError, match="no features of sample 'none'"):
        cache["none"]
    shard = tmp_path / "features-00000.safetensors"
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    with pytest.raises(ChecksumError, match="features-00000"):
        cache[every[1].id]
    shard.unlink()
    with pytest.raises(ArtefactError, match="cannot be read"):
        cache[every[1].id]
    index = tmp_path / "index.json"
    content = json.loads(index.read_text())
    problems: dict[str, dict[str, Any]] = {
        "identity.dtype: missing key": {"identity": {"model_type": "llava"}},
        r"shards\[0\]: expected str, got 1": {"shards": [1]},
        "schema: expected one of 2, got 1": {"schema": 1},
        r"samples 'a'\[0\]": {"samples": {"a": [[0, 0, 0, 4, 4]]}},
        "unknown key. Did you mean 'shards'": {"shard": []},
    }
    for problem, change in problems.items():
        index.write_text(json.dumps({**content, **change}))
        with pytest.raises(ArtefactError, match=problem):
            FeatureCache.build(tmp_path, model, processor, every)
    index.write_text("{")
    with pytest.raises(ArtefactError, match="damaged"):
        FeatureCache.build(tmp_path, model, processor, every)


def test_a_cache_travels_to_worker_processes(small_guarded: MakeModel, tmp_path: Path) -> None:
    model, processor = small_guarded()
    every = samples()
    cache = FeatureCache.build(tmp_path, model, processor, every)
    (kept,) = cache[every[1].id]
    twin = pickle.loads(pickle.dumps(cache))
    assert torch.equal(twin[every[1].id][0].tokens, kept.tokens)


def test_kept_features_give_the_logits_of_the_pixels(
    small_guarded: MakeModel, tmp_path: Path
) -> None:
    model, processor = small_guarded()
    every = [sample for sample in samples() if sample.image is not None][:4]
    cache = FeatureCache.build(tmp_path, model, processor, every)
    collate = Collator(processor.tokenizer.pad_token_id)
    unused = CAPTION

    def batch(kept: FeatureCache | None) -> dict[str, Any]:
        encoded = EncodedSamples(every, processor, 256, kept)
        made = collate([encoded[i] for i in range(len(every))])
        return {name: value for name, value in made.items() if name not in unused}

    inputs = batch(cache)
    features = VisualFeatures(inputs.pop(ENCODER_TOKENS), inputs.pop(ENCODER_SEMANTIC))
    with torch.no_grad():
        by_pixels = model(**batch(None)).logits
        with encoder_features(model, features):
            by_features = model(**inputs).logits
    assert torch.allclose(by_pixels, by_features, atol=1e-5)

"""The recipes by name: what each YAML says, and that it fits what it feeds."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
import transformers

from vqguard.adapters import resolve_model
from vqguard.errors import ConfigError
from vqguard.recipes.models import base_model
from vqguard.recipes.planning.meta_model import choose_trained, meta_model
from vqguard.recipes.public_sizes import check_loaded, public_config, public_configs
from vqguard.recipes.recipe import RetrofitRecipe, load_recipe, recipe_names
from vqguard.recipes.retrofit import warn_of_other_sizes
from vqguard.recipes.training.step import micro_batches

NAMED = sorted(
    "llava-1.5 llava-1.5-13b llava-next qwen2-vl qwen2.5-vl qwen3-vl instructblip".split()
)


def test_the_names() -> None:
    assert set(recipe_names()) >= {*NAMED, "llava-tiny"}


@pytest.mark.parametrize("name", NAMED)
def test_a_recipe_has_the_papers_numbers(name: str) -> None:
    recipe = load_recipe(name)
    assert (recipe.guard.semantic_codes, recipe.guard.patch_codes) == (128, 16000)
    assert (recipe.stage1.vq_weight, recipe.stage1.semantic_weight) == (0.5, 0.1)
    assert recipe.guard.commitment_weight == 0.25
    assert (recipe.stage1.samples, recipe.stage2.samples) == (558_000, 665_000)
    assert (recipe.stage1.batch, recipe.stage2.batch) == (256, 128)
    assert (recipe.calibration.per_category, recipe.calibration.neutral) == (50, 500)
    assert recipe.calibration.tau == 0.6
    assert recipe.stage2.lora is not None
    assert micro_batches(recipe.stage1, 8)[1] > 1  # eight devices share it


def test_llava_tiny_is_what_it_was() -> None:
    recipe = load_recipe("llava-tiny")
    assert recipe.stage2.lora is None
    for stage in (recipe.stage1, recipe.stage2):
        assert not stage.bf16
        assert not stage.gradient_checkpointing
        assert micro_batches(stage, 1) == (stage.batch, 1)


@pytest.mark.parametrize("name", [*NAMED, "llava-tiny"])
def test_a_recipe_builds_its_model_without_weights(name: str) -> None:
    recipe = load_recipe(name)
    meta = meta_model(recipe)
    assert {p.device.type for p in meta.model.parameters()} == {"meta"}
    counts = meta.counts()
    width = meta.adapter.width(meta.model, recipe.guard.site)
    levels = 1 + meta.adapter.deep_levels(meta.model)
    assert counts["codebooks"] == width * (16000 * levels + 128)
    assert "rest" not in counts or counts["rest"] < 10_000_000
    first = meta.counts(choose_trained(meta, recipe.stage1, 1))
    assert set(first) == {"projector", "codebooks"}
    assert first["codebooks"] == counts["codebooks"]
    second = meta.counts(choose_trained(meta, recipe.stage2, 2))
    lora = recipe.stage2.lora is not None
    assert set(second) == ({"low-rank adapters"} if lora else {"language model"})


@pytest.mark.parametrize(
    ("checkpoint", "billions"),
    [  # published totals, as known when written; no hub was asked
        ("llava-hf/llava-1.5-7b-hf", 7.06),
        ("Qwen/Qwen2.5-VL-7B-Instruct", 8.29),
        ("Qwen/Qwen3-VL-8B-Instruct", 8.77),
        ("Salesforce/instructblip-vicuna-7b", 7.91),
    ],
)
def test_sizes_make_the_published_number_of_parameters(checkpoint: str, billions: float) -> None:
    model = _build(checkpoint)
    assert sum(p.numel() for p in model.parameters()) / 1e9 == pytest.approx(billions, abs=0.006)


def test_every_recipe_of_the_hub_has_its_sizes() -> None:
    for name in NAMED:
        assert public_config(resolve_model(load_recipe(name).model).location) is not None


def test_every_size_is_cited() -> None:
    for one in public_configs():
        assert one.checkpoint in one.source


@pytest.mark.parametrize("one", public_configs(), ids=lambda one: one.checkpoint)
def test_a_checkpoint_of_these_sizes_passes_and_another_is_told(one: object) -> None:
    checkpoint = one.checkpoint  # type: ignore[attr-defined]
    model: Any = _build(checkpoint)
    assert check_loaded(model, checkpoint) == []
    layers = model.config.text_config.num_hidden_layers
    model.config.text_config.num_hidden_layers -= 1
    (told,) = check_loaded(model, checkpoint)
    assert told == f"text_config.num_hidden_layers is {layers - 1}, expected {layers}"


def test_another_kind_of_model_is_refused() -> None:
    model: Any = _build("Qwen/Qwen2-VL-7B-Instruct")
    with pytest.raises(ConfigError, match=r"is a 'qwen2_vl', and its recipe is for a 'llava'"):
        check_loaded(model, "llava-hf/llava-1.5-7b-hf")


def test_other_sizes_are_warned_of_and_planned_again(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    recipe = load_recipe("llava-1.5").override(["stage1.max_length=700", "stage2.max_length=700"])
    model: Any = _build("llava-hf/llava-1.5-7b-hf")
    model.config.text_config.num_hidden_layers = 2
    monkeypatch.setattr(
        transformers.AutoModelForImageTextToText, "from_pretrained", lambda *_, **__: model
    )
    monkeypatch.setattr("vqguard.recipes.models.open_processor", lambda *_, **__: "processor")
    described: tuple[dict[str, Any], dict[str, Any]] = model.config.to_dict(), {}
    monkeypatch.setattr(
        transformers.PreTrainedConfig, "get_config_dict", lambda *_, **__: described
    )
    assert base_model(recipe) == (model, "processor")
    warn_of_other_sizes(recipe, model)
    (line,) = [r.getMessage() for r in caplog.records if "other sizes" in r.getMessage()]
    assert "text_config.num_hidden_layers is 2, expected 32" in line
    again = [float(one) for one in re.findall(r"stage \d (\d+\.\d) GB", line)]
    assert len(again) == 2
    assert all(total < 10 for total in again)  # 2 of 32 layers


def test_other_checkpoints_are_not_held_against_anything() -> None:
    assert check_loaded(object(), "someone/else") == []


def test_a_checkpoint_without_known_sizes_says_what_to_do() -> None:
    recipe: RetrofitRecipe = load_recipe("llava-1.5").override(["model=smolvlm2"])
    with pytest.raises(ConfigError, match=r"not in the package.*config\.json"):
        meta_model(recipe)


def _build(checkpoint: str) -> torch.nn.Module:
    from transformers import CONFIG_MAPPING, AutoModelForImageTextToText

    known = public_config(checkpoint)
    assert known is not None
    fields = dict(known.config)
    config = CONFIG_MAPPING[fields.pop("model_type")](**fields)
    with torch.device("meta"):
        model: torch.nn.Module = AutoModelForImageTextToText.from_config(config)
    return model

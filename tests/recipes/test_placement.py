"""A model that is spread over devices is trained to the same result as on one."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import dispatch_model
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText

from vqguard.adapters import build_guard, guard_model
from vqguard.errors import ConfigError
from vqguard.recipes.data.encoding import EncodedSamples
from vqguard.recipes.models import base_model
from vqguard.recipes.placement import is_spread, loading, place
from vqguard.recipes.recipe import RetrofitRecipe, load_recipe
from vqguard.recipes.retrofit import retrofit
from vqguard.recipes.run import MODEL, open_run
from vqguard.recipes.tiny.world import TinyWorld
from vqguard.recipes.training.stage1 import Stage1Trainer
from vqguard.recipes.training.stage2 import Stage2Trainer


@pytest.fixture
def recipe(tmp_path: Path, small_model: Any) -> RetrofitRecipe:
    """A local model and data of its user's own."""
    for part in small_model():
        part.save_pretrained(tmp_path / "base")
    entries = []
    for number, sample in enumerate(TinyWorld(5).captions(24)):
        assert sample.image is not None
        sample.image().save(tmp_path / f"{number}.png")
        (question, answer), *_ = sample.turns
        said = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
        entries.append({"id": sample.id, "image": f"{number}.png", "conversations": said})
    (tmp_path / "data.json").write_text(json.dumps(entries))
    return load_recipe("llava-tiny").override(
        [
            f"model={tmp_path / 'base'}",
            f"data={tmp_path / 'data.json'}",
            f"images={tmp_path}",
            "guard.patch_codes=16",
            "guard.semantic_codes=4",
            "guard.start_samples=16",
            "stage1.samples=16",
            "stage1.batch=4",
            "stage2.samples=16",
            "stage2.batch=4",
        ]
    )


def spread(model: Any) -> Any:
    """Every layer with Accelerate's hooks, as on several devices; here all of them are the CPU."""
    places = {
        name: "cpu"
        for name, module in model.named_modules()
        if not list(module.children()) and list(module.parameters())
    }
    loose = model.state_dict().keys() - {
        f"{name}.{one}" for name in places for one in model.get_submodule(name).state_dict()
    }
    places |= dict.fromkeys(loose, "cpu")
    return dispatch_model(model, places, main_device="cpu", force_hooks=True)


def test_a_spread_model_is_trained_to_the_same_result(
    small_model: Any, stage1_recipe: Any, stage2_recipe: Any, tmp_path: Path
) -> None:
    world, found = TinyWorld(3), []
    for name in ("one", "spread"):
        model, processor = small_model()
        if name == "spread":
            model = spread(model)
            assert is_spread(model)
        guard_model(model, build_guard(model, patch_codes=32, semantic_codes=8), processor)
        assert place(model) is model
        for kind, recipe, samples in (
            (Stage1Trainer, stage1_recipe, world.captions(16)),
            (Stage2Trainer, stage2_recipe, world.instructions(16)),
        ):
            short = replace(recipe, samples=16)
            data = EncodedSamples(samples, processor, short.max_length)
            model = kind(model, short, data, tmp_path / name / kind.stage, seed=0).run(resume=False)
        model.save_pretrained(tmp_path / name / MODEL)
        found.append(load_file(tmp_path / name / MODEL / "guarded.safetensors"))
    assert found[0].keys() == found[1].keys()
    for key, tensor in found[0].items():
        torch.testing.assert_close(found[1][key], tensor, rtol=1e-5, atol=1e-6)


def test_a_retrofit_takes_a_device_map(recipe: RetrofitRecipe, tmp_path: Path) -> None:
    asked: list[Any] = []
    load: Any = AutoModelForImageTextToText.from_pretrained

    def recorded(*given: Any, **more: Any) -> Any:
        asked.append(more.get("device_map"))
        return load(*given, **more)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(AutoModelForImageTextToText, "from_pretrained", recorded)
        retrofit(recipe.override(["device_map=auto"]), tmp_path / "run", command="pytest")
    assert len(asked) > 1
    assert set(asked) == {"auto"}


def test_several_processes_do_not_share_a_spread_model(
    recipe: RetrofitRecipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="2 processes were launched"):
        base_model(recipe.override(["device_map=auto"]))
    assert loading(None) == {}


def test_a_model_of_the_package_needs_no_device_map() -> None:
    with pytest.raises(ConfigError, match="fits on one device"):
        base_model(load_recipe("llava-tiny").override(["device_map=auto"]))


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_layers_lie_on_both_gpus(recipe: RetrofitRecipe, tmp_path: Path) -> None:
    retrofit(recipe.override(["device_map=balanced"]), tmp_path / "run", command="pytest")
    opened = open_run(tmp_path / "run").model
    assert {p.device.index for p in opened.parameters()} == {0, 1}

"""Which recipe a model's name, alias, id or folder means."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from vqguard.adapters.catalogue import ModelEntry, list_models
from vqguard.cli.retrofit import _recipe
from vqguard.errors import VQGuardError

FAMILIES = {"llava", "llava_next", "qwen2_vl", "qwen2_5_vl", "qwen3_vl", "instructblip"}


@pytest.mark.parametrize("entry", list_models(), ids=lambda entry: entry.name)
def test_every_name_and_id_finds_its_recipe(
    entry: ModelEntry, capsys: pytest.CaptureFixture[str]
) -> None:
    name, place = entry.name, entry.location
    hub = entry.source == "hub"
    for asked in [name, place, f"hub:{place}"] if hub else [name]:
        recipe = _recipe(asked, None)
        said = capsys.readouterr().err
        if entry.model_type in FAMILIES:
            assert "untried on this model" not in said
            continue
        assert recipe.model == asked
        assert recipe.stage2 == _recipe("qwen2.5-vl", None).stage2
        assert f"No recipe is for {place} or its family: takes that of qwen2.5-vl" in said


def test_the_readme_s_id() -> None:
    assert _recipe("llava-hf/llava-1.5-7b-hf", None) == _recipe("llava-1.5", None)
    other = _recipe("instructblip-13b", None)
    assert other.model == "instructblip-13b"
    assert other.stage1 == _recipe("instructblip", None).stage1


@pytest.mark.parametrize(
    ("kind", "like"),
    [("llava", "llava-1.5"), ("qwen3_vl", "qwen3-vl"), ("gemma3", "qwen2.5-vl")],
)
def test_a_folder_takes_its_family_s_recipe(tmp_path: Path, kind: str, like: str) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": kind}))
    recipe = _recipe(str(tmp_path), None)
    assert recipe.model == str(tmp_path)
    assert recipe.stage1 == _recipe(like, None).stage1


def test_a_folder_of_no_model_is_refused_by_its_file(tmp_path: Path) -> None:
    with pytest.raises(VQGuardError, match=r"config\.json"):
        _recipe(str(tmp_path), None)


def test_an_id_that_is_not_listed_takes_the_general_recipe() -> None:
    recipe = _recipe("hub:somebody/some-model", None)
    assert recipe.model == "hub:somebody/some-model"
    assert recipe.stage2 == _recipe("qwen2.5-vl", None).stage2

"""Paths as people write them, in recipes, mixtures and settings."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from vqguard.recipes.data.mixture import MixtureFile
from vqguard.recipes.recipe import load_recipe

RECIPE = "model: llava-tiny\nstage1: {samples: 1}\nstage2: {samples: 1}\n"


def test_home_and_variables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("SETS", "/sets")
    recipe = load_recipe("llava-tiny").override(
        ["data=~/d.json", "images=$SETS/photos", "evaluation.held_out=${SETS}/tests"]
    )
    assert recipe.data == tmp_path / "d.json"
    assert recipe.images == Path("/sets/photos")
    assert recipe.evaluation.held_out == Path("/sets/tests")
    mixture = MixtureFile.from_dict({"parts": [{"data": "~/a.json", "weight": 1}]})
    assert mixture.parts[0].data == tmp_path / "a.json"


def test_a_recipe_s_paths_start_from_its_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "mine").mkdir()
    monkeypatch.chdir(tmp_path)
    file = Path("mine") / "recipe.yaml"
    file.write_text(
        f"{RECIPE}data: d.json\nimages: /photos\nfeatures: {{folder: kept}}\n"
        "evaluation: {held_out: tests}\ncalibration_images: old\n"
    )
    (tmp_path / "old").mkdir()
    recipe = load_recipe(file)
    assert recipe.data == Path("mine/d.json")
    assert recipe.images == Path("/photos")
    assert recipe.features.folder == Path("mine/kept")
    assert recipe.evaluation.held_out == Path("mine/tests")
    assert recipe.calibration_images == Path("old")  # where it was looked for before
    assert [r.levelno for r in caplog.records] == [logging.WARNING]
    assert "old is not beside this file" in caplog.text

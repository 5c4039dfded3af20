"""Calibration images beside a map: kept where asked for, shown beside a code, and forgotten."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from vqguard.adapters import build_guard, guard_model
from vqguard.cli.main import main
from vqguard.codebooks.guard_output import Judged
from vqguard.errors import ArtefactError
from vqguard.recipes.data.labelled_images import files_of_folders, open_files
from vqguard.recipes.judging.examples import (
    EACH,
    EXAMPLES,
    INDEX,
    ExampleKeeper,
    nearest_images,
    read_examples,
)
from vqguard.recipes.judging.map_changes import read_map
from vqguard.recipes.judging.regional import train_judge
from vqguard.recipes.recipe import RegionalRecipe
from vqguard.recipes.run import save_run_model
from vqguard.recipes.tiny.scenes import draw, neutral_scene, toxic_scene
from vqguard.recipes.tiny.weights import load_base
from vqguard.safety_map import SafetyMap

TRAINING = RegionalRecipe(steps=40, batch=24, fpr=0.2)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pictures")
    scenes = {
        "gun": [toxic_scene("calibration", 900, i, "gun") for i in range(12)],
        "neutral": [neutral_scene("calibration", 901, i, "single") for i in range(24)],
    }
    for category, some in scenes.items():
        (folder / category).mkdir()
        for number, scene in enumerate(some):
            Image.fromarray(draw(scene)).save(folder / category / f"{number:02d}.png")
    return folder


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, pictures: Path) -> Path:
    """A run whose regional judge has kept what it counted."""
    run = tmp_path_factory.mktemp("runs") / "run"
    model, processor = load_base()
    sizes: dict[str, Any] = {"codes": 16, "hidden": 32, "windows": [2]}
    guard = build_guard(model, patch_codes=8, semantic_codes=4, judge="regional", regional=sizes)
    guard_model(model, guard, processor)
    keeper = ExampleKeeper()
    images = open_files(files_of_folders(pictures, []), skip_bad=False, skipped=[])
    counted = train_judge(model, processor, images, TRAINING, keeper=keeper)
    save_run_model(run, model, processor)
    keeper.write(run, counted)
    return run


@pytest.fixture
def run(made: Path, tmp_path: Path) -> Path:
    return shutil.copytree(made, tmp_path / "run")


def calibrate(run: Path, pictures: Path, *options: str) -> int:
    return main(["calibrate", str(run), "--images", str(pictures), "--tau", "0.3", *options])


def test_the_nearest_images_of_a_code_come_first() -> None:
    codes = torch.tensor([[3, 3], [3, 5], [5, -1], [3, 7], [3, 3], [3, 3]])
    far = torch.tensor([[4.0, 0.5], [0.1, 1.0], [0.2, 0.0], [9.0, 0.0], [2.0, 3.0], [7.0, 7.0]])
    nearest = nearest_images(Judged(codes, codes >= 0, far))
    assert nearest == {3: [1, 0, 4, 5], 5: [2, 1], 7: [3]}
    assert nearest_images(Judged(codes[:2], None, None)) == {3: [0, 1], 5: [1]}


def test_a_trained_judge_keeps_what_was_counted(run: Path) -> None:
    counted = read_map(run)
    kept = read_examples(run, counted)
    assert kept is not None
    for code in range(counted.cells):
        examples = kept.of(code)
        images = int(counted.counts[code].sum())
        assert len(examples) == min(images, EACH), "one copy an image, and none of the others"
        for example in examples:
            column = [*counted.categories, "neutral"].index(example.labels[0])
            assert counted.counts[code, column] > 0
            with Image.open(example.path) as copy:
                assert max(copy.size) <= 128
                assert not copy.getexif()


def test_a_new_map_shows_its_images_beside_a_verdict(
    run: Path, pictures: Path, tmp_path: Path
) -> None:
    why, again = tmp_path / "why", tmp_path / "again"
    assert calibrate(run, pictures, "--keep-examples") == 0
    scan = ["scan", str(pictures), "--run", str(run), "--explain-all", "--explain"]
    assert main([*scan, str(why)]) in (0, 1)
    document = json.loads((why / "explain.json").read_text())
    assert document["calibration_images"] > 0
    kept = read_examples(run, read_map(run))
    assert kept is not None
    for row in document["pictures"]:
        wanted = [list(example.labels) for example in kept.of(row["semantic_code"])]
        assert [example["labels"] for example in row["examples"]] == wanted
        assert all((why / example["picture"]).is_file() for example in row["examples"])
    assert any(row["examples"] for row in document["pictures"])
    page = (why / "index.html").read_text()
    assert "Counted in it" in page
    assert "keeps no calibration images" not in page
    # a policy changes no count; another calibration does
    assert main(["map", "edit", str(run), "--policy", "gun=report"]) == 0
    assert read_examples(run, read_map(run)) is not None
    assert calibrate(run, pictures) == 0
    assert not (run / EXAMPLES).exists()
    assert main([*scan, str(again)]) in (0, 1)
    assert json.loads((again / "explain.json").read_text())["calibration_images"] is None
    assert "keeps no calibration images" in (again / "index.html").read_text()


def test_copies_of_another_map_are_not_shown(run: Path) -> None:
    counted = read_map(run)
    other = SafetyMap(counted.categories, counted.counts + 1)
    assert read_examples(run, other) is None
    assert read_examples(run / "none", counted) is None


@pytest.mark.parametrize("text", ["{", "[]", '{"schema": 2}', '{"codes": {"x": [["gun"]]}}'])
def test_a_damaged_list_of_copies_is_named(run: Path, text: str) -> None:
    path = run / EXAMPLES / INDEX
    path.write_text(text)
    with pytest.raises(ArtefactError, match=INDEX):
        read_examples(run, read_map(run))


def test_a_copy_that_is_gone_is_left_out(run: Path, pictures: Path, tmp_path: Path) -> None:
    for copy in (run / EXAMPLES).glob("*.jpg"):
        copy.write_bytes(b"no picture")
    arguments = ["scan", str(pictures), "--run", str(run), "--explain-all"]
    assert main([*arguments, "--explain", str(tmp_path / "why")]) in (0, 1)
    rows = json.loads((tmp_path / "why" / "explain.json").read_text())["pictures"]
    assert not any(row["examples"] for row in rows)


def test_a_folder_that_is_shared_keeps_none(
    run: Path, pictures: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert calibrate(run / "model", pictures, "--keep-examples") == 2
    assert "a run's directory only" in capsys.readouterr().err
    assert not (run / "model" / EXAMPLES).exists()

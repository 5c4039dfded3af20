"""Commands that write into a run: back to where they read, one at a time."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from vqguard.adapters import build_guard, guard_model, load_guarded
from vqguard.adapters.storage.folder_lock import only_writer
from vqguard.errors import ArtefactError, ConfigError
from vqguard.recipes.calibrate import calibrate_run
from vqguard.recipes.evaluate import evaluate_run
from vqguard.recipes.export import export_run
from vqguard.recipes.recipe import load_recipe
from vqguard.recipes.retrofit import retrofit
from vqguard.recipes.run import open_run, save_run_model
from vqguard.recipes.run_folder import RunFolder, stage_seconds
from vqguard.recipes.tiny.weights import load_base


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with its model, untrained, and what `export` makes of it; and labelled images."""
    folder = tmp_path_factory.mktemp("finished")
    model: Any
    model, processor = load_base()
    guard_model(model, build_guard(model, patch_codes=16, semantic_codes=4), processor)
    with torch.no_grad():
        model.model.multi_modal_projector.linear_1.bias += 1
    run = folder / "run"
    run.mkdir()
    load_recipe("llava-tiny").to_yaml(run / "recipe.yaml")
    save_run_model(run, model, processor)
    export_run(run, folder / "whole")
    export_run(run, folder / "alone", guard_only=True)
    for category, colour in (("neutral", (0, 90, 0)), ("gun", (200, 0, 0)), ("knife", (9, 9, 200))):
        (folder / "images" / category).mkdir(parents=True)
        for number in range(4):
            shade = tuple(min(255, part + number) for part in colour)
            Image.new("RGB", (64, 64), shade).save(folder / f"images/{category}/{number}.png")
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


@pytest.mark.parametrize(("form", "model"), [("run", "model/"), ("whole", ""), ("alone", "")])
def test_calibrate_writes_back_what_it_read(
    finished: Path, tmp_path: Path, form: str, model: str
) -> None:
    folder = shutil.copytree(finished / form, tmp_path / form)
    before = contents(folder)
    made = calibrate_run(folder, finished / "images", fpr=None, tau=0.7).map
    after = contents(folder)
    written = {name for name in before | after if before.get(name) != after.get(name)}
    assert written == {
        f"{model}{name}" for name in ("vqguard.json", "guard/guard.json", "guard/guard.safetensors")
    }
    for loaded in (load_guarded(folder / model), open_run(folder).model):
        assert loaded.vqguard.safety_map.to_dict() == made.to_dict()
    # and what it wrote can be exported and calibrated again
    if form != "run":
        again = export_run(folder, tmp_path / "again")
        assert load_guarded(again).vqguard.safety_map.tau == 0.7


def test_a_failed_calibration_changes_nothing(finished: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(finished / "whole", tmp_path / "whole")
    before = contents(folder)
    (tmp_path / "images" / "neutral").mkdir(parents=True)
    (tmp_path / "images" / "gun").mkdir()
    with pytest.raises(ValueError, match="no images"):
        calibrate_run(folder, tmp_path / "images", fpr=None, tau=0.7)
    assert contents(folder) == before


WRITERS: dict[str, Callable[[Path, Path], object]] = {
    "retrofit": lambda run, _: retrofit(load_recipe("llava-tiny"), run, command="pytest"),
    "retrofit --resume": lambda run, _: retrofit(
        load_recipe("llava-tiny"), run, resume=True, command="pytest"
    ),
    "calibrate": lambda run, images: calibrate_run(run, images, fpr=None, tau=0.5),
    "evaluate": lambda run, _: evaluate_run(run, command="pytest"),
}


@pytest.mark.parametrize("writer", WRITERS)
def test_a_second_writer_is_refused(finished: Path, tmp_path: Path, writer: str) -> None:
    run = shutil.copytree(finished / "run", tmp_path / "run")
    before = contents(run)
    with only_writer(run):
        with pytest.raises(ConfigError, match="is being written by process"):
            WRITERS[writer](run, finished / "images")
        open_run(run)  # readers go on
        export_run(run, tmp_path / "out", guard_only=True)
    assert contents(run) == before


@pytest.mark.parametrize("source", ["run", "whole", "alone"])
def test_an_export_into_a_folder_that_is_written_is_refused(
    finished: Path, tmp_path: Path, source: str
) -> None:
    output = tmp_path / "out"
    with only_writer(output), pytest.raises(ConfigError, match="is being written by process"):
        export_run(finished / source, output)
    assert not output.exists()


@pytest.mark.parametrize(
    "text",
    [
        *("", "{", "[1]", "3", '{"stage1": "1"}', '{"stage1": true}', '{"stage1": -1}'),
        *('{"stage1": NaN}', '{"stage1": 1, "stage1": 2}', '{"stage1": 1e300}', "[" * 100_000),
    ],
)
def test_damaged_stage_times_are_named(finished: Path, tmp_path: Path, text: str) -> None:
    run = shutil.copytree(finished / "run", tmp_path / "run")
    (run / "stage_seconds.json").write_text(text)
    for reader in (
        lambda: stage_seconds(run),
        lambda: RunFolder(run).open(load_recipe("llava-tiny")),
        lambda: evaluate_run(run, command="pytest"),
    ):
        with pytest.raises(ArtefactError, match=r"stage_seconds\.json is damaged .*delete it"):
            reader()


def test_stage_times_that_are_no_text_are_named(tmp_path: Path) -> None:
    (tmp_path / "stage_seconds.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ArtefactError, match="is damaged"):
        stage_seconds(tmp_path)
    assert stage_seconds(tmp_path / "none") == {}

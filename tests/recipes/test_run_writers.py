"""Commands that write into a run: back to where they read, one at a time."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from vqguard.adapters import build_guard, guard_model, load_guarded, save_guard_only
from vqguard.adapters.storage.base_model import find_base
from vqguard.adapters.storage.card import NO_FIGURES, OTHER_MAP
from vqguard.adapters.storage.folder_lock import only_writer
from vqguard.adapters.storage.manifest import read_manifest
from vqguard.cli.main import main
from vqguard.errors import ArtefactError, ConfigError
from vqguard.recipes.attacking.certify import certify_run
from vqguard.recipes.attacking.merge import merge_results
from vqguard.recipes.attacking.run_suite import run_suite
from vqguard.recipes.attacking.suite import load_suite
from vqguard.recipes.calibrate import calibrate_run
from vqguard.recipes.evaluate import evaluate_run
from vqguard.recipes.export import export_run
from vqguard.recipes.pretrain_tiny import PretrainRecipe, pretrain
from vqguard.recipes.recipe import load_recipe
from vqguard.recipes.retrofit import retrofit
from vqguard.recipes.run import open_run, save_run_model
from vqguard.recipes.run_folder import RunFolder, stage_seconds
from vqguard.recipes.tiny.weights import load_base
from vqguard.records import Record, write_records
from vqguard.redteam.smoothing import Smoothing


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
    names = ("vqguard.json", "guard/guard.json", "guard/guard.safetensors")
    card = set() if form == "run" else {"README.md"}
    assert written == {f"{model}{name}" for name in names} | card
    for loaded in (load_guarded(folder / model), open_run(folder).model):
        assert loaded.vqguard.safety_map.to_dict() == made.to_dict()
    # and what it wrote can be exported and calibrated again
    if form != "run":
        again = export_run(folder, tmp_path / "again")
        assert load_guarded(again).vqguard.safety_map.tau == 0.7


@pytest.mark.parametrize("form", ["whole", "alone"])
def test_a_card_says_what_was_calibrated(finished: Path, tmp_path: Path, form: str) -> None:
    folder = shutil.copytree(finished / form, tmp_path / form)
    card = folder / "README.md"
    before = card.read_text()
    card.write_text(before.replace(NO_FIGURES, "ASR 3.0 %") + "\nWords of my own.\n")
    calibrate_run(folder, finished / "images", fpr=None, tau=0.7)
    text = card.read_text()
    assert "| categories of the safety map | gun, knife |" in text
    assert "| verdict rule and threshold | category, above 0.7 |" in text
    assert "3.0 %" not in text
    assert OTHER_MAP in text
    assert text.endswith("\nWords of my own.\n")
    assert text.partition("## Guard")[0] == before.partition("## Guard")[0]
    calibrate_run(folder, finished / "images", fpr=None, tau=0.8)
    assert card.read_text() == text.replace("above 0.7", "above 0.8")
    # a card of somebody else's is left alone
    card.write_text("# Mine\n\n## Guard\n\nx\n\n## Measured\n\ny\n\n## Limits\n\nz\n")
    mine = card.read_text()
    calibrate_run(folder, finished / "images", fpr=None, tau=0.7)
    assert card.read_text() == mine


def test_words_in_a_card_end_no_cell(finished: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(finished / "whole", tmp_path / "whole")
    images = shutil.copytree(finished / "images", tmp_path / "images")
    (images / "gun").rename(images / "gun |\n## Measured\n\nASR 0 %")
    calibrate_run(folder, images, fpr=None, tau=0.7)
    text = (folder / "README.md").read_text()
    assert "\nASR" not in text
    assert text.count("\n## Measured") == 1
    assert r"gun \|\n## Measured\n\nASR 0 %, knife" in text


def test_figures_of_another_map_are_not_exported(finished: Path, tmp_path: Path) -> None:
    run = shutil.copytree(finished / "run", tmp_path / "run")
    condition: dict[str, str | int | float | bool] = {
        "attack": "per_request",
        "eps_255": 255,
        "gradient": "straight_through",
    }
    figure = Record(
        "asr", "guarded", condition, "adaptive", 0.03, 9, 0.0, 0.3, 0, "c", {"vqguard": "0"}
    )
    judged = {"guard_sha256": read_manifest(run / "model").guard_sha256}
    write_records(run / "report.json", [figure], judged)
    assert "3.0 %" in (export_run(run, tmp_path / "before") / "README.md").read_text()
    calibrate_run(run, finished / "images", fpr=None, tau=0.7)
    text = (export_run(run, tmp_path / "after") / "README.md").read_text()
    assert "3.0 %" not in text
    assert OTHER_MAP in text


def test_commands_are_told_where_a_local_base_is(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # A guard that was made for a local folder, which its manifest does not name.
    base = tmp_path / "base"
    shutil.copytree(find_base("llava-tiny").folder, base)
    loaded = open_run(finished / "run")
    guard = tmp_path / "guard"
    save_guard_only(loaded.model, guard, base, processor=loaded.processor)
    image = next((finished / "images" / "gun").iterdir())
    calibrate = ["calibrate", str(guard), "--images", str(finished / "images"), "--tau", "0.7"]
    assert main(calibrate) == 2
    assert "--base FOLDER" in capsys.readouterr().err
    assert main([*calibrate, "--base", str(base)]) == 0
    named = ["--base", str(base)]
    assert main(["scan", str(image), "--run", str(guard), *named]) in (0, 1)
    assert main(["ask", str(guard), str(image), "what ?", *named]) == 0
    assert main(["verify", str(guard), *named]) == 0
    # a whole model has no use for it, and the registered name is another way to say it
    assert main(["scan", str(image), "--run", str(finished / "whole"), *named]) == 2
    assert main(["ask", str(guard), str(image), "what ?", "--base", "llava-tiny"]) == 0


def test_a_failed_calibration_changes_nothing(finished: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(finished / "whole", tmp_path / "whole")
    before = contents(folder)
    (tmp_path / "images" / "neutral").mkdir(parents=True)
    (tmp_path / "images" / "gun").mkdir()
    with pytest.raises(ValueError, match="no image of this category"):
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


def test_a_resumed_run_does_not_begin_in_a_folder_of_somebody_else_s(tmp_path: Path) -> None:
    mine = tmp_path / "mine"
    (mine / "features").mkdir(parents=True)  # what a run deletes at its end is called so
    (mine / "features" / "photo.png").write_text("mine")
    before = contents(mine)
    with pytest.raises(ConfigError, match=r"holds no recipe\.yaml.*another --output"):
        retrofit(load_recipe("llava-tiny"), mine, resume=True, command="pytest")
    with pytest.raises(ConfigError, match="not an empty directory"):
        pretrain(PretrainRecipe(), mine, resume=True, command="pytest")
    assert contents(mine) == before


@pytest.mark.parametrize(
    "write",
    [
        lambda run, output: run_suite(run, load_suite("quick"), output, command="pytest"),
        lambda run, output: merge_results([run], output, command="pytest"),
        lambda _, output: pretrain(PretrainRecipe(), output, command="pytest"),
        lambda run, output: certify_run(run, output, Smoothing(), command="pytest"),
    ],
    ids=["attack", "report", "pretrain-tiny", "certify"],
)
def test_a_second_writer_of_results_is_refused(
    finished: Path, tmp_path: Path, write: Callable[[Path, Path], object]
) -> None:
    output = tmp_path / "out"
    with only_writer(output), pytest.raises(ConfigError, match="is being written by process"):
        write(finished / "run", output)
    assert not output.exists()


def test_certificates_replace_no_results_of_another_kind(finished: Path, tmp_path: Path) -> None:
    (tmp_path / "records.json").write_text("an attack's")
    with pytest.raises(ConfigError, match=r"holds no certificates\.jsonl; name another --output"):
        certify_run(finished / "run", tmp_path, Smoothing(), command="pytest")
    assert contents(tmp_path) == {"records.json": b"an attack's"}

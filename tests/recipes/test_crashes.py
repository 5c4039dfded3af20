"""A guarded model's folder loads whenever a process that writes it ends: old or new, never neither.

A process that dies before each single change of a file is played here (`dying.py`); one that is
killed at random moments is in `test_random_kills.py`.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from vqguard.adapters import load_guarded, save_guard_only
from vqguard.adapters.storage.manifest import holds_manifest
from vqguard.adapters.storage.new_map import replace_map
from vqguard.adapters.storage.reading import check_folder
from vqguard.errors import ArtefactError
from vqguard.guard import VQGuard
from vqguard.recipes.export import export_run
from vqguard.recipes.recipe import load_recipe
from vqguard.recipes.run import MODEL, model_folder, open_run, save_run_model
from vqguard.recipes.run_folder import is_guarded
from vqguard.safety_map import SafetyMap

from .dying import dies

OLD, NEW = 0.3, 0.9
Make = Callable[..., Any]


def safety_map(guard: VQGuard, tau: float) -> SafetyMap:
    codes = torch.arange(guard.config.semantic_codes).repeat(2)[:, None]
    half = len(codes) // 2
    return SafetyMap.calibrate(
        codes,
        ["neutral"] * half + ["gun"] * (len(codes) - half),
        semantic_codes=guard.config.semantic_codes,
        tau=tau,
        codebook_checksum=guard.checksum("semantic"),
    )


@pytest.fixture
def guarded(small_guarded: Make) -> tuple[Any, Any]:
    model, processor = small_guarded()
    model.vqguard.safety_map = safety_map(model.vqguard, OLD)
    return model, processor


@pytest.fixture
def run(guarded: tuple[Any, Any], tmp_path: Path) -> Path:
    folder = tmp_path / "old"
    folder.mkdir()
    load_recipe("llava-tiny").to_yaml(folder / "recipe.yaml")
    save_run_model(folder, *guarded)
    return folder


def tau_of(folder: Path) -> float | None:
    """The threshold of a guarded model that is whole; None where there is none."""
    if not holds_manifest(folder):
        return None
    check_folder(folder)
    made = VQGuard.from_pretrained(folder / "guard").safety_map
    assert made is not None
    return made.tau


def leftovers(folder: Path) -> list[str]:
    return [path.name for path in folder.rglob(".*")]


def killed_everywhere(
    old: Path | None, model: str, work: Callable[[Path], object], tmp_path: Path, every: int = 1
) -> None:
    """Let `work` die before each of its changes of a copy of `old`; the model is at `model`."""
    was = None if old is None else tau_of(old / model)
    seen = set()
    for after in range(0, 10_000, every):
        copy = tmp_path / f"{after}"
        if old is not None:
            shutil.copytree(old, copy)
        died = dies(copy, after, lambda copy=copy: work(copy))  # type: ignore[misc]
        tau = tau_of(copy / model)
        assert tau in (was, NEW)
        seen.add(tau)
        if died:
            work(copy)  # what was left is in nobody's way
        assert tau_of(copy / model) == NEW
        assert leftovers(copy) == []
        if not died:
            assert after > 5
            assert seen == {was, NEW}
            return
        shutil.rmtree(copy)
    raise AssertionError("it never ended")


def test_a_killed_save_over_a_model(guarded: tuple[Any, Any], run: Path, tmp_path: Path) -> None:
    model, processor = guarded
    model.vqguard.safety_map = safety_map(model.vqguard, NEW)
    killed_everywhere(run, MODEL, lambda copy: save_run_model(copy, model, processor), tmp_path)


def test_a_killed_first_save(guarded: tuple[Any, Any], tmp_path: Path) -> None:
    model, processor = guarded
    model.vqguard.safety_map = safety_map(model.vqguard, NEW)
    killed_everywhere(
        None, "", lambda copy: model.save_pretrained(copy, processor=processor), tmp_path, every=4
    )


def test_a_killed_calibration(guarded: tuple[Any, Any], run: Path, tmp_path: Path) -> None:
    made = safety_map(guarded[0].vqguard, NEW)
    killed_everywhere(run / MODEL, "", lambda copy: replace_map(copy, made), tmp_path)


@pytest.fixture
def guard_only(small_model: Make, small_guarded: Make, tmp_path: Path) -> tuple[Any, Path, Path]:
    """A guarded model, a folder of it without its base, and the base."""
    base = tmp_path / "base"
    small_model()[0].save_pretrained(base)
    model, processor = small_guarded()
    model.vqguard.safety_map = safety_map(model.vqguard, OLD)
    save_guard_only(model, tmp_path / "alone", base, processor=processor)
    return model, tmp_path / "alone", base


def test_a_killed_calibration_of_a_guard_alone(
    guard_only: tuple[Any, Path, Path], tmp_path: Path
) -> None:
    model, folder, base = guard_only
    made = safety_map(model.vqguard, NEW)
    killed_everywhere(folder, "", lambda copy: replace_map(copy, made), tmp_path)
    before = contents(folder)
    replace_map(folder, made)
    after = contents(folder)
    changed = {name for name in before | after if before.get(name) != after.get(name)}
    assert changed == {"vqguard.json", "guard/guard.json", "guard/guard.safetensors"}
    found: Any = load_guarded(folder, base=base).vqguard.safety_map
    assert found.tau == NEW


def test_a_killed_save_of_a_guard_alone(guard_only: tuple[Any, Path, Path], tmp_path: Path) -> None:
    model, folder, base = guard_only
    model.vqguard.safety_map = safety_map(model.vqguard, NEW)
    killed_everywhere(folder, "", lambda copy: save_guard_only(model, copy, base), tmp_path, 4)


def test_a_killed_export(guarded: tuple[Any, Any], run: Path, tmp_path: Path) -> None:
    replace_map(run / MODEL, safety_map(guarded[0].vqguard, NEW))
    seen = set()
    for after in range(0, 1000, 6):
        output = tmp_path / "out"
        died = dies(output, after, lambda output=output: export_run(run, output))  # type: ignore[misc]
        tau = tau_of(output)
        seen.add(tau)
        if died and tau is None:
            export_run(run, output)  # what was left is in nobody's way
        assert tau_of(output) == NEW
        assert died or leftovers(output) == []
        shutil.rmtree(output)
        if not died:
            assert seen == {None, NEW}
            return
    raise AssertionError("it never ended")


# -- what a version before 0.2 left between its two renames


@pytest.mark.parametrize("newer", ["whole", "half", "none"])
@pytest.mark.parametrize("opener", ["scan", "save"])
def test_what_an_earlier_version_left_is_put_back(
    guarded: tuple[Any, Any], run: Path, newer: str, opener: str
) -> None:
    model, processor = guarded
    new, old = run / "model.new", run / "model.old"
    (run / MODEL).rename(old)
    if newer != "none":
        shutil.copytree(old, new)
        replace_map(new, safety_map(model.vqguard, 0.5))
    if newer == "half":
        (new / "vqguard.json").unlink()
    if opener == "scan":
        made = open_run(run).model.vqguard.safety_map
        assert made is not None
        assert made.tau == (0.5 if newer == "whole" else OLD)
        return
    model.vqguard.safety_map = safety_map(model.vqguard, NEW)
    # what was left is put back before the first file is written, and deleted after the last
    dies(run, 8, lambda: save_run_model(run, model, processor))
    assert tau_of(run / MODEL) == (0.5 if newer == "whole" else OLD)
    save_run_model(run, model, processor)
    assert tau_of(run / MODEL) == NEW
    assert not new.exists()
    assert not old.exists()


def test_a_first_save_that_an_earlier_version_did_not_end_is_no_model(run: Path) -> None:
    (run / MODEL).rename(run / "model.new")
    with pytest.raises(ArtefactError, match="has not finished"):
        open_run(run)


def test_two_models_in_one_folder_are_refused(run: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(run / MODEL, tmp_path / "exported")
    assert model_folder(folder) == folder
    shutil.copytree(run / MODEL, folder / MODEL)
    with pytest.raises(ArtefactError, match="Move one of them"):
        open_run(folder)


def test_a_stage_whose_save_was_decided_is_done(run: Path) -> None:
    (run / MODEL / ".vqguard-ready").mkdir()
    (run / MODEL / "vqguard.json").rename(run / MODEL / ".vqguard-ready" / "vqguard.json")
    assert is_guarded(run / MODEL)


def contents(folder: Path) -> dict[str, bytes]:
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}

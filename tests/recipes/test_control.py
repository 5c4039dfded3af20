"""The control beside the guarded model's stages, in a process of its own."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from vqguard.errors import TrainingError
from vqguard.recipes.beside import threads_beside
from vqguard.recipes.control import Control
from vqguard.recipes.models import CONTROL, has_control
from vqguard.recipes.recipe import load_recipe
from vqguard.recipes.run_folder import RunFolder, stage_seconds
from vqguard.recipes.run_samples import RunSamples

pytestmark = pytest.mark.alone
SHORT = [
    *("guard.start_samples=8", "guard.patch_codes=8", "guard.semantic_codes=4"),
    *("stage1.samples=8", "stage1.batch=4", "stage2.samples=8", "stage2.batch=4"),
]


def control_in(run: Path, *changes: str) -> Control:
    recipe = load_recipe("llava-tiny").override([*SHORT, *changes])
    run.mkdir()
    folder = RunFolder(run)
    folder.open(recipe)
    return Control(recipe, folder, RunSamples(recipe, skip_bad=False), resume=False)


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / CONTROL / "model" / "model.safetensors")


@pytest.mark.usefixtures("two_threads")
def test_it_is_the_one_that_this_process_would_have_trained(tmp_path: Path) -> None:
    beside, alone = control_in(tmp_path / "beside"), control_in(tmp_path / "alone")
    with beside.beside(None):
        assert torch.get_num_threads() == 1
        torch.set_num_threads(1)
        alone.train(None)
    assert torch.get_num_threads() == 2
    theirs, ours = weights(tmp_path / "beside"), weights(tmp_path / "alone")
    assert theirs.keys() == ours.keys()
    assert all(torch.equal(theirs[name], ours[name]) for name in ours)
    for run in ("beside", "alone"):
        assert list(stage_seconds(tmp_path / run)) == ["control_projector", "control_stage2"]


@pytest.mark.usefixtures("two_threads")
def test_a_resumed_run_has_as_many_threads_and_starts_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    control = control_in(tmp_path / "run")
    (tmp_path / "run" / CONTROL / "model").mkdir(parents=True)
    (tmp_path / "run" / CONTROL / "model" / "config.json").write_text("{}")
    # of a run that was killed between the control's end and its own
    (tmp_path / "run" / CONTROL / "stage_seconds.json").write_text('{"control_stage2": 3.5}')
    monkeypatch.setattr(subprocess, "Popen", _refused)
    with control.beside(None):
        assert torch.get_num_threads() == 1
    assert stage_seconds(tmp_path / "run") == {"control_stage2": 3.5}


@pytest.mark.usefixtures("two_threads")
def test_a_failure_of_its_process_ends_the_run(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    control = control_in(tmp_path / "run")
    with (
        pytest.raises(TrainingError, match="the control ended with code 1"),
        control.beside(tmp_path / "no features"),
    ):
        pass
    assert "no features of sample" in capfd.readouterr().err
    assert torch.get_num_threads() == 2
    assert not has_control(tmp_path / "run")


@pytest.mark.usefixtures("two_threads")
def test_an_error_here_ends_its_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[Any] = []
    start = subprocess.Popen

    def recorded(*arguments: Any, **options: Any) -> Any:
        started.append(start(*arguments, **options))
        return started[-1]

    monkeypatch.setattr(subprocess, "Popen", recorded)
    with pytest.raises(KeyError), control_in(tmp_path / "run").beside(None):
        raise KeyError
    assert [process.returncode for process in started] == [-signal.SIGKILL]


def test_its_process_ends_with_the_one_that_started_it() -> None:
    script = (
        "import time; from vqguard.recipes.beside import _end_with_parent as end\n"
        "end(); print('ready', flush=True); time.sleep(60)"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", script],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert process.stdout is not None
    assert process.stdin is not None
    assert process.stdout.readline() == b"ready\n"
    assert process.poll() is None
    before = time.monotonic()
    process.stdin.close()
    assert process.wait() == 1
    assert time.monotonic() - before < 30


def test_one_thread_is_not_shared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subprocess, "Popen", _refused)
    for threads, shared in ((1, None), (2, 1), (3, 1), (8, 4)):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        assert threads_beside() == shared
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert threads_beside() is None
    monkeypatch.delenv("WORLD_SIZE")
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    with control_in(tmp_path / "run").beside(None):
        pass


@pytest.mark.usefixtures("two_threads")
def test_without_a_control_the_stages_have_all_threads(tmp_path: Path) -> None:
    control = control_in(tmp_path / "run", "evaluation.finetuned_control=false")
    with control.beside(None):
        assert torch.get_num_threads() == 2


def _refused(*arguments: Any, **options: Any) -> None:
    raise AssertionError("no process is started here")

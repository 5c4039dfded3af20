"""Files that change together: the folder is the old one or the new one at every moment."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from vqguard.adapters.storage.folder_update import READY, finish_update, folder_update
from vqguard.errors import ArtefactError
from vqguard.files import DRAFT, LOCK

OLD = {"a": "old a", "gone": "old", "sub/b": "old b", "only/x": "old"}
NEW = {"a": "new a", "sub/b": "new b", "sub/c": "new c"}
OTHERS = {"notes": "mine", "sub/mine": "mine"}


def contents(folder: Path) -> dict[str, str]:
    files = [
        p for p in folder.rglob("*") if p.is_file() and DRAFT not in str(p) and LOCK not in str(p)
    ]
    return {p.relative_to(folder).as_posix(): p.read_text() for p in files}


def write(folder: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)


def update(folder: Path) -> None:
    with folder_update(folder) as draft:
        write(draft.path, NEW)
        draft.removed = set(OLD)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write(tmp_path / "f", {**OLD, **OTHERS})
    return tmp_path / "f"


def test_new_files_take_the_place_of_the_old(folder: Path) -> None:
    update(folder)
    assert contents(folder) == {**NEW, **OTHERS}
    assert not (folder / "only").exists()
    assert not list(folder.glob(".*"))
    update(folder.parent / "new")
    assert contents(folder.parent / "new") == NEW


class KilledError(BaseException):
    """What stops a process; no `except Exception` sees it."""


def dying(function: Callable[..., Any], calls: list[int]) -> Callable[..., Any]:
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        calls[0] -= 1
        if calls[0] < 0:
            raise KilledError
        return function(*args, **kwargs)

    return wrapped


def test_it_is_old_or_new_wherever_it_stops(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    for step in range(60):
        folder = tmp_path / str(step)
        write(folder, {**OLD, **OTHERS})
        left = [step]
        with monkeypatch.context() as patched:
            # What is killed cleans up nothing either.
            patched.setattr(shutil, "rmtree", dying(lambda *_, **__: None, left))
            for name in ("replace", "rename", "unlink", "rmdir", "write_text", "mkdir"):
                patched.setattr(Path, name, dying(getattr(Path, name), left))
            patched.setattr(os, "fsync", dying(os.fsync, left))
            try:
                update(folder)
            except KilledError:
                pass
            else:
                break
        finish_update(folder)  # as every reader begins
        found = contents(folder)
        assert found in ({**OLD, **OTHERS}, {**NEW, **OTHERS}), step
        seen.append(found == {**NEW, **OTHERS})
        update(folder)  # as every writer does
        assert contents(folder) == {**NEW, **OTHERS}
    assert seen == sorted(seen)
    assert len(set(seen)) == 2
    assert step < 59


def test_a_failure_leaves_the_folder_as_it_was(folder: Path) -> None:
    def fail() -> None:
        with folder_update(folder) as draft:
            write(draft.path, NEW)
            raise OSError("disk full")

    with pytest.raises(OSError, match="full"):
        fail()
    assert contents(folder) == {**OLD, **OTHERS}
    assert not list(folder.glob(".*"))


@pytest.mark.parametrize("name", ["../kept", "{outside}/kept", "linked/kept"])
@pytest.mark.parametrize("how", ["removed", "placed"])
def test_an_update_reaches_nothing_outside_of_its_folder(
    tmp_path: Path, folder: Path, name: str, how: str
) -> None:
    """An attacker's folder may hold an update that was never ours."""
    outside = tmp_path / "outside"
    outside.mkdir()
    for kept in (outside / "kept", folder.parent / "kept"):
        kept.write_text("kept")
    (folder / "linked").symlink_to(outside)
    ready = folder / READY
    ready.mkdir()
    if how == "removed":
        (ready / ".removed").write_text(json.dumps([name.format(outside=outside)]))
    else:
        (ready / "linked").mkdir()
        (ready / "linked" / "kept").write_text("an attacker's")
    with pytest.raises(ArtefactError, match="no file of this folder"):
        finish_update(folder)
    assert [p.read_text() for p in (outside / "kept", folder.parent / "kept")] == ["kept"] * 2


def test_what_cannot_be_finished_is_an_error(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / READY).mkdir()
    (folder / READY / "a").write_text("new a")

    def refuse(*_: Any) -> None:
        raise PermissionError("read-only")

    with monkeypatch.context() as patched:
        patched.setattr(Path, "replace", refuse)
        with pytest.raises(ArtefactError, match="interrupted"):
            finish_update(folder)
    finish_update(folder)
    assert (folder / "a").read_text() == "new a"


SAVING = """
import sys
from pathlib import Path
sys.path.insert(0, {here!r})
from test_bound import guarded_tiny
model, processor = guarded_tiny()
print("ready", flush=True)
while True:
    model.save_pretrained(Path({folder!r}), processor=processor)
"""


@pytest.mark.alone
@pytest.mark.slow
def test_a_killed_save_leaves_a_model_that_loads(tmp_path: Path) -> None:
    from vqguard.adapters import load_guarded

    folder = tmp_path / "model"
    code = SAVING.format(here=str(Path(__file__).parent), folder=str(folder))
    for attempt in range(10):
        process = subprocess.Popen(
            [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
        )
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        while attempt == 0 and not (folder / "vqguard.json").exists():
            time.sleep(0.01)
        time.sleep(0.037 * attempt)
        process.kill()
        process.wait()
        load_guarded(folder)


def _link_out(folder: Path) -> None:
    (folder / "sub").rename(folder.parent / "elsewhere")
    (folder / "sub").symlink_to(folder.parent / "elsewhere")


def _folder_in_place(folder: Path) -> None:
    (folder / "a").rename(folder / "kept")
    (folder / "a" / "inside").mkdir(parents=True)


def _file_in_place(folder: Path) -> None:
    shutil.rmtree(folder / "sub")
    (folder / "sub").write_text("a file")


@pytest.mark.parametrize("spoil", [_link_out, _folder_in_place, _file_in_place])
def test_what_could_not_be_finished_is_not_decided(
    folder: Path, spoil: Callable[[Path], None]
) -> None:
    """A decided update that nobody can finish would leave a folder that nobody can read."""
    spoil(folder)
    before = contents(folder.parent)
    with pytest.raises(ArtefactError, match="nothing was changed"):
        update(folder)
    finish_update(folder)
    assert contents(folder.parent) == before
    assert not list(folder.glob(".*"))


def test_a_folder_that_is_not_writable_is_refused_before_it_is_decided(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    access = os.access
    monkeypatch.setattr(  # root may write everywhere
        os, "access", lambda path, mode: Path(path).name != "sub" and access(path, mode)
    )
    with pytest.raises(ArtefactError, match=r"cannot write into .*sub; nothing was changed"):
        update(folder)
    finish_update(folder)
    assert contents(folder) == {**OLD, **OTHERS}

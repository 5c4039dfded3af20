"""Several files of one folder that change together: all of them or none, whenever a process ends.

New files are written into a draft inside the folder and flushed. Renaming the draft to
`.vqguard-ready` decides: until then the folder is what it was; from then on it is the new one,
because whoever comes next, reader or writer, first moves what is left there into place
(`finish_update`). A draft whose process ended may be deleted.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from vqguard.errors import ArtefactError
from vqguard.text_files import read_json

READY = ".vqguard-ready"
DRAFT = ".vqguard-draft-"
_REMOVED = ".removed"


class Draft:
    """The new files of a folder, before they take their places.

    Attributes:
        path: where to write them, under the names that they will have.
        removed: names in the folder that go at the same time, relative to it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.removed: set[str] = set()

    def names(self) -> set[str]:
        """The files written so far, relative to the folder, with `/` between their parts."""
        return {p.relative_to(self.path).as_posix() for p in self.path.rglob("*") if p.is_file()}


@contextmanager
def folder_update(folder: Path) -> Iterator[Draft]:
    """A draft of new files for `folder`, which is made if missing.

    When the block ends they take their places, over files of the same names. When it raises, or the
    disk is full (OSError), the folder stays as it was.
    """
    folder.mkdir(parents=True, exist_ok=True)
    finish_update(folder)
    draft = Draft(Path(tempfile.mkdtemp(prefix=DRAFT, dir=folder)))
    try:
        yield draft
        names = draft.names()
        removed = sorted(draft.removed - names)
        (draft.path / _REMOVED).write_text(json.dumps(removed), encoding="utf-8")
        for name in (*names, _REMOVED):
            _flush(draft.path / name)
        draft.path.rename(folder / READY)
        _flush(folder)
    finally:
        shutil.rmtree(draft.path, ignore_errors=True)
    finish_update(folder)


def finish_update(folder: Path) -> None:
    """Move into place what an update that was decided has left; nothing without one.

    Raises:
        ArtefactError: when the folder cannot be written, or the update names a place outside of it.
    """
    ready = folder / READY
    if not ready.is_dir():
        return
    try:
        removed = ready / _REMOVED
        if removed.is_file():
            for name in read_json(removed, ArtefactError):
                _remove(folder, _inside(folder, name))
        for path in sorted(ready.rglob("*")):
            if path.is_file() and path != removed:
                _place(path, _inside(folder, path.relative_to(ready).as_posix()))
        shutil.rmtree(ready, ignore_errors=True)
    except OSError as error:
        raise ArtefactError(
            f"saving {folder} was interrupted and cannot be finished ({error}): make the folder "
            "writable and load it once, or copy it whole to where it is"
        ) from error


def _inside(folder: Path, name: object) -> Path:
    """The place of a file in the folder; what the folder says of it may be an attacker's."""
    path = folder / str(name)
    if ".." in path.parts or not path.parent.resolve().is_relative_to(folder.resolve()):
        raise ArtefactError(
            f"{folder / READY} names {str(name)!r}, which is not in the folder: it was not written "
            "by vqguard; do not use this folder"
        )
    return path


def _remove(folder: Path, path: Path) -> None:
    path.unlink(missing_ok=True)
    for parent in path.parents:
        if parent == folder or not parent.is_dir() or any(parent.iterdir()):
            break
        parent.rmdir()


def _place(path: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        path.replace(target)
    except FileNotFoundError:
        if path.exists():  # another process is finishing the same update
            raise


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)

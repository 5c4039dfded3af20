"""Several files of one folder that change together: all of them or none, whenever a process ends.

New files are written into a draft inside the folder and flushed. Renaming the draft to
`.vqguard-ready` decides: until then the folder is what it was; from then on it is the new one,
because whoever comes next, reader or writer, first moves what is left there into place
(`finish_update`). Saves into one folder wait for each other (`folder_lock.py`), so a draft that a
save finds there is that of a process that ended, and is deleted.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from vqguard.adapters.storage.folder_lock import saving
from vqguard.errors import ArtefactError
from vqguard.files import DRAFT
from vqguard.text_files import read_json

READY = ".vqguard-ready"
_REMOVED = ".removed"


class Draft:
    """The new files of a folder, before they take their places."""

    def __init__(self, path: Path) -> None:
        self.path = path
        """Where to write them, under the names that they will have."""
        self.removed: set[str] = set()
        """Names in the folder that go at the same time, relative to it."""

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
    with saving(folder):
        _finish(folder)
        for left in folder.glob(f"{DRAFT}*"):
            shutil.rmtree(left, ignore_errors=True)
        draft = Draft(Path(tempfile.mkdtemp(prefix=DRAFT, dir=folder)))
        try:
            yield draft
            names = draft.names()
            removed = sorted(draft.removed - names)
            (draft.path / _REMOVED).write_text(json.dumps(removed), encoding="utf-8")
            for name in (*names, _REMOVED):
                _flush(draft.path / name)
            for name in (*names, *removed):
                _require_place(folder, name)
            draft.path.rename(folder / READY)
            _flush(folder)
        finally:
            shutil.rmtree(draft.path, ignore_errors=True)
        _finish(folder)


def finish_update(folder: Path) -> None:
    """Move into place what an update that was decided has left; nothing without one.

    Raises:
        ArtefactError: when the folder cannot be written.
    """
    if (folder / READY).is_dir():
        with saving(folder):
            _finish(folder)


def _require_place(folder: Path, name: str) -> None:
    """Refuse, before it is decided, what could not be finished: nobody could read the folder then.

    Raises `ArtefactError`.
    """
    path = folder / name
    if not _leads_inside(path, folder):
        raise ArtefactError(
            f"{path.parent} leads out of {folder}, and what is saved must lie in it; nothing was "
            "changed. Put a folder in the link's place, or save into another one"
        )
    if path.is_dir() and not path.is_symlink():
        raise ArtefactError(
            f"{path} is a folder, expected a file or nothing; nothing was changed. Rename it, or "
            "save into another folder"
        )
    # nothing is made yet: a folder that a kill leaves here would look like somebody's own
    parent = next(place for place in path.parents if os.path.lexists(place))
    writable = parent.is_dir() and os.access(parent, os.W_OK | os.X_OK)
    if not writable:
        raise ArtefactError(
            f"cannot write into {parent}; nothing was changed. Make it a writable folder, or save "
            "into another one"
        )


def _leads_inside(path: Path, folder: Path) -> bool:
    return path.name not in ("", "..") and path.parent.resolve().is_relative_to(folder.resolve())


def _finish(folder: Path) -> None:
    ready = folder / READY
    if not ready.is_dir():
        return
    if ready.is_symlink():
        raise ArtefactError(
            f"{ready} is a link: no save of vqguard left that. Remove it, or get the folder from "
            "elsewhere"
        )
    try:
        removed = ready / _REMOVED
        if removed.is_file():
            for name in read_json(removed, ArtefactError):
                _remove(_inside(folder, name), folder)
        for path in sorted(ready.rglob("*")):
            if path.is_file() and path != removed:
                _place(path, _inside(folder, path.relative_to(ready).as_posix()))
        shutil.rmtree(ready, ignore_errors=True)
    except (OSError, ValueError, TypeError) as error:
        raise ArtefactError(
            f"saving {folder} was interrupted and cannot be finished ({error}): make the folder "
            "writable and load it once, or copy it whole to where it is"
        ) from error


def _remove(path: Path, folder: Path) -> None:
    path.unlink(missing_ok=True)
    for parent in path.parents:
        if parent == folder or not parent.is_dir() or any(parent.iterdir()):
            break
        parent.rmdir()


def _inside(folder: Path, name: str) -> Path:
    """A name in a folder that may come from anybody, so that it leads nowhere else."""
    path = folder / name
    if not _leads_inside(path, folder):
        raise ArtefactError(
            f"{folder / READY} would change {name!r}, which is no file of this folder: no save of "
            f"vqguard left that. Remove {READY}, or get the folder from elsewhere"
        )
    return path


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

"""A process that dies before a chosen change of its files, played inside the test's own process."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

_CHANGES = {"os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.link", "os.symlink", "os.chmod"}
_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT


class KilledError(BaseException):
    """No `except Exception` sees it; whatever a `finally` would still change raises it again."""


class _Death:
    """Python's audit hook, which cannot be taken out again, sees every change of a file."""

    def __init__(self) -> None:
        self.left: int | None = None
        self.root = ""

    def __call__(self, event: str, args: tuple[Any, ...]) -> None:
        if self.left is None or not self._changes(event, args):
            return
        self.left -= 1
        if self.left < 0:
            raise KilledError

    def _changes(self, event: str, args: tuple[Any, ...]) -> bool:
        if event == "open":
            path, mode, flags = args
            writes = any(letter in mode for letter in "wax+") if mode else bool(flags & _WRITES)
            return writes and self._inside(path)
        if event not in _CHANGES:
            return False
        # rmtree names what it removes relative to an open folder
        return self._inside(args[0]) or (event in ("os.remove", "os.rmdir") and args[1] != -1)

    def _inside(self, path: Any) -> bool:
        return isinstance(path, (str, os.PathLike)) and str(path).startswith(self.root)


_death = _Death()
sys.addaudithook(_death)


@contextmanager
def _dying(root: Path, after: int) -> Iterator[None]:
    _death.root, _death.left = str(root), after
    try:
        yield
    finally:
        _death.left = None


def dies(root: Path, after: int, work: Callable[[], object]) -> bool:
    """Do `work` until it has made so many changes below `root`; whether it died of the next one."""
    try:
        with _dying(root, after):
            work()
    except KilledError:
        return True
    return False

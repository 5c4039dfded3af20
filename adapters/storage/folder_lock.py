"""Locks of a folder: one writer at a time, and a lock that dies with its process.

A lock is a file in the folder that the operating system locks for an open file (`flock`, on Windows
`msvcrt.locking`). It holds the writer's number for the error of a second one; what counts is the
system's lock, which is gone when the process is, however it ended. Readers take none, so a folder
may be read-only for them.

Two locks, because a command that holds a folder for hours saves into it on the way: `only_writer`
refuses a second writer, `saving` waits for the first, which is done in the time that files take.
"""

from __future__ import annotations

import contextlib
import os
import platform
import re
import stat
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from vqguard.bounded import open_regular
from vqguard.errors import ArtefactError, ConfigError
from vqguard.files import LOCK

WRITER, SAVING = f"{LOCK}-writer", f"{LOCK}-saving"
_POLL_SECONDS = 0.05  # a save takes longer than this
_HOLDER = re.compile(rb"(\d{1,10}) ([\w.-]{1,64})\n?")
_FAR = 2**20  # Windows locks bytes, and a locked one cannot be read: this is behind the number
_held: set[int] = set()


@contextmanager
def only_writer(folder: Path) -> Iterator[None]:
    """Be the only command that writes into `folder`, which is made if missing.

    Raises:
        ConfigError: another process, or another thread of this one, writes into it.
        ArtefactError: it cannot be written.
    """
    with _made(folder):
        handle = _try(folder, WRITER)
        if handle is None:
            raise ConfigError(
                f"{folder} is being written by {_holder(folder / WRITER)}: wait until that is "
                "done, stop it, or name another folder"
            )
        try:
            yield
        finally:
            _release(folder / WRITER, handle)


@contextmanager
def saving(folder: Path) -> Iterator[None]:
    """Be the only one that moves files of a saved model into `folder`, which exists.

    Others are waited for: what one of them has begun is whole then. Raises `ArtefactError`.
    """
    while (handle := _try(folder, SAVING)) is None:
        time.sleep(_POLL_SECONDS)
    try:
        yield
    finally:
        _release(folder / SAVING, handle)


@contextmanager
def _made(folder: Path) -> Iterator[None]:
    """The folder; one made here is taken away again when nothing was written into it."""
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"{folder} is a file; expected a directory. Name another one.")
    new = not folder.exists()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _unwritable(folder, error) from error
    try:
        yield
    finally:
        if new:
            with contextlib.suppress(OSError):
                folder.rmdir()


def _try(folder: Path, name: str) -> int | None:
    """The open file of a lock that was free; None for one that another holds."""
    path = folder / name
    # A link in a folder from elsewhere must not lead the writer's number into another file.
    flags = os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)
    while True:
        try:
            handle = os.open(path, flags, 0o666)
        except OSError as error:
            raise _unwritable(folder, error) from error
        try:
            known = os.fstat(handle)
            # Nor must a file's second name: what it holds is emptied below.
            if not stat.S_ISREG(known.st_mode) or known.st_nlink > 1:
                raise _unwritable(folder, OSError(f"{path} is no lock's file; remove it"))
            if not _locked(handle):
                os.close(handle)
                return None
            if _is_at(path, handle):
                os.ftruncate(handle, 0)
                os.write(handle, f"{os.getpid()} {platform.node()}\n".encode())
                _held.add(handle)
                return handle
        except OSError as error:
            os.close(handle)
            raise ArtefactError(
                f"cannot lock {path} ({error}), so two processes could write at once: use a "
                "folder on a file system that has locks"
            ) from error
        except BaseException:
            os.close(handle)
            raise
        os.close(handle)  # its holder took the file away when it was done: there is a new one


def _release(path: Path, handle: int) -> None:
    if handle not in _held:  # a forked child unwinds what its parent holds
        return
    _held.discard(handle)
    try:
        # While it is locked, so that nobody takes a name away that another one has locked since.
        if os.name != "nt" and _is_at(path, handle):
            path.unlink()
    except OSError:  # the folder is gone, or read-only by now: a free lock's file is no obstacle
        pass
    finally:
        os.close(handle)


def _is_at(path: Path, handle: int) -> bool:
    try:
        return os.path.samestat(path.lstat(), os.fstat(handle))
    except FileNotFoundError:
        return False


def _holder(path: Path) -> str:
    try:
        with open_regular(path) as stream:
            known = _HOLDER.fullmatch(stream.read(100))
    except OSError:
        known = None
    if known is None:
        return "another process"
    number, host = known[1].decode(), known[2].decode(errors="replace")
    return f"process {number}" + ("" if host == platform.node() else f" on {host}")


def _unwritable(folder: Path, error: OSError) -> ArtefactError:
    return ArtefactError(
        f"cannot write into {folder} ({error}): make it writable, or name another folder"
    )


if sys.platform == "win32":
    import msvcrt

    def _locked(handle: int) -> bool:
        os.lseek(handle, _FAR, os.SEEK_SET)
        try:
            msvcrt.locking(handle, msvcrt.LK_NBLCK, 1)
        except PermissionError:
            return False
        os.lseek(handle, 0, os.SEEK_SET)
        return True

else:
    import fcntl

    def _locked(handle: int) -> bool:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True

    def _leave_to_parent() -> None:
        """A child that outlives its parent must not keep the parent's locks."""
        for handle in _held:
            os.close(handle)
        _held.clear()

    os.register_at_fork(after_in_child=_leave_to_parent)

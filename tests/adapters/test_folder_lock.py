"""One writer a folder: a lock that dies with its process, names it, and leaves nothing behind."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import pytest

from vqguard.adapters.storage import folder_lock
from vqguard.adapters.storage.folder_lock import SAVING, WRITER, only_writer, saving
from vqguard.adapters.storage.folder_update import READY, finish_update, folder_update
from vqguard.errors import ArtefactError, ConfigError
from vqguard.files import DRAFT, require_empty

HOLDER = """
import sys, time, pathlib
from vqguard.adapters.storage.folder_lock import only_writer
with only_writer(pathlib.Path(sys.argv[1])):
    print("held\\n", end="", flush=True)
    time.sleep(600)
"""

OPEN_FILES = Path("/proc/self/fd")
FORKING_HOLDER = HOLDER.replace("    print", "    import os; os.fork()\n    print")


def hold(folder: Path, program: str = HOLDER) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", program, str(folder)]
    holder = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True)
    assert holder.stdout is not None
    assert holder.stdout.readline() == "held\n"
    return holder


def test_a_second_process_is_refused_until_the_first_is_gone(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    with hold(folder) as holder:
        try:
            with pytest.raises(ConfigError, match=f"written by process {holder.pid}: wait"):
                only_writer(folder).__enter__()
        finally:
            os.kill(holder.pid, signal.SIGKILL)
            holder.wait()
    require_empty(folder, "")  # what a kill leaves is nothing
    with only_writer(folder):
        assert [path.name for path in folder.iterdir()] == [WRITER]
    assert not list(folder.iterdir())


def test_a_second_thread_is_refused_too(tmp_path: Path) -> None:
    with (
        only_writer(tmp_path),
        pytest.raises(ConfigError, match=f"process {os.getpid()}"),
        only_writer(tmp_path),
    ):
        pass
    with only_writer(tmp_path):
        pass


def test_a_fork_that_outlives_its_parent_holds_nothing(tmp_path: Path) -> None:
    lock = only_writer(tmp_path)
    lock.__enter__()
    read, write = os.pipe()
    child = os.fork()
    if not child:
        os.read(read, 1)
        lock.__exit__(None, None, None)  # unwinding in the child takes nothing from the parent
        os._exit(0)
    try:
        with pytest.raises(ConfigError):
            only_writer(tmp_path).__enter__()
        lock.__exit__(None, None, None)
        with only_writer(tmp_path):  # though the child lives
            os.write(write, b".")
            os.waitpid(child, 0)
            assert (tmp_path / WRITER).exists()
            with pytest.raises(ConfigError):
                only_writer(tmp_path).__enter__()
    finally:
        os.close(read)
        os.close(write)


def test_a_fork_of_a_killed_process_holds_nothing(tmp_path: Path) -> None:
    with hold(tmp_path, FORKING_HOLDER) as holder:
        try:
            assert holder.stdout is not None
            assert holder.stdout.readline() == "held\n"  # the other of the two has begun as well
            os.kill(holder.pid, signal.SIGKILL)
            holder.wait()
            os.killpg(holder.pid, 0)  # its fork lives
            with only_writer(tmp_path):
                pass
        finally:
            os.killpg(holder.pid, signal.SIGKILL)


def test_a_writer_saves_into_its_folder(tmp_path: Path) -> None:
    def save() -> None:
        with saving(tmp_path):
            pass

    with only_writer(tmp_path):
        saver = threading.Thread(target=save, daemon=True)
        saver.start()
        saver.join(timeout=60)
        assert not saver.is_alive()


@pytest.mark.skipif(not OPEN_FILES.exists(), reason="open files are not listed here")
@pytest.mark.parametrize("lock", [only_writer, saving])
def test_a_lock_given_back_is_closed(
    tmp_path: Path, lock: Callable[[Path], AbstractContextManager[None]]
) -> None:
    before = len(list(OPEN_FILES.iterdir()))
    with lock(tmp_path):
        pass
    assert len(list(OPEN_FILES.iterdir())) == before


def test_a_refusal_before_anything_is_written_leaves_no_folder(tmp_path: Path) -> None:
    with pytest.raises(KeyError), only_writer(tmp_path / "new"):
        raise KeyError
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("lock", [only_writer, saving])
def test_a_block_that_fails_leaves_no_lock(
    tmp_path: Path, lock: Callable[[Path], AbstractContextManager[None]]
) -> None:
    with pytest.raises(KeyError), lock(tmp_path):
        raise KeyError
    assert not list(tmp_path.iterdir())
    with lock(tmp_path):
        pass


def test_a_lock_whose_holder_takes_its_file_away_meanwhile_is_made_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    locked = folder_lock._locked
    opened: list[int] = []

    def late(handle: int) -> bool:
        if not opened:
            (tmp_path / WRITER).unlink()  # its holder is done between opening and locking
        opened.append(handle)
        return locked(handle)

    monkeypatch.setattr(folder_lock, "_locked", late)
    with only_writer(tmp_path):
        assert len(opened) == 2
        with pytest.raises(ConfigError, match=f"process {os.getpid()}"):
            only_writer(tmp_path).__enter__()


def test_a_lock_of_another_s_is_not_taken_away(tmp_path: Path) -> None:
    with only_writer(tmp_path):
        (tmp_path / WRITER).unlink()
        (tmp_path / WRITER).write_text("another's")
    assert (tmp_path / WRITER).read_text() == "another's"


@pytest.mark.parametrize("lock", [only_writer, saving])
@pytest.mark.parametrize("kind", ["link", "second name", "pipe", "folder"])
def test_what_stands_in_the_lock_s_place_is_refused(
    tmp_path: Path, lock: Callable[[Path], AbstractContextManager[None]], kind: str
) -> None:
    victim, folder = tmp_path / "victim", tmp_path / "run"
    victim.write_text("mine")
    folder.mkdir()
    place = folder / (WRITER if lock is only_writer else SAVING)
    {
        "link": lambda: place.symlink_to(victim),
        "second name": lambda: place.hardlink_to(victim),
        "pipe": lambda: os.mkfifo(place),
        "folder": lambda: place.mkdir(),
    }[kind]()
    with pytest.raises(ArtefactError, match=r"cannot (write|lock)"), lock(folder):
        pass
    assert victim.read_text() == "mine"


def test_a_holder_s_name_from_elsewhere_is_not_repeated(tmp_path: Path) -> None:
    with only_writer(tmp_path):
        (tmp_path / WRITER).write_bytes(b"1 \x1b[31mhost\n")
        with pytest.raises(ConfigError, match="by another process: wait"):
            only_writer(tmp_path).__enter__()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_read_only_folder_is_refused_at_once(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(ArtefactError, match="make it writable"):
        only_writer(tmp_path).__enter__()


def test_a_file_in_the_folder_s_place_is_refused(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("")
    with pytest.raises(ConfigError, match="is a file"):
        only_writer(tmp_path / "run").__enter__()


def test_saves_into_one_folder_wait_for_each_other(tmp_path: Path) -> None:
    inside: list[int] = []
    most: list[int] = []

    def save(number: int) -> None:
        for _ in range(5):
            with folder_update(tmp_path) as draft:
                inside.append(number)
                most.append(len(inside))
                for name in "ab":
                    (draft.path / name).write_text(str(number))
                time.sleep(0.001)
                inside.remove(number)
            finish_update(tmp_path)

    threads = [threading.Thread(target=save, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == [1] * 20
    assert (tmp_path / "a").read_text() == (tmp_path / "b").read_text()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b"]


def test_drafts_of_a_process_that_ended_are_deleted(tmp_path: Path) -> None:
    (tmp_path / f"{DRAFT}killed").mkdir()
    (tmp_path / f"{DRAFT}killed" / "weights").write_text("gigabytes")
    with folder_update(tmp_path) as draft:
        (draft.path / "a").write_text("new")
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_a_decided_update_that_is_a_link_moves_nothing(tmp_path: Path) -> None:
    victim, folder = tmp_path / "home" / "victim", tmp_path / "evil"
    victim.parent.mkdir()
    victim.write_text("mine")
    folder.mkdir()
    (folder / READY).symlink_to(victim.parent)
    with pytest.raises(ArtefactError, match="is a link"):
        finish_update(folder)
    assert victim.read_text() == "mine"


@pytest.mark.parametrize(
    "removed", ['["../victim"]', '["{victim}"]', "[5]", "5", '["link/victim"]']
)
def test_a_decided_update_from_elsewhere_deletes_nothing_outside(
    tmp_path: Path, removed: str
) -> None:
    victim, folder = tmp_path / "victim", tmp_path / "evil"
    victim.write_text("mine")
    (folder / READY).mkdir(parents=True)
    (folder / "link").symlink_to(tmp_path)
    (folder / READY / ".removed").write_text(removed.replace("{victim}", str(victim)))
    with pytest.raises(ArtefactError):
        finish_update(folder)
    assert victim.read_text() == "mine"


def test_a_decided_update_from_elsewhere_writes_nothing_outside(tmp_path: Path) -> None:
    folder = tmp_path / "evil"
    (folder / READY / "guard").mkdir(parents=True)
    (folder / READY / "guard" / "victim").write_text("theirs")
    (tmp_path / "home").mkdir()
    (folder / "guard").symlink_to(tmp_path / "home")
    with pytest.raises(ArtefactError, match="no file of this folder"):
        finish_update(folder)
    assert not list((tmp_path / "home").iterdir())


@pytest.mark.skipif(os.name == "nt", reason="flock is of Unix")
@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EIO])
@pytest.mark.parametrize("lock", [only_writer, saving])
def test_a_file_system_without_locks_is_refused(
    tmp_path: Path,
    lock: Callable[[Path], AbstractContextManager[None]],
    number: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def flock(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("fcntl.flock", flock)
    with pytest.raises(ArtefactError, match="a file system that has locks"), lock(tmp_path):
        pass

from __future__ import annotations

import hashlib
import json
import os
import stat
from pathlib import Path

import pytest
import torch

from vqguard.errors import ArtefactError, ConfigError
from vqguard.files import (
    checksums,
    drafts,
    file_sha256,
    replace_files,
    replace_text,
    require_empty,
    text_sha256,
)


@pytest.mark.parametrize("mask", [0o022, 0o077])
def test_written_files_are_as_readable_as_others(tmp_path: Path, mask: int) -> None:
    before = os.umask(mask)
    try:
        replace_text(tmp_path / "a.txt", "ä\n")
    finally:
        os.umask(before)
    assert (tmp_path / "a.txt").read_bytes() == "ä\n".encode()
    assert stat.S_IMODE((tmp_path / "a.txt").stat().st_mode) == 0o666 & ~mask


def test_a_failing_writer_leaves_what_was_there(tmp_path: Path) -> None:
    place = tmp_path / "a"
    place.write_text("old")

    def write() -> None:
        with drafts(place, tmp_path / "b") as (first, second):
            first.write_text("new")
            second.write_text("new")
            raise RuntimeError("stopped")

    with pytest.raises(RuntimeError, match="stopped"):
        write()
    assert place.read_text() == "old"
    assert list(tmp_path.iterdir()) == [place]


def test_no_file_changes_before_all_are_on_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flushed: list[bool] = []

    def fsync(handle: int) -> None:
        flushed.append((tmp_path / "a").exists())

    monkeypatch.setattr(os, "fsync", fsync)
    replace_files({tmp_path / "a": b"1", tmp_path / "b": b"2"})
    assert flushed == [False, False]
    assert (tmp_path / "b").read_bytes() == b"2"


def test_only_an_empty_or_missing_folder_is_written_into(tmp_path: Path) -> None:
    require_empty(tmp_path, "Go away.")
    require_empty(tmp_path / "missing", "Go away.")
    (tmp_path / "a").touch()
    with pytest.raises(ConfigError, match=r"not an empty directory\. Go away\."):
        require_empty(tmp_path, "Go away.")
    with pytest.raises(ConfigError, match=r"is a file; expected a directory\. Go away\."):
        require_empty(tmp_path / "a", "Go away.")


def test_checksums_are_of_the_bytes(tmp_path: Path) -> None:
    values = torch.arange(6, dtype=torch.int16).reshape(2, 3)
    expected = hashlib.sha256(values.numpy().tobytes()).hexdigest()
    assert checksums({"a": values}) == {"a": expected}
    (tmp_path / "a").write_bytes(values.numpy().tobytes())
    assert file_sha256(tmp_path / "a") == expected
    assert text_sha256("ä") == hashlib.sha256(b"\xc3\xa4").hexdigest()
    with pytest.raises(ArtefactError, match="copy the whole folder"):
        file_sha256(tmp_path / "missing")


def test_the_umask_stays_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is the process's: another thread would make its files under a mask that was set here."""

    def refuse(_: int) -> int:
        raise AssertionError

    monkeypatch.setattr(os, "umask", refuse)
    replace_text(tmp_path / "a", "text")


def test_half_a_character_is_written_as_its_escape(tmp_path: Path) -> None:
    replace_text(tmp_path / "a", json.dumps({"name": "a\udcff"}, ensure_ascii=False))
    assert (tmp_path / "a").read_bytes() == b'{"name": "a\\udcff"}'


def test_what_a_killed_writer_leaves_is_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class KilledError(BaseException):
        pass

    def die(*_: object, **__: object) -> None:
        raise KilledError

    with monkeypatch.context() as patched:
        for name in ("replace", "unlink"):
            patched.setattr(Path, name, die)
        with pytest.raises(KilledError):
            replace_text(tmp_path / "recipe.yaml", "new")
    assert list(tmp_path.iterdir())
    require_empty(tmp_path, "")

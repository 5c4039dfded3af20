"""Folders as categories: what is one, what is read, and that nothing vanishes."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image

from vqguard.errors import InputError
from vqguard.recipes.data.held_out_set import HeldOutSet
from vqguard.recipes.data.labelled_images import labelled_files, open_files


def picture(path: Path, colour: str = "red") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (30, 30), colour).save(path, "JPEG")


def read_categories(
    folder: Path, *, skip_bad: bool, skipped: list[str]
) -> Iterator[tuple[tuple[str, ...], Image.Image]]:
    files = labelled_files(folder, None, skipped, [])
    return open_files(files, skip_bad=skip_bad, skipped=skipped)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    picture(tmp_path / "neutral" / "a.jpg")
    picture(tmp_path / "neutral" / ".ipynb_checkpoints" / "a-checkpoint.jpg")
    picture(tmp_path / "drugs" / "a.jfif", "blue")
    picture(tmp_path / ".ipynb_checkpoints" / "b.jpg")
    (tmp_path / "drugs" / "notes.txt").write_text("none")
    return tmp_path


def test_hidden_folders_are_no_category(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    skipped: list[str] = []
    with caplog.at_level(logging.INFO):
        labelled = read_categories(folder, skip_bad=False, skipped=skipped)
        assert [names for names, _ in labelled] == [("drugs",), ("neutral",)]
    assert "left out the hidden folders .ipynb_checkpoints" in caplog.text
    assert [line.split(": ")[1] for line in skipped] == ["not an image", "in a hidden folder"]
    table = [line.split() for line in caplog.messages]
    assert ["category", "read", "skipped"] in table
    assert ["drugs", "1", "0"] in table
    assert ["neutral", "1", "0"] in table


def test_a_category_without_a_picture_is_an_error(folder: Path) -> None:
    (folder / "drugs" / "a.jfif").write_bytes(b"neither a picture")
    with pytest.raises(InputError, match=r"drugs: no image .*2 skipped.*not an image"):
        list(read_categories(folder, skip_bad=False, skipped=[]))
    (folder / "drugs" / "b.jpg").write_bytes(b"nor this")
    with pytest.raises(InputError, match=r"drugs: no image .*1 skipped"):
        list(read_categories(folder, skip_bad=True, skipped=[]))


def test_the_same_holds_for_one_s_own_tests(folder: Path, tmp_path: Path) -> None:
    tests = tmp_path / "tests"
    for name in ("neutral", "drugs", ".ipynb_checkpoints"):
        picture(tests / "screening" / name / "a.jfif")
    own = HeldOutSet(tests)
    assert own.categories == ("drugs", "neutral")
    assert len(list(own.images("drugs"))) == 1
    (tests / "screening" / "drugs" / "a.jfif").write_bytes(b"no picture")
    with pytest.raises(InputError, match="drugs: no image"):
        list(own.images("drugs"))
